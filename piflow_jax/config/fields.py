"""A field of the schema: its documentation and the values that it allows."""

import dataclasses
from typing import Any


def config_field(
    default: Any,
    doc: str,
    *,
    low=None,
    high=None,
    above=None,
    most=None,
    choices=None,
    may_be_empty=False,
    distinct=False,
):
    """A config field with its documentation and its allowed values (bounds are inclusive).

    Values above `high` have no meaning, and values above `most` cannot be computed.
    """
    metadata = dict(
        doc=doc,
        low=low,
        high=high,
        above=above,
        most=most,
        choices=choices,
        may_be_empty=may_be_empty,
        distinct=distinct,
    )
    if dataclasses.is_dataclass(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)
