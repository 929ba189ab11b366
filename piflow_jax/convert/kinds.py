"""Rows of the table of official weights, and the names of foreign adapters."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import linen as nn

from piflow_jax.convert.rules import Rule

__all__ = ["Kind", "adapter_of"]

_LORA_MATRIX = re.compile(r"(?:^|[._])lora(?:_|\.)(?:A|B|down|up)\b")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """A row of `KINDS`: everything that depends on the network of the weights.

    Attributes:
        name: Its name in `load_torch_state`.
        mark: An array that all networks of this kind have, and no others.
        load: `(state, **sizes) -> (module, {"params": ...})`; for networks with students `(kind,
            state, head, **sizes)`, where `head` is a name in `HEADS`.
        module: Its class in this package.
        output: The output layer of networks with students; empty for others.
        read: Reads fields of a module that reads text off the shapes of a state.
        rules: The table for a module's parameters; None if these names can only be read.
        unread: Prefix of the layers with adapters that the release leaves out.
        release: The class in the release, and arguments that the others of its family lack.
        first_names: Layers under names that LoRA files have in place of the official ones, with
            `{layer}` for a number: the official layers of their rows in turn, and the part of each
            as `(name, part, number of parts)`.
    """

    name: str
    mark: str
    load: Callable[..., tuple[nn.Module, dict]]
    module: type[nn.Module]
    output: str = ""
    read: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
    rules: Callable[[Any], list[Rule]] | None = None
    unread: Callable[[Any], str] = lambda module: ""
    release: Callable[[Any], dict[str, Any]] | None = None
    first_names: Mapping[str, Sequence[tuple[str, int, int]]] = dataclasses.field(
        default_factory=dict
    )


def adapter_of(state: Mapping[str, Any]) -> str | None:
    """Names the origin of the adapter matrices in a state.

    Args:
        state: Arrays by name.

    Returns:
        The origin, for a message; None if there are no adapter matrices.
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
