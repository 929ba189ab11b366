"""Files that are there as a whole or not at all, on a disk and in a bucket."""

import contextlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

from piflow_jax.buckets import is_remote

_PIECE = 2**24  # bytes of a file that are copied at a time


@contextlib.contextmanager
def replacing(path: Path, under_way: Path | None = None) -> Iterator[Path]:
    """A local path to write to, which takes the place of another when the block ends without error.

    Args:
      path: The file; one that is there is replaced in one move. It stays if the block removes what
        it wrote.
      under_way: Where to write on a disk, a name that no other writer has; by default a hidden one
        in the same folder.

    Yields:
      That path; for a file in a bucket one in a temporary folder.

    Raises:
      FileNotFoundError: the folder of `path` is not there.
      IsADirectoryError: `path` is a folder on a disk.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory(prefix="piflow_jax_") as folder:
            here = epath.Path(folder) / path.name
            yield here
            if here.exists():
                copy_file(here, path)
        return
    if path.is_dir():
        raise IsADirectoryError(
            f"cannot write {path}: it is a folder; move it away, or choose another place"
        )
    if not path.parent.is_dir():  # else the error would name the hidden file
        raise FileNotFoundError(
            f"cannot write {path}: there is no folder {path.parent}; make it, or choose another "
            "place"
        )
    if under_way is None:
        under_way = path.with_name(f".{path.stem}.{uuid.uuid4().hex}{path.suffix}")
    try:
        yield under_way
        if under_way.exists():
            with open(under_way, "rb+") as file:
                os.fsync(file.fileno())
            under_way.replace(path)
    finally:
        under_way.unlink(missing_ok=True)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[Path]:
    """A local path at which a file can be read: its own, or that of a copy for the block.

    Args:
      path: The file, on a disk or in a bucket.

    Yields:
      The path.
    """
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="piflow_jax_") as folder:
        here = epath.Path(folder) / path.name
        copy_file(path, here)
        yield here


def visible(folder: Path) -> list[Path]:
    """What lies in a folder, by name, without hidden entries.

    Those are files that `replacing` had under way when it was killed, or what macOS puts beside
    files. No pattern is matched: in one, brackets in the folder's own path would have a meaning.

    Args:
      folder: The folder, on a disk or in a bucket; one that is not there has nothing in it.

    Returns:
      The paths.
    """
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except FileNotFoundError:
        return []


def copy_file(source: Path, target: Path) -> None:
    """Copies a file to or from a bucket, where it is there as a whole or not at all."""
    with source.open("rb") as read, target.open("wb") as written:
        shutil.copyfileobj(read, written, _PIECE)


def write_json(path: Path, values: Any) -> None:
    """Writes values as JSON to `path`, as a whole or not at all."""
    with replacing(path) as under_way:
        under_way.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
