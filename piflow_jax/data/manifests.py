"""JSON files of cached sets, read back as what they must be."""

import dataclasses
import json
import math
import reprlib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from piflow_jax.arguments import prefixed

__all__ = ["check_digest", "check_entries", "read_json", "read_record"]


def check_digest(path: Path, digest: str, expected: str, error: type[ValueError]) -> None:
    """Checks that a shard has the contents that were written.

    Args:
      path: The shard, for the message.
      digest: The SHA-256 of its bytes, in hexadecimal digits.
      expected: That of the manifest.
      error: What to raise.

    Raises:
      error: They differ; the message has the path.
    """
    if digest != expected:
        raise error(
            f"{path} differs from what was written: its SHA-256 is {digest}, expected {expected}; "
            "remove it and prepare again"
        )


def read_json(path: Path, error: type[ValueError]) -> dict[str, Any]:
    """Reads a JSON file.

    Args:
      path: The file.
      error: What to raise.

    Returns:
      Its object.

    Raises:
      error: It is damaged, or has no object in it; the message has its path.
    """
    with prefixed(f"{path} is damaged", (OSError, RecursionError, ValueError), error):
        content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise error(f"{path} is damaged: it has no object in it, {reprlib.repr(content)}")
    return content


def read_record(cls: type, values: Mapping[str, Any], path: Path, error: type[ValueError]) -> Any:
    """The instance of a dataclass that values from a JSON file make.

    Args:
      cls: The dataclass.
      values: Its fields by name, as JSON has them; what it has no field of is passed over.
      path: The file, for messages.
      error: What to raise.

    Returns:
      The instance, with tuples for lists.

    Raises:
      error: A field is missing, or is of another type or out of range; the message has the path.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    known = {name: values[name] for name in fields if name in values}
    check_entries(known, {name: fields[name] for name in known}, path, error)
    with prefixed(f"{path} is damaged", (TypeError, ValueError), error):
        return cls(**{name: _tuples(value) for name, value in known.items()})


def check_entries(
    values: Any, hints: Mapping[str, Any], path: Path, error: type[ValueError]
) -> None:
    """Checks an object of a JSON file.

    Args:
      values: The object.
      hints: Type of each of its entries; tuples stand for lists.
      path: The file, for messages.
      error: What to raise.

    Raises:
      error: It is no object, or an entry is missing or of another type; the message has the path.
    """
    if not isinstance(values, dict):
        raise error(f"{path} is damaged: {reprlib.repr(values)} is no object")
    for name, hint in hints.items():
        if not _fits(values.get(name), hint):
            raise error(f"{path} is damaged: {name} cannot be {reprlib.repr(values.get(name))}")


def _fits(value: Any, hint: Any) -> bool:
    arguments = typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        return any(_fits(value, arm) for arm in arguments)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):  # a default is a tuple
            return False
        inner = arguments[:1] * len(value) if arguments[-1] is ... else arguments
        return len(value) == len(inner) and all(map(_fits, value, inner))
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool
    if hint is float:
        return isinstance(value, int | float) and abs(value) < math.inf
    return isinstance(value, hint)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
