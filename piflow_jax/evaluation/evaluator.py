"""Sampling by index and the figures of a set of samples."""

import dataclasses
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from piflow_jax.evaluation.diversity import class_diversity
from piflow_jax.evaluation.features import FeatureNetwork
from piflow_jax.evaluation.frechet import frechet_distance
from piflow_jax.evaluation.precision_recall import precision_recall

__all__ = ["Figures", "Sampler", "index_labels", "index_noise", "measure", "sample_by_index"]

Sampler = Callable[..., jax.Array]
"""`(params, noise[B, H, W, C], labels[B]) -> x_0[B, H, W, C]`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figures:
    """What is measured of one system's samples.

    Attributes:
      frechet: Frechet distance of the features to the real data's.
      precision: share of samples inside the real manifold.
      recall: share of real images inside the samples' manifold.
      diversity: mean pairwise feature distance within a class.
    """

    frechet: float
    precision: float
    recall: float
    diversity: float


def index_labels(num_samples: int, num_classes: int) -> np.ndarray:
    """Labels `int32[num_samples]`: classes in turn, so that every prefix is balanced."""
    return np.arange(num_samples, dtype=np.int32) % num_classes


def index_noise(seed: int, indices: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal noise `[B, *shape]` that depends on seed and index alone.

    Not on the batch size, nor on the number of devices or processes.
    """
    key = jax.random.key(seed)
    return jax.vmap(lambda index: jax.random.normal(jax.random.fold_in(key, index), shape))(indices)


def sample_by_index(
    sampler: Sampler,
    params,
    num_samples: int,
    *,
    shape: tuple[int, int, int],
    num_classes: int,
    batch_size: int,
    seed: int = 0,
    sharding: jax.sharding.Sharding | None = None,
) -> tuple[np.ndarray, float]:
    """Samples with noise and label fixed by index, in one compiled shape.

    Args:
      sampler: the system.
      params: its parameters.
      num_samples: how many.
      shape: `(H, W, C)` of a sample.
      num_classes: classes.
      batch_size: samples per call; the last call is padded.
      seed: seed of the noise.
      sharding: how a batch lies on the devices; by default it is on one.

    Returns:
      `(float32[num_samples, H, W, C], seconds)`; the time leaves compilation out.
    """

    def run(params, indices):
        labels = (indices % num_classes).astype(jnp.int32)
        return sampler(params, index_noise(seed, indices, shape), labels)

    def batch_of(start):
        indices = np.arange(start, start + batch_size, dtype=np.uint32) % num_samples
        return jax.device_put(indices, sharding)

    compiled = jax.jit(run).lower(params, batch_of(0)).compile()
    began = time.perf_counter()
    batches = [
        np.asarray(compiled(params, batch_of(start))) for start in range(0, num_samples, batch_size)
    ]
    samples = np.concatenate(batches)[:num_samples].astype(np.float32)
    return samples, time.perf_counter() - began


def measure(
    samples: np.ndarray, labels: np.ndarray, real_features: np.ndarray, network: FeatureNetwork
) -> Figures:
    """Figures of samples against real data.

    Args:
      samples: `[N, H, W, C]`; clipped to [-1, 1] by the feature network.
      labels: `int[N]`.
      real_features: `[M, D]`, from the same network.
      network: the feature space.

    Returns:
      The figures.

    Raises:
      ValueError: if the samples are not finite or of another shape.
    """
    features = network.extract(samples)
    coverage = precision_recall(real_features, features)
    return Figures(
        frechet=frechet_distance(features, real_features),
        precision=coverage.precision,
        recall=coverage.recall,
        diversity=class_diversity(features, labels),
    )
