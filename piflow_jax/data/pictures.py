"""The one reader of pictures: whatever Pillow opens, as upright pixels of 8 bits.

Colours are read as they are stored; embedded colour profiles are not applied. Of an animation, or a
file of several pages, the first picture is read.
"""

import contextlib
import errno
import io
import os
import stat
from collections.abc import Iterator
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np

from piflow_jax.buckets import is_remote, located

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "NoPicturesError",
    "PictureError",
    "PictureFile",
    "PicturesError",
    "grey",
    "is_hidden",
    "is_picture",
    "picture_sizes",
    "read_picture",
]

PictureFile = str | os.PathLike | bytes

_SUFFIXES = {
    *(".apng", ".avif", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
    *(".jpx", ".mpo", ".pbm", ".pcx", ".pgm", ".png", ".pnm", ".ppm", ".qoi", ".tga", ".tif"),
    *(".tiff", ".webp"),
}
# What can be wrong with one file. Other errors of the system (a lost disk, too many open files) are
# not the picture's: it must not be left out for them.
_OF_THE_FILE = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG),
)
# Formats whose 16 bits Pillow may hold in its mode of 32.
_SIXTEEN = ("PNG", "PPM")
# TIFF's PhotometricInterpretation, of which 0 is WhiteIsZero.
_PHOTOMETRIC = 262
# From how a picture is stored to upright, by its EXIF orientation (EXIF 2.32, section 4.6.4).
_ORIENTATION = 274
_UPRIGHT = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: np.rot90(pixels),
}
_SIDEWAYS = (5, 6, 7, 8)


class PicturesError(ValueError):
    """Pictures cannot be used; the message names their place."""


class NoPicturesError(PicturesError):
    """A folder has no pictures at all."""


class PictureError(PicturesError):
    """One picture cannot be read; what it is called and why are attributes too.

    Args:
      name: The picture as messages call it: its path, or its place in an archive.
      reason: What is wrong with it.
    """

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:  # noqa: D105
        return f"{self.name} is not a readable image: {self.reason}"


def is_hidden(name: str) -> bool:
    """Whether a file, or a folder around it, is none of the user's own.

    Such are the copies that Jupyter keeps in `.ipynb_checkpoints`, and the files `._*` that macOS
    puts beside others on foreign disks and into tar files.

    Args:
      name: The file's name, or its path in an archive.

    Returns:
      True if a part of it begins with a dot.
    """
    return any(part.startswith(".") and part != ".." for part in PurePath(name).parts)


def is_picture(name: str) -> bool:
    """Whether a file's name is one of a picture.

    Args:
      name: The file's name, or its path in an archive.

    Returns:
      True for the usual endings of formats that Pillow reads, in lower or upper case, unless it is
      hidden.
    """
    return PurePath(name).suffix.lower() in _SUFFIXES and not is_hidden(name)


def read_picture(
    file: PictureFile, name: str = "", mode: Literal["RGB", "L"] = "RGB"
) -> np.ndarray:
    """Reads a picture, upright and with 8 bits.

    Its EXIF orientation is applied. What is transparent is laid on white. Of 16 bits the upper 8
    are taken. Floating-point values in [0, 1] are scaled to 255. Other floating-point values, and
    integers of 32 bits, are taken as they are if they are 8-bit values; if not, they are refused,
    since nothing says which value is white.

    Args:
      file: The picture's path, or its encoded bytes.
      name: What messages call it; by default the path.
      mode: `RGB`, or `L` for grey (ITU-R 601-2 luma of colours).

    Returns:
      uint8[H, W, 3], or uint8[H, W, 1] for `L`.

    Raises:
      PictureError: It is missing, no file, no picture, damaged, larger than Pillow's limit
        (`PIL.Image.MAX_IMAGE_PIXELS`), or has no known white.
      OSError: The system failed to read it.
    """
    with _opened(file, name) as picture:
        raw = _raw_mode(picture)  # Pillow forgets it when the picture is loaded
        picture.load()
        pixels = _on_white(picture, raw)
        # Pillow turns TIFF files itself when it loads them, and removes their orientation.
        orientation = _orientation(picture)
        if orientation in _UPRIGHT:
            pixels = _UPRIGHT[orientation](pixels)
        pixels = np.ascontiguousarray(pixels)
        return grey(pixels) if mode == "L" else pixels


def grey(pixels: np.ndarray) -> np.ndarray:
    """The brightness of colours.

    Args:
      pixels: uint8[H, W, 3].

    Returns:
      uint8[H, W, 1].
    """
    from PIL import Image

    return np.asarray(Image.fromarray(pixels).convert("L"))[..., None]


def picture_sizes(file: PictureFile, name: str = "") -> tuple[tuple[int, int], tuple[int, int]]:
    """Sizes of a picture as it is stored and as it is seen; decodes its header only.

    Args:
      file: The picture's path, or its encoded bytes.
      name: What messages call it; by default the path.

    Returns:
      `(height, width)` before its EXIF orientation is applied, and after.

    Raises:
      PictureError: It cannot be opened.
      OSError: The system failed to read it.
    """
    with _opened(file, name) as picture:
        size = picture.size[::-1]  # Pillow's sizes have the width first
        if _orientation(picture) not in _SIDEWAYS:
            return size, size
        # Pillow gives the upright size of a TIFF file, and the stored one of all others.
        return (size[::-1], size) if picture.format == "TIFF" else (size, size[::-1])


@contextlib.contextmanager
def _opened(file: PictureFile, name: str) -> Iterator["Image.Image"]:
    """A picture opened by Pillow; whatever goes wrong with it is a `PictureError`."""
    from PIL import Image, UnidentifiedImageError

    if isinstance(file, bytes):
        content = io.BytesIO(file)
    else:
        name = name or os.fspath(file)
        content = _open_file(file, name)
    with content:
        try:
            with Image.open(content) as picture:
                yield picture
        except UnidentifiedImageError as error:  # its own message is the address of a buffer
            empty = not content.seek(0, os.SEEK_END)
            reason = "it is empty" if empty else "its format is none that Pillow reads"
            raise PictureError(name, reason) from error
        # Pillow's plugins raise whatever they run into in a damaged file: OSError, SyntaxError,
        # struct.error, IndexError, zlib.error and others.
        except Exception as error:
            if isinstance(error, MemoryError) or _of_the_machine(error):
                raise
            reason = " ".join(f"{error}".split()) or type(error).__name__
            raise PictureError(name, reason) from error


def _open_file(file: str | os.PathLike, name: str) -> BinaryIO:
    if is_remote(file):
        try:
            return io.BytesIO(located(file).read_bytes())
        except (FileNotFoundError, IsADirectoryError) as error:
            raise PictureError(name, "there is no such object") from error
    try:
        if stat.S_ISREG(os.stat(file).st_mode):  # opening a pipe might never end
            return open(file, "rb")
    except OSError as error:
        if _of_the_machine(error):
            raise
        dangling = error.errno == errno.ENOENT and os.path.islink(file)
        reason = f"it is a link to {os.readlink(file)}, which is not there" if dangling else ""
        raise PictureError(name, reason or error.strerror) from error
    except ValueError as error:  # NUL, or what no file system encodes
        raise PictureError(name, "no file can have this name") from error
    raise PictureError(name, "it is a folder" if os.path.isdir(file) else "it is no file")


def _of_the_machine(error: Exception) -> bool:
    """Whether the system failed; Pillow's own errors have no number."""
    return isinstance(error, OSError) and error.errno not in (None, *_OF_THE_FILE)


def _raw_mode(picture: "Image.Image") -> str:
    """How the file stores values, in Pillow's words; empty if Pillow does not say."""
    tiles = getattr(picture, "tile", None)
    arguments = tiles[0][3] if tiles else ""
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _orientation(picture: "Image.Image") -> Any:
    try:
        return picture.getexif().get(_ORIENTATION)
    except Exception:  # damaged tags, of as many kinds as damaged pictures: seen as it is stored
        return None


def _on_white(picture: "Image.Image", raw: str) -> np.ndarray:
    """Colours uint8[H, W, 3] of a loaded picture, not turned."""
    key = picture.info.get("transparency")
    if picture.mode.startswith(("I", "F")):
        values = np.asarray(picture)[..., None]
        pixels = np.repeat(_eight_bits(picture, values, raw), 3, axis=-1)
    elif picture.mode in ("1", "L", "RGB"):
        values = pixels = np.asarray(picture.convert("RGB"))
    elif picture.has_transparency_data:
        whole = picture.convert("LA") if picture.mode == "La" else picture
        values = np.asarray(whole.convert("RGBA")).astype(np.uint16)
        alpha = values[..., 3:]
        return ((values[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    else:
        return np.asarray(picture.convert("RGB"))
    if key is not None:  # one value, or colour, is transparent
        transparent = (values == _key(key, raw)).all(axis=-1, keepdims=True)
        pixels = np.where(transparent, np.uint8(255), pixels)
    return pixels


def _key(key: Any, raw: str) -> Any:
    """The value of PNG that is transparent, as Pillow's pixels have it."""
    if raw == "RGB;16B":
        return np.asarray(key) >> 8
    if raw in ("1", "L;2", "L;4"):
        return key * 255 // (2 ** int(raw[-1]) - 1)
    return key


def _eight_bits(picture: "Image.Image", values: np.ndarray, raw: str) -> np.ndarray:
    """Grey, uint8, of values with more than 8 bits."""
    lowest, highest = values.min(), values.max()
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in _SIXTEEN):
        grey = values >> (4 if raw == "I;12" else 8)
    elif picture.mode == "F" and lowest >= 0 and highest <= 1:
        grey = np.floor(values * np.float64(255) + 0.5)
    elif lowest >= 0 and highest <= 255 and (values == np.floor(values)).all():
        grey = values
    else:
        kind = "floating-point values" if picture.mode == "F" else "integers of 32 bits"
        raise ValueError(
            f"it has {kind} from {lowest:g} to {highest:g}, and nothing says which is white; save "
            "it with 8 or 16 bits, or with values in [0, 1]"
        )
    inverted = getattr(picture, "tag_v2", {}).get(_PHOTOMETRIC) == 0
    return (255 - grey if inverted else grey).astype(np.uint8)
