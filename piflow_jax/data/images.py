"""Pixels of any image set, decoded once: square crops of one size, with their classes.

A set is a `ShardedSet` (see `piflow_jax.data.shards`) whose manifest, `images.json`, says which
images, their size, channels and the names of their classes. A record is a label, int32, and then
the pixels, uint8[H, W, C]. A set that fits is read into memory; a larger one is read from its disk.
"""

import dataclasses
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np

from piflow_jax.data.shards import Plan, ShardedSet, ShardsError

if TYPE_CHECKING:
    import jax

__all__ = ["ImagesError", "ImagesPlan", "ImagesSource", "load_images_source", "prepare_images"]

# A set of at most so many bytes of pixels is kept in memory.
_IN_MEMORY = 2**30
_LABEL = np.dtype("<i4")


class ImagesError(ShardsError):
    """A set of images is unfinished, damaged, or not the one that was asked for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImagesPlan(Plan):
    """What a set is, fixed before its first shard is written.

    Attributes:
      source: What the images are, with a hash of their names.
      class_names: Names of the classes, in the order of their labels.
      image_size: Side of the square crops.
      channels: 1 (grey) or 3 (RGB).

    Raises:
      ValueError: If a number is out of range.
    """

    stem = "images"

    source: str
    class_names: tuple[str, ...]
    image_size: int
    channels: int

    def __post_init__(self):  # noqa: D105
        super().__post_init__()
        object.__setattr__(self, "class_names", tuple(self.class_names))
        self.check_positive("image_size")
        if self.channels not in (1, 3) or not self.class_names:
            raise ValueError(f"channels must be 1 or 3 with a class, got {self.channels}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape `(H, W, C)` of an image."""
        return self.image_size, self.image_size, self.channels


_SET = ShardedSet(
    manifest="images.json", format=1, plan=ImagesPlan, error=ImagesError, contents="images"
)


class ImagesSource:
    """A finished set by index, for `piflow_jax.data.batches`; made by `load_images_source`.

    Examples have `x: float32[H, W, C]` in [-1, 1] and `condition: int32[]`, the label.

    Attributes:
      name: `images`.
      shape: `(H, W, C)` of an image.
      num_classes: Number of classes.
      class_names: Their names.
      manifest: All that is known of the set, `images.json`.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any], mirror: bool):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self.name = "images"
        self.shape = (manifest["image_size"], manifest["image_size"], manifest["channels"])
        self.class_names = tuple(manifest["class_names"])
        self.num_classes = len(self.class_names)
        self.manifest = manifest
        if mirror:
            self.draw = mirrored
        paths = [os.fspath(directory / shard["file"]) for shard in manifest["shards"]]
        self._records = ArrayRecordDataSource(paths)
        if len(self) * int(np.prod(self.shape)) <= _IN_MEMORY:
            self._pixels, self._labels = self._read(range(len(self)))
            self.gather = self._gathered

    def __len__(self) -> int:
        """Returns the number of images."""
        return self.manifest["num_examples"]

    def __getitem__(self, index: SupportsIndex) -> dict[str, np.ndarray]:
        """Returns one example, `0 <= index < len(self)`."""
        return {name: array[0] for name, array in self._example([index]).items()}

    def __getitems__(self, indices: list[int]) -> list[dict[str, np.ndarray]]:
        """Returns several examples, read at once."""
        batch = self._example(indices)
        return [{name: array[row] for name, array in batch.items()} for row in range(len(indices))]

    def _gathered(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return {"x": _scaled(self._pixels[indices]), "condition": self._labels[indices]}

    def _example(self, indices: list[Any]) -> dict[str, np.ndarray]:
        pixels, labels = self._read([int(index) for index in indices])
        return {"x": _scaled(pixels), "condition": labels}

    def _read(self, indices: Iterable[int]) -> tuple[np.ndarray, np.ndarray]:
        """Pixels uint8[N, H, W, C] and labels int32[N]."""
        size = _LABEL.itemsize + int(np.prod(self.shape))
        records = self._records.__getitems__(list(indices))
        for record in records:
            if len(record) != size:
                raise ImagesError(f"a record has {len(record)} bytes, expected {size}")
        rows = np.frombuffer(b"".join(records), np.uint8).reshape(-1, size)
        labels = np.ascontiguousarray(rows[:, : _LABEL.itemsize]).view(_LABEL)[:, 0]
        pixels = rows[:, _LABEL.itemsize :].reshape(-1, *self.shape)
        return np.ascontiguousarray(pixels), labels.astype(np.int32)


def load_images_source(
    directory: str | os.PathLike, *, mirror: bool = False, verify: bool = True
) -> ImagesSource:
    """Opens a finished set.

    Args:
      directory: Its directory.
      mirror: Batches show an image or its mirror image, drawn from the training step's key.
      verify: Compare all checksums, which reads the whole set. Without it only lengths of files are
        compared; a damaged record then raises when it is read.

    Returns:
      The source.

    Raises:
      ImagesError: If the set is unfinished, or a file is missing or differs from the manifest.
    """
    directory = Path(directory)
    manifest = _SET.open(directory)
    _SET.verify(directory, manifest["shards"], checksums=verify)
    return ImagesSource(directory, manifest, mirror)


def prepare_images(
    directory: str | os.PathLike,
    plan: ImagesPlan,
    read: Any,
    *,
    process_index: int = 0,
    process_count: int = 1,
) -> dict[str, Any] | None:
    """Writes a set; goes on with the first shard that is missing.

    Process `p` of `P` writes the shards `i` with `i % P == p`; processes need not know of each
    other but share the directory. Whichever finds all shards in place finalises the set.

    Args:
      directory: The set's directory; made if need be.
      plan: What it is going to hold.
      read: `indices -> (pixels uint8[H, W, C], label)` of each, in order.
      process_index: This process.
      process_count: Number of processes.

    Returns:
      The manifest if all shards are there, None if other processes still have some to write.

    Raises:
      ImagesError: If another preparation was begun in the directory, or shards are damaged.
    """
    _SET.start(directory, plan)
    for shard in _SET.missing(directory, plan):
        if shard % process_count == process_index:
            _SET.write(directory, plan, shard, _serialized(plan, read(plan.shard_range(shard))))
    return None if _SET.missing(directory, plan) else _SET.finalize(directory)


def mirrored(key: "jax.Array", x: "jax.Array") -> "jax.Array":
    """Images `x[B, H, W, C]`, or with equal chances their mirror images; jittable."""
    import jax
    import jax.numpy as jnp

    mirror = jax.random.bernoulli(key, shape=x.shape[:1])
    return jnp.where(mirror[:, None, None, None], x[:, :, ::-1], x)


def _scaled(pixels: np.ndarray) -> np.ndarray:
    return pixels.astype(np.float32) / np.float32(127.5) - np.float32(1)


def _serialized(plan: ImagesPlan, examples: Iterable[tuple[np.ndarray, int]]) -> Iterator[bytes]:
    for pixels, label in examples:
        if pixels.shape != plan.shape or pixels.dtype != np.uint8:
            raise ImagesError(
                f"an image is {pixels.dtype}{list(pixels.shape)}, expected uint8{list(plan.shape)}"
            )
        yield np.array(label, _LABEL).tobytes() + np.ascontiguousarray(pixels).tobytes()
