"""Sets of pictures made from prompts, and their features, computed only once.

A set is a folder of PNG files or an `.npz` file. The name of a PNG file gives the prompt's place in
its list and the seed, `<place>-<seed>.png` or `<place>.png`. An `.npz` file has `images`, and
optionally `place` and `seed`. Features are kept in chunks next to the report. An evaluation that
was killed continues, and an evaluation of another student does not read the teacher's pictures
again.
"""

import functools
import hashlib
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from etils import epath

from piflow_jax.buckets import is_file, is_remote, located
from piflow_jax.data.pictures import PictureError, read_picture
from piflow_jax.evaluation.kept import read_kept
from piflow_jax.whole_files import reading, replacing, visible

__all__ = ["ImageSet", "cached_features", "centre_patch", "open_images", "resized"]

# Side of Inception's input.
PATCH = 299

_NAME = re.compile(r"([0-9]{1,18})(?:-([0-9]{1,18}))?\.png")  # 64-bit numbers
_CHUNK = 64
# Part of the cache key: features depend on how pictures are read.
_READING = "upright, 8 bits, on white"


class ImageSet:
    """Pictures by number, ordered by prompt and then by seed; made by `open_images`.

    Attributes:
      places: int[N], the place of each picture's prompt in the list.
      seeds: int[N], the seed of each picture.
    """

    def __init__(
        self,
        places: np.ndarray,
        seeds: np.ndarray,
        read: Callable[[int], np.ndarray],
        fingerprint: Callable[[int], str],
    ):
        order = np.lexsort((seeds, places))
        self.places, self.seeds = places[order], seeds[order]
        self._order, self._read, self._fingerprint = order, read, fingerprint

    def __len__(self) -> int:
        """Returns the number of pictures."""
        return len(self.places)

    def __getitem__(self, number: int) -> np.ndarray:
        """Returns one picture, uint8[H, W, 3]; reads it anew each time."""
        return self._read(self._order[number])

    def digest(self, numbers: range) -> str:
        """Hash of the files of the pictures `numbers`: their names, lengths and times."""
        parts = [_READING, *(self._fingerprint(self._order[number]) for number in numbers)]
        return hashlib.sha256("\n".join(parts).encode(errors="surrogateescape")).hexdigest()


def open_images(path: str | os.PathLike) -> ImageSet:
    """Opens a set.

    Args:
      path: A folder of PNG files, or an `.npz` file with `images: uint8[N, H, W, 3]` and optionally
        `place: int[N]` (by default 0, 1, ...) and `seed: int[N]` (by default 0).

    Returns:
      The set.

    Raises:
      FileNotFoundError: There is no such file or folder.
      ValueError: It has no pictures, a file's name is not like `12-0.png`, arrays have other shapes
        or dtypes, or two pictures have the same place and seed. An unreadable picture raises a
        `PictureError` when it is read.
    """
    path = located(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: there are no such pictures")
    images = _open_folder(path) if path.is_dir() else _open_archive(path)
    pairs = np.stack([images.places, images.seeds], axis=1)
    if not len(images):
        raise ValueError(f"{path} has no pictures")
    if len(np.unique(pairs, axis=0)) != len(images):
        raise ValueError(f"{path} has several pictures of one prompt with the same seed")
    return images


def _open_folder(path: epath.Path) -> ImageSet:
    files = [file for file in visible(path) if file.name.endswith(".png")]
    matches = [_NAME.fullmatch(file.name) for file in files]
    for file, match in zip(files, matches, strict=True):
        if match is None:
            raise ValueError(f"{file} is not named <place>-<seed>.png or <place>.png")

    def read(i):
        return read_picture(files[i])

    def fingerprint(i):
        try:
            return _state(files[i])
        except OSError as error:  # a dangling link
            raise PictureError(f"{files[i]}", error.strerror) from error

    places = np.array([int(match[1]) for match in matches], int)
    seeds = np.array([int(match[2] or 0) for match in matches], int)
    return ImageSet(places, seeds, read, fingerprint)


def _state(path: epath.Path) -> str:
    """Name, length and time of a file; of an object the time is in seconds."""
    if is_remote(path):
        status = path.stat()
        return f"{path.name} {status.length} {status.mtime}"
    status = os.stat(path)
    return f"{path.name} {status.st_size} {status.st_mtime_ns}"


def _open_archive(path: epath.Path) -> ImageSet:
    if not is_file(path):
        raise ValueError(f"{path} is no folder of PNG files and no .npz file")
    with reading(path) as here:
        if not zipfile.is_zipfile(here):
            raise ValueError(f"{path} is no folder of PNG files and no .npz file")
        try:
            with np.load(here, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
        # A damaged file makes zipfile, zlib and NumPy raise errors of any kind.
        except Exception as error:
            raise ValueError(f"{path} is a damaged .npz file: {error!r}") from error
    images = arrays.get("images")
    fits = images is not None and images.dtype == np.uint8 and images.ndim == 4
    if not fits or images.shape[-1] != 3 or 0 in images.shape[1:]:
        raise ValueError(f"{path} needs `images`: uint8[N, H, W, 3]")
    places = arrays.get("place", np.arange(len(images)))
    seeds = arrays.get("seed", np.zeros(len(images), int))
    for name, numbers in (("place", places), ("seed", seeds)):
        if numbers.shape != (len(images),) or not np.issubdtype(numbers.dtype, np.integer):
            raise ValueError(f"{path}: `{name}` must be {len(images)} integers")
        if numbers.min(initial=0) < 0:
            raise ValueError(f"{path}: `{name}` must not be negative")
    fingerprint = _state(path)
    return ImageSet(places, seeds, images.__getitem__, lambda i: f"{fingerprint} {i}")


def resized(image: np.ndarray) -> np.ndarray:
    """Resizes a picture to Inception's input size with Pillow's antialiased bicubic filter.

    Args:
      image: uint8[H, W, 3].

    Returns:
      uint8[299, 299, 3].
    """
    from PIL import Image

    picture = Image.fromarray(image).resize((PATCH, PATCH), Image.Resampling.BICUBIC)
    return np.asarray(picture)


def centre_patch(image: np.ndarray) -> np.ndarray:
    """Cuts the centre of a picture in Inception's input size, without scaling.

    Args:
      image: uint8[H, W, 3].

    Returns:
      uint8[299, 299, 3].

    Raises:
      ValueError: If the picture is smaller than that.
    """
    height, width = image.shape[:2]
    if min(height, width) < PATCH:
        raise ValueError(f"a patch of {PATCH} pixels does not fit into {height}x{width}")
    top, left = (height - PATCH) // 2, (width - PATCH) // 2
    return image[top : top + PATCH, left : left + PATCH]


def cached_features(
    images: ImageSet,
    extract: Callable[[list[np.ndarray]], np.ndarray],
    directory: str | os.PathLike,
    key: str,
    on_progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Features of all pictures of a set, read from the cache as far as possible.

    Args:
      images: The pictures.
      extract: Maps a list of B pictures to features `[B, D]`.
      directory: Directory for the chunks; created if missing.
      key: Identity of the features: network, its weights and the preprocessing of pictures.
      on_progress: Called after each chunk with the number of finished pictures and the total.

    Returns:
      float32[N, D].

    Raises:
      KeptFileError: A cached chunk is damaged.
    """
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    chunks = []
    for start in range(0, len(images), _CHUNK):
        numbers = range(start, min(start + _CHUNK, len(images)))
        name = hashlib.sha256(f"{key}\n{images.digest(numbers)}".encode()).hexdigest()
        path = directory / f"{name[:32]}.npy"
        if not path.exists():
            features = np.asarray(extract([images[number] for number in numbers]), np.float32)
            with replacing(path) as under_way:
                np.save(under_way, features)
        chunks.append(read_kept(path, functools.partial(_read_chunk, count=len(numbers))))
        if on_progress is not None:
            on_progress(numbers.stop, len(images))
    return np.concatenate(chunks)


def _read_chunk(path: Path, count: int) -> np.ndarray:
    features = np.load(path)
    if features.ndim != 2 or len(features) != count or not np.isfinite(features).all():
        raise ValueError(f"it does not hold the features of {count} pictures")
    return features
