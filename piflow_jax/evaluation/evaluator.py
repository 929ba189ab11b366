"""Sampling by index, and figures of a set of samples."""

import contextlib
import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from piflow_jax.evaluation.diversity import class_diversity
from piflow_jax.evaluation.features import FeatureNetwork
from piflow_jax.evaluation.frechet import frechet_distance
from piflow_jax.evaluation.precision_recall import precision_recall
from piflow_jax.keys import index_keys, index_noise, seed_key
from piflow_jax.progress import Progress

__all__ = [
    "Figures",
    "IndexSampler",
    "Sampler",
    "index_labels",
    "least_real_samples",
    "least_samples",
    "measure",
]

# The neighbour that sets the radii of precision and recall.
_NEIGHBOUR = 3
_PROGRAMS = 8  # executables that are kept for other samplers

Sampler = Callable[..., jax.Array]
"""`(params, noise[B, *sites, C], condition) -> x_0[B, *sites, C]`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figures:
    """Figures of one system's samples.

    Attributes:
      frechet: Frechet distance between the features and those of real data.
      precision: share of samples inside the real manifold.
      recall: share of real images inside the samples' manifold.
      diversity: mean pairwise feature distance within a class.
    """

    frechet: float
    precision: float
    recall: float
    diversity: float


def index_labels(num_samples: int, num_classes: int) -> np.ndarray:
    """Labels that cycle through the classes, so that every prefix is balanced.

    Args:
      num_samples: number of labels.
      num_classes: Number of classes.

    Returns:
      `int32[num_samples]` in [0, num_classes).
    """
    return np.arange(num_samples, dtype=np.int32) % num_classes


@functools.lru_cache(maxsize=_PROGRAMS)
def _program(key: tuple) -> list[Any]:
    """A place for the executable of a program."""
    return []


def _compiled(lowered: jax.stages.Lowered, sharding: jax.sharding.Sharding | None) -> Any:
    """The executable of a program, which another sampler may have compiled before.

    Looks at a student and its evaluation make samplers of their own that are the same program.
    """
    devices = None if sharding is None else tuple(d.id for d in sharding.device_set)
    text = lowered.as_text().encode()
    # The text does not name the arguments.
    key = (hashlib.sha256(text).digest(), lowered.in_tree, devices, jax.config.jax_default_device)
    kept = _program(key)
    if not kept:
        kept.append(lowered.compile())
    return kept[0]


class IndexSampler:
    """Samples by index: noise and condition depend on the index alone, in one compiled shape.

    The system is compiled at the first call and never again, for any values of the parameters.

    Args:
      sampler: the system's sampler.
      shape: `(*sites, C)` of the noise.
      conditions: conditions to cycle through, such as labels: arrays `[n, ...]` in any structure.
        Sample `i` has row `i % n`. None for a system without conditions.
      batch_size: samples per call of the system; the last call of a range is padded.
      num_samples: largest number of samples requested in a range, which bounds the batch; unknown
        by default.
      seed: seed of the noise.
      sharding: sharding of a batch over devices; by default it is on one device.
      name: the system's name, for the progress line.
    """

    def __init__(
        self,
        sampler: Sampler,
        *,
        shape: tuple[int, ...],
        conditions: Any,
        batch_size: int,
        num_samples: int | None = None,
        seed: int = 0,
        sharding: jax.sharding.Sharding | None = None,
        name: str = "samples",
    ):
        if num_samples is not None:
            devices = 1 if sharding is None else sharding.num_devices
            batch_size = min(batch_size, -(-num_samples // devices) * devices)
        self.batch_size = batch_size
        self.seconds = 0.0
        self._name = name
        self._sharding = sharding
        self._compiled = None

        def run(params, indices):
            turn = jax.tree.map(lambda a: jnp.asarray(a)[indices % len(a)], conditions)
            noise = index_noise(index_keys(seed_key(seed), indices), shape)
            return sampler(params, noise, turn)

        self._run = jax.jit(run)

    def batches(self, params: Any, indices: range) -> Iterator[np.ndarray]:
        """Yields the samples of consecutive indices.

        Adds the time spent to the attribute `seconds`, without compilation.

        Args:
          params: Parameters of the system.
          indices: A range of sample numbers with step 1.

        Yields:
          `[b, H, W, C]` with `b = batch_size`, or fewer for the last batch, in the system's own
          dtype.
        """
        with Progress(self._name, len(indices)) as progress:
            for start in range(indices.start, indices.stop, self.batch_size):
                count = min(self.batch_size, indices.stop - start)
                numbers = np.arange(start, start + self.batch_size, dtype=np.uint32)
                numbers[count:] = start  # padding
                numbers = jax.device_put(numbers, self._sharding)
                if self._compiled is None:
                    progress.compiling()
                    with self._on_mesh():  # kernels split their batch over the mesh
                        self._compiled = _compiled(self._run.lower(params, numbers), self._sharding)
                    progress.start()
                began = time.perf_counter()
                samples = np.asarray(self._compiled(params, numbers))[:count]
                self.seconds += time.perf_counter() - began
                progress.advance(count)
                yield samples

    def _on_mesh(self) -> contextlib.AbstractContextManager:
        several = isinstance(self._sharding, jax.sharding.NamedSharding)
        return jax.set_mesh(self._sharding.mesh) if several else contextlib.nullcontext()

    def __call__(self, params: Any, num_samples: int) -> np.ndarray:
        """Returns the first samples.

        Processes share the work and each receives all samples, so all of them must call this.

        Args:
          params: Parameters of the system.
          num_samples: Number of samples, from index 0 on.

        Returns:
          `float32[num_samples, H, W, C]`.
        """
        count = jax.process_count()
        share = -(-num_samples // count)
        start = min(jax.process_index() * share, num_samples)
        mine = range(start, min(start + share, num_samples))
        # A process without work left still needs the shape of a sample.
        batches = list(self.batches(params, mine or range(1)))
        samples = np.concatenate(batches).astype(np.float32)[: len(mine)]
        if count == 1:
            return samples
        samples = np.pad(samples, [(0, share - len(mine)), *[(0, 0)] * (samples.ndim - 1)])
        return multihost_utils.process_allgather(samples, tiled=True)[:num_samples]


def least_samples(num_classes: int) -> int:
    """The fewest samples, with labels from `index_labels`, that `measure` accepts.

    Args:
      num_classes: Number of classes.

    Returns:
      The smallest number with two samples per class for the diversity, and with `k` neighbours per
      sample for the recall.
    """
    return max(num_classes, _NEIGHBOUR) + 1


def least_real_samples() -> int:
    """Returns the fewest real samples that split into comparable halves, see `half_split_floor`."""
    return 2 * least_samples(0)


def measure(
    samples: np.ndarray, labels: np.ndarray, real_features: np.ndarray, network: FeatureNetwork
) -> Figures:
    """Measures figures of samples against real data.

    Args:
      samples: `[N, H, W, C]`; clipped to [-1, 1] by the feature network.
      labels: `int[N]`.
      real_features: `[M, D]`, from the same feature space.
      network: the feature space.

    Returns:
      The figures.

    Raises:
      ValueError: if the samples are not finite or have another shape.
    """
    features = network.extract(samples)
    coverage = precision_recall(real_features, features, k=_NEIGHBOUR)
    return Figures(
        frechet=frechet_distance(features, real_features),
        precision=coverage.precision,
        recall=coverage.recall,
        diversity=class_diversity(features, labels),
    )
