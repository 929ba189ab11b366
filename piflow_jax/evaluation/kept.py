"""Files that a run keeps for its next start, read back whole or reported as damaged."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from etils import epath

from piflow_jax.whole_files import reading

__all__ = ["KeptFileError", "read_kept", "read_kept_json"]

T = TypeVar("T")
_REMEDY = "delete it to have it made anew"


class KeptFileError(Exception):
    """A file that a run keeps is damaged; the message names it."""


def read_kept(path: str | os.PathLike, read: Callable[[Path], T], remedy: str = _REMEDY) -> T:
    """Reads a file from an earlier start.

    Args:
      path: The file.
      read: Reads and checks the whole file; for a file in a bucket it gets a copy. Its errors mean
        damage, unless the system or the memory failed.
      remedy: The remedy in the message; for files that others depend on.

    Returns:
      The result of `read`.

    Raises:
      KeptFileError: The file is damaged.
    """
    try:
        with reading(epath.Path(path)) as here:
            return read(here)
    except (OSError, MemoryError):
        raise
    # A damaged file makes zipfile, zlib, json and NumPy raise errors of any kind.
    except Exception as error:
        raise KeptFileError(f"{path} is damaged ({error!r}); {remedy}") from error


def read_kept_json(path: str | os.PathLike, kind: type[T], remedy: str = _REMEDY) -> T:
    """Reads a JSON file from an earlier start.

    Args:
      path: The file.
      kind: `dict`, or `list` for a list of objects.
      remedy: See `read_kept`.

    Returns:
      Its contents.

    Raises:
      KeptFileError: See `read_kept`.
    """

    def read(path: Path) -> Any:
        content = json.loads(path.read_text(encoding="utf-8"))
        objects = content if kind is list else [content]
        if not isinstance(content, kind) or not all(isinstance(one, dict) for one in objects):
            raise ValueError(f"it holds a {type(content).__name__}")
        return content

    return read_kept(path, read, remedy)
