"""A field of the schema: its documentation and the values that it allows."""

import dataclasses
from typing import Any

_BOUNDS = ("low", "high", "above", "most", "choices", "may_be_empty", "distinct", "hub")


def config_field(default: Any = dataclasses.MISSING, doc: str = "", **bounds: Any) -> Any:
    """A field with its documentation and its allowed values, which `check_group` enforces.

    Bounds are `low`, `high`, `most` (all inclusive) and `above`. Values above `high` have no
    meaning, and values above `most` cannot be computed. `choices` lists all values. A tuple
    `may_be_empty`, or has `distinct` entries. `hub` are the folders of a pipeline that a key reads
    which also takes names on the Hugging Face hub.
    """
    if not bounds.keys() <= set(_BOUNDS):
        raise TypeError(f"bounds are {', '.join(_BOUNDS)}, got {', '.join(bounds)}")
    metadata = {"doc": doc} | dict.fromkeys(_BOUNDS) | bounds
    if dataclasses.is_dataclass(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)
