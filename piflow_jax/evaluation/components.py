"""Principal components (arXiv 1404.1100) as a feature space, where there are no labels.

Without labels no feature network can be trained for the data; see `feature_training`.
"""

import dataclasses
import hashlib

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["PrincipalComponents"]

_MOST = 48


@dataclasses.dataclass(frozen=True, eq=False)
class PrincipalComponents:
    """The leading principal components of samples, standardised over the real data.

    They see means, contrasts and coarse shapes, and little of what a person sees: figures in this
    space say whether distributions agree to second order.

    Attributes:
      name: what reports call it.
      mean: float64[S], of flattened samples.
      axes: float64[S, D], directions over their standard deviations.
      digest: SHA-256 of both, 64 hexadecimal digits. Figures compare only between equal digests.
    """

    name: str
    mean: np.ndarray
    axes: np.ndarray
    digest: str

    @classmethod
    def of(cls, samples: ArrayLike) -> "PrincipalComponents":
        """The components of real samples.

        Args:
          samples: `[N, *sites, C]`, at least two.

        Returns:
          The space, of at most 48 dimensions.

        Raises:
          ValueError: all samples are the same.
        """
        flat = np.asarray(samples, np.float64).reshape(len(samples), -1)
        mean = flat.mean(axis=0)
        _, scales, directions = np.linalg.svd(flat - mean, full_matrices=False)
        deviations = scales / np.sqrt(max(len(flat) - 1, 1))
        kept = min(_MOST, int(np.sum(deviations > 1e-6 * max(deviations[0], 1e-30))))
        if not kept or not deviations[0]:
            raise ValueError("all samples are the same: they have no principal components")
        # The sign of a component is the library's whim.
        directions = directions[:kept]
        largest = np.abs(directions).argmax(axis=1)
        directions = directions * np.sign(directions[np.arange(kept), largest])[:, None]
        axes = (directions / deviations[:kept, None]).T
        digest = hashlib.sha256(mean.astype("<f4").tobytes() + axes.astype("<f4").tobytes())
        return cls("principal components", mean, axes, digest.hexdigest())

    def extract(self, samples: ArrayLike) -> np.ndarray:
        """Features of samples.

        Args:
          samples: `[N, *sites, C]`.

        Returns:
          float32[N, D].

        Raises:
          ValueError: samples are not finite, or of another size.
        """
        flat = np.asarray(samples, np.float64).reshape(len(samples), -1)
        if flat.shape[1] != len(self.mean):
            raise ValueError(f"samples have {flat.shape[1]} numbers, expected {len(self.mean)}")
        if not np.isfinite(flat).all():
            raise ValueError("samples have NaN or infinity")
        return ((flat - self.mean) @ self.axes).astype(np.float32)
