"""Files that are there as a whole or not at all."""

import contextlib
import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["replacing", "write_json"]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of another when the block ends without an error.

    Args:
      path: The file; one that is there is replaced in one move.

    Yields:
      A hidden path in the same folder, of a name that no other writer has.
    """
    under_way = path.with_name(f".{path.stem}.{uuid.uuid4().hex}{path.suffix}")
    try:
        yield under_way
        under_way.replace(path)
    finally:
        under_way.unlink(missing_ok=True)


def write_json(path: Path, values: Any) -> None:
    """Writes values as JSON to `path`, as a whole or not at all."""
    with replacing(path) as under_way:
        under_way.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
