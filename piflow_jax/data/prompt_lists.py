"""Lists of prompts: lines of text, JSON lines or Parquet, with the shape of each one's image.

Source: the lists of pi-Flow (arXiv 2510.14974, section 5.2) are Parquet files with a column
`prompt` and, where images differ in shape, `height` and `width`.
"""

import dataclasses
import hashlib
import json
import math
import os
import reprlib
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from piflow_jax.buckets import is_file, located
from piflow_jax.data.parquet_rows import EmbeddedPicture, ParquetRows
from piflow_jax.data.pictures import PictureFile

__all__ = [
    "ASPECTS",
    "DOWNSAMPLING",
    "MULTIPLE",
    "Prompt",
    "bucket_size",
    "list_digest",
    "read_prompts",
]

# Width to height. A batch has one shape, so shapes are few: each prompt gets the nearest.
ASPECTS = ((1, 1), (5, 4), (4, 5), (4, 3), (3, 4), (3, 2), (2, 3), (16, 9), (9, 16), (2, 1), (1, 2))
# Pixels of an image along a side of a site of its latents, for both released autoencoders.
DOWNSAMPLING = 8
# Pixels along a side: patches have two sites.
MULTIPLE = 2 * DOWNSAMPLING

_FORMATS = (".txt", ".jsonl", ".parquet")
_KEYS = ("prompt", "aspect", "height", "width", "image", "references")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt of a list.

    Attributes:
      text: The prompt.
      aspect: Width over height of its image; None is that of its last reference.
      image: File of the image that it describes, as the list has it, or the image itself; empty if
        there is none.
      references: Files of the images that it edits, as the list has them.
    """

    text: str
    aspect: float | None = 1.0
    image: str | EmbeddedPicture = ""
    references: tuple[str, ...] = ()

    def picture(self, folder: str | os.PathLike) -> tuple[PictureFile, str]:
        """The image for `read_picture`, and its name; `folder` is what files are relative to."""
        if isinstance(self.image, EmbeddedPicture):
            return self.image.read(folder), f"{self.image}"
        path = os.path.join(folder, self.image)
        return path, path

    def reference_files(self, folder: str | os.PathLike) -> list[str]:
        """The reference images for `read_picture`; `folder` is what they are relative to."""
        return [os.path.join(folder, name) for name in self.references]


def read_prompts(path: str | os.PathLike) -> list[Prompt]:
    """Reads a list.

    Args:
      path: A `.txt` file with a prompt on each line (empty ones are passed over); a `.jsonl` file
        of objects, or a `.parquet` file of rows, with `prompt` and perhaps `aspect` (such as
        "16:9", width first), or `height` and `width`, and `image`: a file relative to the list's
        folder or, in Parquet, `{bytes, path}` as on the Hugging Face Hub. `references` is a file
        or a list of files, the images that a prompt edits; without a shape the result has that of
        the last of them. Text is UTF-8; lines end at a line feed, a carriage return or both, and
        at nothing else.

    Returns:
      The prompts, in order.

    Raises:
      FileNotFoundError: There is no such file.
      ImportError: A Parquet file, and pyarrow is not installed.
      ValueError: The file is of another kind, damaged, has no prompts, or an entry is not one; the
        message says which.
    """
    path = located(path)
    suffix = path.suffix.lower()
    if suffix not in _FORMATS:
        raise ValueError(
            f"{path} is no list of prompts: its name must end in one of {_FORMATS}; a "
            ".txt file has a prompt on each line"
        )
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such list of prompts")
    if not is_file(path):
        raise ValueError(f"{path} is no file")
    entries = {".txt": _plain_lines, ".jsonl": _json_lines, ".parquet": _rows}[suffix](path)
    prompts = [_prompt(where, entry) for where, entry in entries]
    if not prompts:
        raise ValueError(f"{path} has no prompts")
    return prompts


def bucket_size(aspect: float, side: int) -> tuple[int, int]:
    """Height and width of an image, in pixels.

    Args:
      aspect: Width over height; the nearest of `ASPECTS` is taken, by ratio.
      side: Side of a square image; others have about as many pixels.

    Returns:
      Multiples of `MULTIPLE`.
    """
    width, height = min(
        ASPECTS, key=lambda known: abs(math.log(known[0] / known[1]) - math.log(aspect))
    )
    scale = side / math.sqrt(width * height) / MULTIPLE
    return tuple(max(round(length * scale), 1) * MULTIPLE for length in (height, width))


def list_digest(prompts: Sequence[Prompt]) -> str:
    """Hash of a list's contents, the same whatever its format.

    Args:
      prompts: The prompts.

    Returns:
      SHA-256 in hexadecimal digits.
    """
    digest = hashlib.sha256()
    for prompt in prompts:
        image = prompt.image
        name = image if isinstance(image, str) else f"row {image.row} {image.path}"
        entry = (
            prompt.text,
            prompt.aspect,
            name,
            *([prompt.references] if prompt.references else []),
        )
        digest.update(json.dumps(entry).encode() + b"\n")
    return digest.hexdigest()


def _lines(path: epath.Path) -> Iterator[tuple[str, str]]:
    """Lines that are not empty, each with what messages call it."""
    # Unlike those of str, lines of bytes end at \n, \r\n and \r only.
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        where = f"{path}, line {number}"
        try:
            text = line.decode().removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{where} is not UTF-8 (byte {line[error.start]:#04x}); save the list as UTF-8"
            ) from error
        if text.strip():
            yield where, text


def _plain_lines(path: epath.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for where, line in _lines(path):
        yield where, {"prompt": line.strip()}


def _json_lines(path: epath.Path) -> Iterator[tuple[str, Any]]:
    for where, line in _lines(path):
        try:
            yield where, json.loads(line)
        except RecursionError as error:
            raise ValueError(f"{where}: it is nested too deeply") from error
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error


def _rows(path: epath.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    return iter(ParquetRows(path, _KEYS, picture="image"))


def _prompt(where: str, entry: Any) -> Prompt:
    if isinstance(entry, dict):
        entry = {key: value for key, value in entry.items() if value is not None}
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
        raise ValueError(f"{where} has no text under 'prompt'")
    text, image = entry["prompt"], entry.get("image", "")
    if not text.strip():
        raise ValueError(f"{where}: the prompt is empty")
    if "\0" in text:
        raise ValueError(f"{where}: the prompt has a NUL character; it may be UTF-16, not UTF-8")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: the prompt has half of a surrogate pair, {text[error.start]!a}"
        ) from error
    if not isinstance(image, str | EmbeddedPicture):
        raise ValueError(f"{where}: 'image' must name a file, got {reprlib.repr(image)}")
    references = entry.get("references", ())
    references = (references,) if isinstance(references, str) else references
    if not isinstance(references, list | tuple) or not all(
        isinstance(name, str) and name for name in references
    ):
        raise ValueError(
            f"{where}: 'references' must name files, as ['first.png', 'second.png'], got "
            f"{reprlib.repr(references)}"
        )
    try:
        aspect = _aspect(entry)
    except (AttributeError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(
            f"{where}: 'aspect' must be like '16:9', or 'height' and 'width' positive numbers"
        ) from error
    shaped = entry.keys() & {"aspect", "height", "width"}
    aspect = aspect if shaped or not references else None
    return Prompt(text, aspect, image, tuple(references))


def _aspect(entry: dict[str, Any]) -> float:
    if "aspect" in entry:
        width, height = (float(part) for part in entry["aspect"].split(":"))
    elif "height" in entry or "width" in entry:
        sides = entry.get("width", 0), entry.get("height", 0)
        if any(isinstance(side, bool) for side in sides):
            raise TypeError(f"{sides}")
        width, height = map(float, sides)
    else:
        return 1.0
    if not (0 < width < math.inf and 0 < height < math.inf and 0 < width / height < math.inf):
        raise ValueError(f"{width}:{height}")
    return width / height
