"""Random access sources: what a pipeline reads from."""

import dataclasses
from typing import Protocol

import numpy as np


class Source(Protocol):
    """A finite data set with random access, such as the ones that `tfds.data_source` returns.

    Examples are dictionaries of equal keys and shapes; or shapes are equal within buckets that
    follow each other, and `bucket_sizes` has their numbers of examples. Images are
    `image: float32[H, W, C]` in [-1, 1] (or cached latents), classes are `label: int32[]`.
    """

    def __len__(self) -> int:
        """Returns the number of examples."""
        ...

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Returns one example, `0 <= index < len(self)`."""
        ...


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ArraySource:
    """A labelled image set held in memory.

    Attributes:
      name: Short name for logs and reports.
      images: float32[N, H, W, C] in [-1, 1].
      labels: int32[N] in [0, num_classes).
      num_classes: Number of classes.

    Raises:
      ValueError: If the arrays do not have these shapes, types or ranges, or are empty.
    """

    name: str
    images: np.ndarray
    labels: np.ndarray
    num_classes: int

    def __post_init__(self):  # noqa: D105
        images, labels = self.images, self.labels
        if images.ndim != 4 or images.dtype != np.float32 or len(images) == 0:
            raise ValueError(
                f"{self.name}: `images` must be non-empty float32[N, H, W, C], "
                f"got {images.dtype}{list(images.shape)}"
            )
        if labels.shape != images.shape[:1] or labels.dtype != np.int32:
            raise ValueError(
                f"{self.name}: `labels` must be int32[{len(images)}], "
                f"got {labels.dtype}{list(labels.shape)}"
            )
        low, high = float(images.min()), float(images.max())
        if not (low >= -1.0 and high <= 1.0):
            raise ValueError(f"{self.name}: `images` must lie in [-1, 1], got [{low}, {high}]")
        if labels.min() < 0 or labels.max() >= self.num_classes:
            raise ValueError(
                f"{self.name}: `labels` must lie in [0, {self.num_classes}), "
                f"got [{labels.min()}, {labels.max()}]"
            )
        images.setflags(write=False)
        labels.setflags(write=False)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape `(H, W, C)` of one image."""
        return self.images.shape[1:]

    def __len__(self) -> int:
        """Returns the number of examples."""
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Returns one example: `image: float32[H, W, C]`, `label: int32[]`."""
        return {"image": self.images[index], "label": self.labels[index]}

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Returns several examples, stacked, as fresh arrays.

        Args:
          indices: int[B] in [0, len(self)).

        Returns:
          `image: float32[B, H, W, C]` in [-1, 1], `label: int32[B]`.
        """
        return {"image": self.images[indices], "label": self.labels[indices]}
