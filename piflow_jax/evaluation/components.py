"""Principal components (arXiv 1404.1100) of pixels: a feature space without labels.

It serves data without labels, for which no feature network can be trained; see `feature_training`.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from numpy.typing import ArrayLike

from piflow_jax.evaluation.adm import Moments
from piflow_jax.evaluation.area import area_averaged, sites_within
from piflow_jax.evaluation.features import checked_images, weight_digest

__all__ = ["PrincipalComponents"]

_MOST = 48
# Numbers per image for the covariance; larger images are averaged down to this.
_MOST_NUMBERS = 1024
# Smallest variance of a component relative to the largest. Smaller ones are due to rounding and
# compression.
_SMALLEST_SHARE = 1e-6
_BATCH = 512


@dataclasses.dataclass(frozen=True, eq=False)
class PrincipalComponents:
    """The leading principal components of images, standardised over the real data.

    They capture means, contrasts and coarse shapes, and little of what a person sees. Figures in
    this space show whether distributions agree to second order.

    Attributes:
      shape: `(H, W, C)` of the images.
      sites: `(h, w)` to which images are averaged first.
      mean: float32[S], of flattened images.
      axes: float32[S, D], directions divided by their standard deviations.
      digest: SHA-256 of both, 64 hexadecimal digits. Figures are comparable only between equal
        digests.
      name: its name in reports.
    """

    shape: tuple[int, int, int]
    sites: tuple[int, int]
    mean: np.ndarray
    axes: np.ndarray
    digest: str
    name: str = "principal components of the pixels"

    @classmethod
    def of(cls, batches: Iterable[ArrayLike]) -> "PrincipalComponents":
        """Computes the components of real images.

        Args:
          batches: images `[N, H, W, C]` in [-1, 1], at least two in total, in batches of any size.

        Returns:
          The space, of at most 48 dimensions. Grey images with a side above 32 are averaged down to
          32, and colour images with a side above 18 down to 18.

        Raises:
          ValueError: all images are equal, or one is not finite.
        """
        moments, shape, sites = Moments.empty(0), (), (0, 0)
        for images in batches:
            if not moments.count:
                shape = np.shape(images)[1:]
                sites = sites_within(shape, math.isqrt(_MOST_NUMBERS // shape[2]))
                moments = Moments.empty(sites[0] * sites[1] * shape[2])
            moments = moments.add(_flattened(images, sites))
        mean, covariance = moments.statistics()
        size = len(mean)
        variances, directions = scipy.linalg.eigh(
            covariance, subset_by_index=(max(size - _MOST, 0), size - 1)
        )
        variances, directions = variances[::-1], directions[:, ::-1]
        if not variances[0] > 0:
            raise ValueError("all images are the same: they have no principal components")
        kept = int(np.sum(variances > _SMALLEST_SHARE * variances[0]))
        directions = directions[:, :kept]
        # The sign of a component depends on the library.
        largest = np.abs(directions).argmax(axis=0)
        directions = directions * np.sign(directions[largest, np.arange(kept)])
        axes = directions / np.sqrt(variances[:kept])
        return cls.of_arrays({"shape": shape, "sites": sites, "mean": mean, "axes": axes})

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, ArrayLike]) -> "PrincipalComponents":
        """Restores a space that was saved.

        Args:
          arrays: the result of `arrays`: `shape [3]`, `sites [2]`, `mean [S]`, `axes [S, D]`.

        Returns:
          The space.

        Raises:
          KeyError: an array is missing.
        """
        kept = {name: np.asarray(arrays[name], np.float32) for name in ("mean", "axes")}
        shape, sites = (tuple(map(int, arrays[name])) for name in ("shape", "sites"))
        return cls(shape, sites, **kept, digest=weight_digest(kept))

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays to save, by name, see `of_arrays`."""
        sizes = {"shape": np.array(self.shape, np.int32), "sites": np.array(self.sites, np.int32)}
        return {**sizes, "mean": self.mean, "axes": self.axes}

    def features(self, images: jax.Array) -> jax.Array:
        """Features of images inside of another program, with derivatives.

        Args:
          images: `[B, H, W, C]`; clipped as in `extract`, so a pixel outside of [-1, 1] has none.

        Returns:
          `[B, D]`.
        """
        averaged = area_averaged(jnp.clip(images, -1, 1), self.sites)
        centred = averaged.reshape(len(averaged), -1) - self.mean[None, :]
        return jnp.matmul(centred, self.axes, precision=jax.lax.Precision.HIGHEST)

    def extract(self, images: ArrayLike) -> np.ndarray:
        """Features of images.

        Args:
          images: `[N, H, W, C]` with any N; values are first clipped to [-1, 1], as in pictures.

        Returns:
          float32[N, D].

        Raises:
          ValueError: images are not finite, or have another shape.
        """
        images = checked_images(images, self.shape, self.name)
        outputs = [np.zeros((0, self.axes.shape[1]), np.float32)]
        for start in range(0, len(images), _BATCH):
            part = np.clip(images[start : start + _BATCH], -1, 1)
            outputs.append((_flattened(part, self.sites) - self.mean) @ self.axes)
        return np.concatenate(outputs)


def _flattened(images: ArrayLike, sites: tuple[int, int]) -> np.ndarray:
    averaged = np.asarray(area_averaged(images, sites))
    return averaged.reshape(len(averaged), -1)
