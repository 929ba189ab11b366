"""Weights that a configuration names on the Hugging Face hub."""

import dataclasses
from typing import Any

from piflow_jax import hub
from piflow_jax.arguments import lora_strengths


def with_commits(config: Any, *, fetch: bool = False) -> Any:
    """Adds to names on the hub the commit that they stand for now.

    The records of the run then name its weights exactly, and the run reads the same weights until
    its end. Names that are not in the cache stay as they are.

    Args:
      config: the run's settings, or a group of them.
      fetch: download first what the cache lacks.

    Returns:
      The settings.

    Raises:
      FileNotFoundError: see `hub.fetch`.
      OSError: see `hub.fetch`.
    """
    changed = {}
    for field in dataclasses.fields(config):
        value, parts = getattr(config, field.name), field.metadata.get("hub")
        if dataclasses.is_dataclass(value):
            changed[field.name] = with_commits(value, fetch=fetch)
        elif isinstance(value, tuple) and parts is not None:
            changed[field.name] = tuple(_lora(entry, fetch) for entry in value)
        elif parts is not None:
            changed[field.name] = _named(value, parts, fetch)
    return dataclasses.replace(config, **changed)


def _lora(entry: str, fetch: bool) -> str:
    """An entry with the commit, its strength left as it is."""
    [path] = lora_strengths([entry])
    return _named(path, (), fetch) + entry.removeprefix(path)


def _named(value: str, parts: tuple[str, ...], fetch: bool) -> str:
    if not hub.is_name(value):
        return value
    if fetch:
        hub.fetch(value, parts)
    return hub.pinned(value)
