"""Principal components (arXiv 1404.1100) of the pixels as a feature space, without labels.

Without labels no feature network can be trained for the data; see `feature_training`.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping

import numpy as np
import scipy.linalg
from numpy.typing import ArrayLike

from piflow_jax.evaluation.adm import Moments
from piflow_jax.evaluation.area import area_averaged, sites_within
from piflow_jax.evaluation.features import checked_images, weight_digest

__all__ = ["PrincipalComponents"]

_MOST = 48
_MOST_NUMBERS = 1024  # of an image whose covariance is taken; larger ones are averaged to it
# Smallest variance of a component against the largest's: below are rounding and compression.
_SMALLEST_SHARE = 1e-6
_BATCH = 512


@dataclasses.dataclass(frozen=True, eq=False)
class PrincipalComponents:
    """The leading principal components of images, standardised over the real data.

    They see means, contrasts and coarse shapes, and little of what a person sees: figures in this
    space say whether distributions agree to second order.

    Attributes:
      shape: `(H, W, C)` of the images it takes.
      sites: `(h, w)` to which images are averaged first.
      mean: float32[S], of flattened images.
      axes: float32[S, D], directions over their standard deviations.
      digest: SHA-256 of both, 64 hexadecimal digits. Figures compare only between equal digests.
      name: what reports call it.
    """

    shape: tuple[int, int, int]
    sites: tuple[int, int]
    mean: np.ndarray
    axes: np.ndarray
    digest: str
    name: str = "principal components of the pixels"

    @classmethod
    def of(cls, batches: Iterable[ArrayLike]) -> "PrincipalComponents":
        """The components of real images.

        Args:
          batches: images `[N, H, W, C]` in [-1, 1], at least two of them, in batches of any size.

        Returns:
          The space, of at most 48 dimensions. Grey images with a side above 32, and colour images
          with one above 18, are averaged to that.

        Raises:
          ValueError: all images are the same, or one is not finite.
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
        # The sign of a component is the library's whim.
        largest = np.abs(directions).argmax(axis=0)
        directions = directions * np.sign(directions[largest, np.arange(kept)])
        axes = directions / np.sqrt(variances[:kept])
        return cls.of_arrays({"shape": shape, "sites": sites, "mean": mean, "axes": axes})

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, ArrayLike]) -> "PrincipalComponents":
        """The space that has been kept.

        Args:
          arrays: what `arrays` made: `shape [3]`, `sites [2]`, `mean [S]`, `axes [S, D]`.

        Returns:
          The space.

        Raises:
          KeyError: an array is missing.
        """
        kept = {name: np.asarray(arrays[name], np.float32) for name in ("mean", "axes")}
        shape, sites = (tuple(map(int, arrays[name])) for name in ("shape", "sites"))
        return cls(shape, sites, **kept, digest=weight_digest(kept))

    def arrays(self) -> dict[str, np.ndarray]:
        """What has to be kept, arrays by name, see `of_arrays`."""
        sizes = {"shape": np.array(self.shape, np.int32), "sites": np.array(self.sites, np.int32)}
        return {**sizes, "mean": self.mean, "axes": self.axes}

    def extract(self, images: ArrayLike) -> np.ndarray:
        """Features of images.

        Args:
          images: `[N, H, W, C]`, any N; values are clipped to [-1, 1] first, as pictures are.

        Returns:
          float32[N, D].

        Raises:
          ValueError: images are not finite, or of another shape.
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
