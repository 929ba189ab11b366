"""The Frechet distance between Gaussians, and the direction in which it moves samples.

The squared distance between two Gaussians is the cost of optimal transport between them. The
optimal map is affine. At a sample, the gradient of the distance points from the sample's image
under the map to the sample. So a single eigendecomposition of a symmetric matrix gives value and
gradient, and nothing is differentiated through a matrix root.

Sources: D. Dowson and B. Landau, "The Frechet distance between multivariate normal distributions"
(1982); FD-loss (arXiv 2604.28190) for the distance as a loss, over more samples than a batch has.
"""

from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

__all__ = ["Gaussian", "Moments", "frechet_distance", "frechet_loss"]

# Variances below this share of the largest one are noise in float32.
_LEAST_SHARE = 1e-6
_EXACT = jax.lax.Precision.HIGHEST


class Gaussian(NamedTuple):
    """Mean and covariance of features.

    Attributes:
      mean: `[D]`.
      covariance: `[D, D]`, positive semi-definite.
    """

    mean: jax.Array
    covariance: jax.Array


@flax.struct.dataclass
class Moments:
    """Running mean and second moment of features, over more samples than a batch has.

    Rounding is least if features are relative to a point near their mean.

    Attributes:
      batches: int32 scalar, batches seen.
      first: `[D]`, mean of the features.
      second: `[D, D]`, mean of their outer products.
    """

    batches: jax.Array
    first: jax.Array
    second: jax.Array

    @classmethod
    def none(cls, dimension: int) -> "Moments":
        """Moments of no samples, of features with `dimension` numbers."""
        zeros = jnp.zeros((dimension, dimension))
        return cls(batches=jnp.zeros((), jnp.int32), first=jnp.zeros(dimension), second=zeros)

    def add(self, features: jax.Array, most: float) -> "Moments":
        """The moments with another batch.

        Args:
          features: `[B, D]`.
          most: batches over which the means are taken. Until there are as many, all count alike;
            then weights decay with age.

        Returns:
          The moments.
        """
        batches = self.batches + 1
        weight = 1 / jnp.minimum(batches.astype(features.dtype), most)
        second = jnp.matmul(features.T, features, precision=_EXACT) / len(features)
        return Moments(
            batches=batches,
            first=self.first + weight * (jnp.mean(features, axis=0) - self.first),
            second=self.second + weight * (second - self.second),
        )

    def gaussian(self) -> Gaussian:
        """Their mean and covariance."""
        return Gaussian(self.first, self.second - jnp.outer(self.first, self.first))


def frechet_distance(ours: Gaussian, mean: jax.Array, root: jax.Array) -> jax.Array:
    """The squared Frechet distance between two Gaussians.

    Args:
      ours: the first.
      mean: `[D]`, of the second.
      root: `[D, D]`, the symmetric square root of the second's covariance.

    Returns:
      A scalar, in squared units of the features.
    """
    values, _ = _product(ours.covariance, root)
    spread = jnp.trace(ours.covariance) + jnp.sum(jnp.square(root))
    spread -= 2 * jnp.sum(jnp.sqrt(jnp.maximum(values, 0)))
    return jnp.sum(jnp.square(ours.mean - mean)) + spread


def frechet_loss(
    features: jax.Array, ours: Gaussian, mean: jax.Array, root: jax.Array
) -> jax.Array:
    """A loss whose gradient is that of the Frechet distance, example by example.

    Args:
      features: `[B, D]`, of some of the samples; gradients flow into these alone.
      ours: mean and covariance of the features of all samples, without gradient.
      mean: `[D]`, of the target.
      root: `[D, D]`, the symmetric square root of the target's covariance.

    Returns:
      A scalar, the mean squared distance between features and their images under optimal
      transport. Over all samples it is the Frechet distance. Its gradient at a feature is that of
      the distance if the batch is all samples.
    """
    ours = jax.lax.stop_gradient(ours)
    values, vectors = _product(ours.covariance, root)
    # Before there are samples, all variances are zero; the target's then give the scale.
    unit = _LEAST_SHARE * jnp.square(jnp.sum(jnp.square(root)))
    least = _LEAST_SHARE * jnp.maximum(values[-1], unit)
    half = jnp.matmul(root, vectors, precision=_EXACT)
    scaled = half * jax.lax.rsqrt(jnp.maximum(values, least))[None, :]
    transport = jnp.matmul(scaled, half.T, precision=_EXACT)
    centred = jax.lax.stop_gradient(features) - ours.mean[None, :]
    target = mean[None, :] + jnp.matmul(centred, transport, precision=_EXACT)
    return jnp.mean(jnp.sum(jnp.square(features - target), axis=-1))


def _product(covariance: jax.Array, root: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues `[D]`, ascending, and eigenvectors `[D, D]` of `root covariance root`."""
    product = jnp.matmul(jnp.matmul(root, covariance, precision=_EXACT), root, precision=_EXACT)
    return jnp.linalg.eigh((product + product.T) / 2)
