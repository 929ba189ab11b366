"""What the table of official weights has a row of, and whose adapters a state holds."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax import linen as nn

from piflow_jax.convert.rules import Rule

__all__ = ["Kind", "adapter_of"]

_LORA_MATRIX = re.compile(r"(?:^|[._])lora(?:_|\.)(?:A|B|down|up)\b")


def _none_unread(module: nn.Module) -> str:
    del module
    return ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """A row of `KINDS`: everything that depends on whose weights are read or written.

    Attributes:
        name: What `load_torch_state` calls it.
        mark: An array that every network of the kind has, and of no other kind.
        load: `(state, **sizes) -> (module, {"params": ...})`; of networks with students
            `(state, head, **sizes)`, where `head` is a name in `HEADS`.
        module: The class of ours.
        export: `(module, params) -> state`, the inverse; None if these names are only read.
        output: The output layer of networks with students; empty for others.
        sizes: Fields of the module that `load` takes, shown by the weights or not.
        rules: The table of a module's parameters; needed for adapters.
        unread: Where the names of layers begin whose adapters the release leaves out.
        release: The class of the release, and arguments of it that others of its family lack.
    """

    name: str
    mark: str
    load: Callable[..., tuple[nn.Module, dict]]
    module: type[nn.Module]
    export: Callable[[Any, Mapping], dict[str, np.ndarray]] | None = None
    output: str = ""
    sizes: tuple[str, ...] = ()
    rules: Callable[[Any], list[Rule]] | None = None
    unread: Callable[[Any], str] = _none_unread
    release: Callable[[Any], dict[str, Any]] | None = None


def adapter_of(state: Mapping[str, Any]) -> str | None:
    """Whose matrices of adapters a state holds.

    Args:
        state: Arrays by name.

    Returns:
        What to call them in a message; None if there are none.
    """
    names = [name for name in state if _LORA_MATRIX.search(name)]
    if not names:
        return None
    for pattern, whose in (
        ("^lora_(unet|transformer|te)", "kohya's"),
        ("^(model\\.)?diffusion_model\\.|(double|single)_blocks\\.", "ComfyUI's"),
        ("^base_model\\.", "PEFT's"),
    ):
        if any(re.search(pattern, name) for name in names):
            return f"LoRA matrices under {whose} names"
    return "LoRA matrices, an adapter"
