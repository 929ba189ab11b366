"""Pixels of any image set, decoded once: square crops of one size, with their classes.

A set is a `ShardedSet` (see `piflow_jax.data.shards`) whose manifest, `images.json`, says which
images, their size, channels and the names of their classes. A record is a label, int32, and then
the pixels, uint8[H, W, C]. A set that fits is read into memory; a larger one is read from its disk.
"""

import concurrent.futures
import dataclasses
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from piflow_jax.buckets import located
from piflow_jax.data.picture_sets import PictureSet, center_crop
from piflow_jax.data.pictures import PictureError, grey
from piflow_jax.data.plans import Plan
from piflow_jax.data.records import Records
from piflow_jax.data.shards import ShardedSet, ShardsError

__all__ = [
    "ImagesError",
    "ImagesPlan",
    "ImagesSource",
    "load_images_source",
    "plan_images",
    "prepare_images",
    "prepared_images",
]

# A set of at most so many bytes of pixels is kept in memory.
_IN_MEMORY = 2**30
_READ_AT_ONCE = 1024  # records
_LABEL = np.dtype("<i4")
# A shard has at most so many images and bytes of pixels: what a kill loses.
_SHARD_IMAGES, _SHARD_BYTES = 8192, 2**28
_LOOKED_AT = 64  # pictures, of which none has colours in a grey set
_READ_THREADS = 16
_READ_AHEAD = 64  # crops that wait to be written


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


IMAGES = ShardedSet(
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

    def __init__(
        self,
        directory: epath.Path,
        manifest: dict[str, Any],
        mirror: bool,
        cache_gib: float = math.inf,
    ):
        self.name = "images"
        self.shape = (manifest["image_size"], manifest["image_size"], manifest["channels"])
        self.class_names = tuple(manifest["class_names"])
        self.num_classes = len(self.class_names)
        self.manifest = manifest
        if mirror:
            self.draw = mirrored
        shards = manifest["shards"]
        self._records = Records(directory, shards, self._parsed, ImagesError, cache_gib)
        self.stage = self._records.stage
        if len(self) * int(np.prod(self.shape)) <= _IN_MEMORY:
            self._pixels, self._labels = self._read_all()
            self.gather = self._gathered

    def __len__(self) -> int:
        """Returns the number of images."""
        return self.manifest["num_examples"]

    def __getitem__(self, index: SupportsIndex) -> dict[str, np.ndarray]:
        """Returns one example, `0 <= index < len(self)`."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[SupportsIndex]) -> list[dict[str, np.ndarray]]:
        """Returns several examples, read at once."""
        records = self._records.__getitems__(indices)
        return [
            {"x": _scaled(pixels), "condition": np.asarray(label, np.int32)}
            for pixels, label in records
        ]

    def _gathered(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return {"x": _scaled(self._pixels[indices]), "condition": self._labels[indices]}

    def _read_all(self) -> tuple[np.ndarray, np.ndarray]:
        """Pixels uint8[N, H, W, C] and labels int32[N]."""
        self.stage()
        pixels = np.empty((len(self), *self.shape), np.uint8)
        labels = np.empty(len(self), np.int32)
        for start in range(0, len(self), _READ_AT_ONCE):
            rows = range(len(self))[start : start + _READ_AT_ONCE]
            for row, record in zip(rows, self._records.__getitems__(rows), strict=True):
                pixels[row], labels[row] = record
        return pixels, labels

    def _parsed(self, record: bytes) -> tuple[np.ndarray, int]:
        label = int(np.frombuffer(record, _LABEL, 1)[0])
        if not 0 <= label < self.num_classes:
            raise ValueError(f"its class is {label} of {self.num_classes}")
        return np.frombuffer(record, np.uint8, offset=_LABEL.itemsize).reshape(self.shape), label


def load_images_source(
    directory: str | os.PathLike,
    *,
    mirror: bool = False,
    verify: bool = True,
    cache_gib: float = math.inf,
) -> ImagesSource:
    """Opens a finished set.

    Args:
      directory: Its directory.
      mirror: Batches show an image or its mirror image, drawn from the training step's key.
      verify: Compare all checksums, which reads the whole set. Without it only lengths of files are
        compared; a damaged record then raises when it is read.
      cache_gib: Most GiB of the copies that a process makes of a set in a bucket.

    Returns:
      The source.

    Raises:
      ImagesError: If the set is unfinished, or a file is missing or differs from the manifest.
    """
    manifest = IMAGES.open(directory)
    IMAGES.verify(directory, manifest["shards"], checksums=verify)
    return ImagesSource(located(directory), manifest, mirror, cache_gib)


def plan_images(pictures: PictureSet, image_size: int, channels: int = 0) -> ImagesPlan:
    """What a set of pictures is going to be.

    Args:
      pictures: What it is made of.
      image_size: Side of the square crops.
      channels: 1 (grey) or 3 (RGB); 0 is 1 if none of up to 64 pictures, spread over the set, has
        colours.

    Returns:
      The plan.
    """
    size = _SHARD_BYTES // (image_size**2 * (channels or 3))
    return ImagesPlan(
        num_examples=len(pictures),
        shard_size=min(max(size, 1), _SHARD_IMAGES),
        source=pictures.description,
        class_names=pictures.class_names,
        image_size=image_size,
        channels=channels or (3 if _has_colours(pictures) else 1),
    )


def prepared_images(directory: str | os.PathLike) -> ImagesPlan | None:
    """What a finished set is; None if there is none, or its preparation has not finished.

    Args:
      directory: The set's directory.

    Returns:
      Its plan, without the pictures that were left out.

    Raises:
      ImagesError: If its manifest is damaged.
    """
    if not (located(directory) / IMAGES.manifest).exists():
        return None
    manifest = IMAGES.open(directory)
    fields = {field.name for field in dataclasses.fields(ImagesPlan)}
    return ImagesPlan(**{name: manifest[name] for name in fields})


def prepare_images(
    directory: str | os.PathLike,
    plan: ImagesPlan,
    pictures: PictureSet,
    **how: Any,
) -> dict[str, Any] | None:
    """Writes a set, each picture's `center_crop`, see `ShardedSet.prepare`.

    Pictures are decoded by threads, a few ahead of what is written.

    Args:
      directory: The set's directory; made if need be.
      plan: What it is going to hold, see `plan_images`.
      pictures: Of what it is made.
      **how: `process_index`, `process_count`, `on_progress` and `skip_refused` of
        `ShardedSet.prepare`.

    Returns:
      The manifest if all shards are there, None if other processes still have some to write.

    Raises:
      ImagesError: If another preparation was begun in the directory, or shards are damaged.
      RefusedError: If pictures cannot be read and are not left out; when all shards without such
        pictures are written.
    """
    with concurrent.futures.ThreadPoolExecutor(_READ_THREADS) as pool:
        return IMAGES.prepare(
            directory,
            plan,
            lambda shard: _records(pictures, plan, plan.shard_range(shard), pool),
            **how,
        )


def mirrored(key: jax.Array, x: jax.Array) -> jax.Array:
    """Images `x[B, H, W, C]`, or with equal chances their mirror images; jittable."""
    mirror = jax.random.bernoulli(key, shape=x.shape[:1])
    return jnp.where(mirror[:, None, None, None], x[:, :, ::-1], x)


def _scaled(pixels: np.ndarray) -> np.ndarray:
    return pixels.astype(np.float32) / np.float32(127.5) - np.float32(1)


def _records(
    pictures: PictureSet, plan: ImagesPlan, indices: range, pool: concurrent.futures.Executor
) -> Iterator[bytes | PictureError]:
    """Records of one shard, or why a picture cannot be read."""

    def read(index):
        try:
            picture = pictures[index]
        except PictureError as error:
            return error
        pixels = _cropped(picture.image, plan.image_size, plan.channels)
        return np.array(picture.label, _LABEL).tobytes() + pixels.tobytes()

    for start in range(0, len(indices), _READ_AHEAD):
        yield from pool.map(read, indices[start : start + _READ_AHEAD])


def _cropped(image: np.ndarray, size: int, channels: int) -> np.ndarray:
    """The crop uint8[size, size, channels] of an image uint8[H, W, 3]."""
    pixels = center_crop(image, size)
    return grey(pixels) if channels == 1 else pixels


def _has_colours(pictures: PictureSet) -> bool:
    for index in np.unique(np.linspace(0, len(pictures) - 1, _LOOKED_AT).astype(int)):
        try:
            image = pictures[int(index)].image
        except PictureError:  # refused when its turn comes
            continue
        if (image != image[..., :1]).any():
            return True
    return False
