"""Lists of prompts: lines of text, JSON lines or Parquet, with the shape of each one's image.

Source: the lists of pi-Flow (arXiv 2510.14974, section 5.2) are Parquet files with a column
`prompt` and, where images differ in shape, `height` and `width`.
"""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

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
_KEYS = ("prompt", "aspect", "height", "width", "image")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt of a list.

    Attributes:
      text: The prompt.
      aspect: Width over height of its image.
      image: File of the image that it describes, as the list has it; empty if there is none.
    """

    text: str
    aspect: float = 1.0
    image: str = ""


def read_prompts(path: str | os.PathLike) -> list[Prompt]:
    """Reads a list.

    Args:
      path: A `.txt` file with a prompt on each line (empty ones are passed over); a `.jsonl` file
        of objects, or a `.parquet` file of rows, with `prompt` and perhaps `aspect` (such as
        "16:9", width first), or `height` and `width`, and `image`, a file relative to the list's
        folder.

    Returns:
      The prompts, in order.

    Raises:
      FileNotFoundError: There is no such file.
      ImportError: A Parquet file, and pyarrow is not installed.
      ValueError: The file is of another kind, has no prompts, or an entry is not one; the message
        says which.
    """
    path = Path(path)
    if path.suffix not in _FORMATS:
        raise ValueError(
            f"{path} is no list of prompts: its name must end in one of {_FORMATS}; a "
            ".txt file has a prompt on each line"
        )
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such list of prompts")
    entries = {".txt": _lines, ".jsonl": _json_lines, ".parquet": _rows}[path.suffix](path)
    prompts = [_prompt(path, number, entry) for number, entry in entries]
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
        digest.update(json.dumps(dataclasses.astuple(prompt)).encode() + b"\n")
    return digest.hexdigest()


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            yield number, {"prompt": line.strip()}


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if line.strip():
            try:
                entry = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
            yield number, entry


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(
            f"{path}: reading Parquet needs pyarrow, pip install 'piflow_jax[text]'"
        ) from error
    file = parquet.ParquetFile(path)
    columns = [name for name in _KEYS if name in file.schema_arrow.names]
    number = 0
    for batch in file.iter_batches(columns=columns):
        for row in batch.to_pylist():
            number += 1
            yield number, {key: value for key, value in row.items() if value is not None}


def _prompt(path: Path, number: int, entry: Any) -> Prompt:
    where = f"{path}, entry {number}"
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
        raise ValueError(f"{where} has no text under 'prompt'")
    image = entry.get("image", "")
    if not isinstance(image, str):
        raise ValueError(f"{where}: 'image' must name a file, got {image!r}")
    try:
        aspect = _aspect(entry)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{where}: 'aspect' must be like '16:9', or 'height' and 'width' positive numbers"
        ) from error
    return Prompt(entry["prompt"], aspect, image)


def _aspect(entry: dict[str, Any]) -> float:
    if "aspect" in entry:
        width, height = (float(part) for part in entry["aspect"].split(":"))
    elif "height" in entry or "width" in entry:
        width, height = float(entry.get("width", 0)), float(entry.get("height", 0))
    else:
        return 1.0
    if not (0 < width < math.inf and 0 < height < math.inf):
        raise ValueError(f"{width}:{height}")
    return width / height
