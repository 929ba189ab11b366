"""`python -m piflow_jax.config` prints `docs/configuration.md`."""

import dataclasses
import inspect
import types
import typing

from piflow_jax.config.schema import Config

_SIGNS = {"above": ">", "low": ">=", "most": "<="}


def reference() -> str:
    """The documentation of every key, as Markdown."""
    lines = [
        "# Configuration keys",
        "",
        "Every key can be set on the command line, as in `--config.train.steps=100`. Unknown keys,",
        "wrong types and impossible values are refused before anything is compiled.",
        "`python -m piflow_jax.config > docs/configuration.md` makes this page.",
    ]

    def table(cls, prefix):
        hints = typing.get_type_hints(cls)
        rows, groups = [], []
        for field in dataclasses.fields(cls):
            hint, meta = hints[field.name], field.metadata
            if dataclasses.is_dataclass(hint):
                groups.append((hint, f"{prefix}.{field.name}"))
                continue
            name = getattr(hint, "__name__", str(hint)) if not typing.get_args(hint) else str(hint)
            rows.append(
                f"| `{field.name}` | {name} | `{field.default!r}` "
                f"| {_range(meta)} | {meta['doc']} |"
            )
        if rows:
            lines.extend(["", f"## `{prefix}`", "", inspect.cleandoc(cls.__doc__), ""])
            lines.extend(
                ["| key | type | default | allowed | meaning |", "| --- " * 5 + "|", *rows]
            )
        for hint, name in groups:
            table(hint, name)

    table(Config, "config")
    return "\n".join(lines) + "\n"


def _range(meta: types.MappingProxyType) -> str:
    if meta["choices"]:
        return ", ".join(f"`{choice}`" for choice in meta["choices"])
    if meta["high"] is not None:
        least = f"above {meta['above']}" if meta["low"] is None else meta["low"]
        return f"{least} to {meta['high']}"
    ends = ("above" if meta["low"] is None else "low", "most")
    bounds = [f"{_SIGNS[end]} {meta[end]}" for end in ends if meta[end] is not None]
    return ", ".join(bounds)


if __name__ == "__main__":
    print(reference(), end="")
