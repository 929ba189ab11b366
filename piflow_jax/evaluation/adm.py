"""ADM's figures with their protocol: FID, sFID, Inception Score, precision and recall.

The procedure follows P. Dhariwal and A. Nichol, "Diffusion models beat GANs on image synthesis"
(arXiv 2105.05233); ImageNet papers share its reference files and evaluator. Frechet distances
compare the Inception network's pooled features (FID, M. Heusel et al., 1706.08500) and 7 channels
of a middle layer with their 17x17 sites (sFID, C. Nash et al., 2103.03841). A figure is called FID
only if the features come from the published weights; see `AdmFigures.names`.

There is one known difference. For precision and recall ADM's evaluator rounds squared distances to
float16; here they are float32.
"""

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from piflow_jax.evaluation.adm_files import (
    SPATIAL_FEATURES,
    Reference,
    file_digest,
    image_batches,
    is_published,
    read_reference,
    write_samples,
    write_statistics,
)
from piflow_jax.evaluation.checks import check_same_dimension, checked_features
from piflow_jax.evaluation.frechet import GaussianStatistics, frechet_distance_from_statistics
from piflow_jax.evaluation.precision_recall import precision_recall
from piflow_jax.models.inception import (
    IMAGE_SIZE,
    POOL_FEATURES,
    InceptionV3,
    class_logits,
)

__all__ = [
    "Activations",
    "AdmFigures",
    "InceptionNetwork",
    "Moments",
    "Protocol",
    "Reference",
    "file_digest",
    "image_batches",
    "inception_score",
    "measure_adm",
    "read_reference",
    "to_uint8",
    "write_samples",
    "write_statistics",
]

_NEIGHBOUR = 3
_SPLIT = 5000


@dataclasses.dataclass(frozen=True)
class Moments:
    """Count, mean and scatter of features, accumulated from batches and shards in float64.

    Attributes:
      count: Number of samples.
      mean: float64[D], zeros for no samples.
      scatter: float64[D, D], the sum of outer products of deviations from the mean.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def empty(cls, dimension: int) -> "Moments":
        """Moments of no samples with `dimension` features."""
        return cls(0, np.zeros(dimension), np.zeros((dimension, dimension)))

    def add(self, features: ArrayLike) -> "Moments":
        """Adds a batch of samples.

        Args:
          features: [N, D], `N >= 1`.

        Returns:
          The moments of all samples together.

        Raises:
          ValueError: If `features` is malformed, has another dimension, or has a NaN or infinity.
        """
        features = checked_features(features, "features", minimum=1)
        check_same_dimension(features, self.mean, ("features", "self.mean"))
        mean = features.mean(axis=0)
        centred = features - mean
        return self.merge(Moments(len(features), mean, centred.T @ centred))

    def merge(self, other: "Moments") -> "Moments":
        """Combines the moments of two disjoint sets of samples (T. Chan et al., 1979).

        Args:
          other: Moments of the other set.

        Returns:
          The moments of all samples together.

        Raises:
          ValueError: If `other` has another dimension.
        """
        check_same_dimension(other.mean, self.mean, ("other", "self"))
        count = self.count + other.count
        if count == 0:
            return self
        shift = other.mean - self.mean
        mean = self.mean + shift * (other.count / count)
        between = np.outer(shift, shift * (self.count * other.count / count))
        return Moments(count, mean, self.scatter + other.scatter + between)

    def statistics(self) -> GaussianStatistics:
        """Mean and unbiased covariance.

        Returns:
          Both in float64, shapes [D] and [D, D].

        Raises:
          ValueError: For fewer than two samples.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs two samples, got {self.count}")
        return GaussianStatistics(self.mean, self.scatter / (self.count - 1))


class Activations(NamedTuple):
    """Features of images: `pool` float32[N, 2048] for FID, `spatial` float32[N, 2023] for sFID."""

    pool: np.ndarray
    spatial: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class InceptionNetwork:
    """The feature network with its weights.

    Attributes:
      params: Variables of `InceptionV3`, see `piflow_jax.convert`.
      digest: SHA-256 of the file of weights, 64 hexadecimal digits.
      batch_size: Images per batch; the last batch is padded.
      sharding: Sharding of a batch over devices; by default it is on one device.
    """

    params: dict
    digest: str
    batch_size: int = 64
    sharding: jax.sharding.Sharding | None = None

    @property
    def published(self) -> bool:
        """Whether the weights are the published ones; only their features give an FID."""
        return is_published(self.digest)

    def activations(self, images: np.ndarray) -> Activations:
        """Features of images.

        Args:
          images: uint8[N, H, W, 3], which are resized to 299x299 as in TensorFlow 1.

        Returns:
          The features.

        Raises:
          ValueError: If `images` is not such an array (`to_uint8` makes one from [-1, 1]).
        """
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(
                f"`images` must be uint8[N, H, W, 3], got {images.dtype}{list(images.shape)}"
            )
        pools = [np.zeros((0, POOL_FEATURES), np.float32)]
        spatials = [np.zeros((0, SPATIAL_FEATURES), np.float32)]
        for start in range(0, len(images), self.batch_size):
            part = images[start : start + self.batch_size]
            padding = ((0, self.batch_size - len(part)), (0, 0), (0, 0), (0, 0))
            batch = jax.device_put(np.pad(part, padding), self.sharding)
            pool, spatial = _activations(self.params, batch)
            pools.append(np.asarray(pool)[: len(part)])
            spatials.append(np.asarray(spatial)[: len(part)])
        return Activations(np.concatenate(pools), np.concatenate(spatials))

    def logits(self, pool: np.ndarray) -> np.ndarray:
        """Logits float32[N, classes] of pooled features `pool[N, 2048]` without bias, as in ADM."""
        return np.asarray(class_logits(self.params, jnp.asarray(pool)))


@jax.jit
def _activations(params: dict, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    module = InceptionV3(num_classes=params["params"]["fc_bias"].shape[0])
    output = module.apply(params, images)
    return output.pool, output.spatial.reshape(len(images), -1)


def inception_score(logits: ArrayLike, split_size: int = _SPLIT) -> float:
    """Inception Score (T. Salimans et al., 1606.03498) in ADM's splits.

    Args:
      logits: [N, classes], in an order that does not depend on the class.
      split_size: Samples per split. A smaller last split counts like the others.

    Returns:
      The mean over splits of `exp(mean_x KL(p(y | x) | p(y)))`, between 1 and the number of
      classes.

    Raises:
      ValueError: If `logits` is malformed or not finite, or `split_size` is less than 1.
    """
    logits = checked_features(np.asarray(logits), "logits", minimum=1)
    if split_size < 1:
        raise ValueError(f"`split_size` must be positive, got {split_size}")
    scores = []
    for start in range(0, len(logits), split_size):
        part = logits[start : start + split_size]
        log_p = part - np.logaddexp.reduce(part, axis=1, keepdims=True)
        log_marginal = np.logaddexp.reduce(log_p, axis=0) - np.log(len(part))
        divergence = np.sum(np.exp(log_p) * (log_p - log_marginal), axis=1)
        scores.append(np.exp(divergence.mean()))
    return float(np.mean(scores))


def to_uint8(images: ArrayLike) -> np.ndarray:
    """Images as bytes: 127.5 x + 128 rounded down, as in DiT.

    Args:
      images: Images of any shape, in [-1, 1] or clipped to it.

    Returns:
      uint8 in [0, 255], of the same shape.

    Raises:
      ValueError: If `images` has a NaN or infinity.
    """
    images = np.asarray(images, np.float32)
    if not np.isfinite(images).all():
        raise ValueError("`images` has a NaN or infinity")
    return np.clip(127.5 * images + 128, 0, 255).astype(np.uint8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
    """Everything that the ADM figures of a system depend on.

    Attributes:
      samples: Number of samples.
      label_rule: Rule that gives a sample's label from its index.
      seed: Seed of the noise. The noise depends on the seed and the sample's index alone.
      nfe: Network evaluations per sample.
      substeps: Policy substeps over the whole path.
      solver: Solver that integrates the policy.
      temperature: Temperature of the mixture in all evaluations but the last; 1 has no effect.
      guidance: Guidance scale in sampling; 1 is no guidance.
      decoder: The autoencoder that decodes latents to pixels.
      dtype: Precision of network and decoder.
      feature_network: SHA-256 of the feature network's weights.
      reference: Name of the reference file.
      reference_digest: SHA-256 of its bytes.
    """

    samples: int
    label_rule: str
    seed: int
    nfe: int
    substeps: int
    solver: str
    temperature: float
    guidance: float
    decoder: str
    dtype: str
    feature_network: str
    reference: str
    reference_digest: str

    def __str__(self) -> str:
        """All entries in words."""
        evaluations = "evaluation" if self.nfe == 1 else "evaluations"
        return (
            f"{self.samples} samples, labels {self.label_rule}, noise by index with seed "
            f"{self.seed}; {self.nfe} network {evaluations}, {self.substeps} substeps by "
            f"{self.solver}, temperature {self.temperature:g}, guidance {self.guidance:g}, "
            f"{self.dtype}; decoder {self.decoder}, bytes by clipping and "
            f"rounding 127.5 x + 127.5; TensorFlow 1's bilinear resize to {IMAGE_SIZE}; features "
            f"of sha256 {self.feature_network}; reference {self.reference} of sha256 "
            f"{self.reference_digest}; Inception Score in splits of {_SPLIT}, precision and recall "
            f"with k = {_NEIGHBOUR} in float32"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdmFigures:
    """ADM's figures with their protocol.

    Attributes:
      frechet: Frechet distance of pooled features.
      spatial_frechet: Frechet distance of spatial features.
      inception_score: Inception Score.
      precision: Share of samples inside the manifold of the reference's images; None without
        images.
      recall: Share of the reference's images inside the samples' manifold; None without images.
      reference_images: Number of reference images for precision and recall.
      protocol: Everything that the figures depend on.
    """

    frechet: float
    spatial_frechet: float
    inception_score: float
    precision: float | None
    recall: float | None
    reference_images: int
    protocol: Protocol

    @property
    def names(self) -> tuple[str, str, str]:
        """Names of the first three figures: FID and so on only for the published features."""
        if is_published(self.protocol.feature_network):
            return "FID", "sFID", "Inception Score"
        space = f"of features {self.protocol.feature_network[:8]}"
        return (
            f"Frechet distance {space}",
            f"spatial Frechet distance {space}",
            f"class score {space}",
        )

    def __str__(self) -> str:
        """Figures and protocol in words."""
        numbers = (self.frechet, self.spatial_frechet, self.inception_score)
        parts = [f"{name} {value:.3f}" for name, value in zip(self.names, numbers, strict=True)]
        for name, value in (("precision", self.precision), ("recall", self.recall)):
            parts.append(f"no {name}" if value is None else f"{name} {value:.4f}")
        against = f"{self.reference_images} reference images"
        return f"{', '.join(parts)} (against {against}). {self.protocol}."


def measure_adm(
    batches: Iterable[np.ndarray],
    network: InceptionNetwork,
    reference: Reference,
    protocol: Protocol,
) -> AdmFigures:
    """Measures ADM's figures of samples.

    Args:
      batches: Arrays uint8[B, H, W, 3], such as `image_batches` of a file of samples.
      network: The feature network.
      reference: Real data. Statistics that it lacks are computed from its images.
      protocol: Description of how the samples were made.

    Returns:
      The figures.

    Raises:
      ValueError: The reference belongs to another feature network, or the protocol does not name
        this network, this reference and this number of samples.
    """
    reference.check(network.digest)
    named = (protocol.feature_network, protocol.reference_digest)
    if named != (network.digest, reference.digest):
        raise ValueError("`protocol` names another feature network or reference than was given")
    pool, spatial, features = _moments(batches, network)
    if pool.count != protocol.samples:
        raise ValueError(f"`protocol` says {protocol.samples} samples, there are {pool.count}")
    real_pool, real_spatial, real_features = reference.pool, reference.spatial, None
    if reference.images:
        moments = _moments(image_batches(reference.path), network)
        real_features = moments[2]
        if real_pool is None:
            real_pool, real_spatial = moments[0].statistics(), moments[1].statistics()
    precision = recall = None
    if real_features is not None:
        precision, recall = precision_recall(real_features, features, k=_NEIGHBOUR)
    return AdmFigures(
        frechet=frechet_distance_from_statistics(pool.statistics(), real_pool),
        spatial_frechet=frechet_distance_from_statistics(spatial.statistics(), real_spatial),
        inception_score=inception_score(network.logits(features)),
        precision=precision,
        recall=recall,
        reference_images=reference.images,
        protocol=protocol,
    )


def _moments(
    batches: Iterable[np.ndarray], network: InceptionNetwork
) -> tuple[Moments, Moments, np.ndarray]:
    """Moments of pooled and of spatial features, and the pooled features themselves."""
    moments, features = None, []
    for batch in batches:
        activations = network.activations(batch)
        moments = moments or tuple(Moments.empty(part.shape[1]) for part in activations)
        moments = tuple(m.add(part) for m, part in zip(moments, activations, strict=True))
        features.append(activations.pool)
    if moments is None:
        raise ValueError("there are no images")
    return *moments, np.concatenate(features)
