"""The table of official weights, and the names of weights that are something else than expected."""

import re
from collections.abc import Mapping
from typing import Any

from absl import logging
from flax import linen as nn

from piflow_jax.convert.dit import DIT
from piflow_jax.convert.flux import FLUX
from piflow_jax.convert.flux2 import FLUX2
from piflow_jax.convert.heads import HEADS
from piflow_jax.convert.inception import INCEPTION
from piflow_jax.convert.kinds import Kind, adapter_of
from piflow_jax.convert.original_dit import ORIGINAL_DIT, ORIGINAL_SIT
from piflow_jax.convert.qwen_image import QWEN_IMAGE
from piflow_jax.convert.qwen_vae import QWEN_VAE
from piflow_jax.convert.vae import VAE

__all__ = ["KINDS", "kind_of", "named", "network_of"]

_ROWS = (DIT, ORIGINAL_DIT, ORIGINAL_SIT, FLUX, QWEN_IMAGE, FLUX2, VAE, QWEN_VAE, INCEPTION)
KINDS: dict[str, Kind] = {row.name: row for row in _ROWS}
# An array that identifies networks that are not supported.
_FOREIGN = {
    "double_blocks.0.img_attn.qkv.weight": (
        "FLUX.1 or FLUX.2 under its first names, which are not read; take the folder transformer "
        "of the release in the form of diffusers"
    ),
    "decoder.mid.block_1.norm1.weight": (
        "an autoencoder under its first names, which are not read; take the folder vae of a "
        "release in the form of diffusers"
    ),
    "encoder.block.0.layer.0.SelfAttention.q.weight": "the text encoder T5",
    "text_model.encoder.layers.0.self_attn.q_proj.weight": "the text encoder CLIP",
    "layers.0.self_attn.q_proj.weight": "a language model",
}
_SHARD = re.compile(r"-\d+-of-0*(?:[2-9]|1\d)\d*\.safetensors$")


def named(model: str) -> tuple[Kind, str]:
    """Splits a model name into the kind of the network and the head in `HEADS`.

    Args:
        model: A name in `KINDS`, or the name of a student such as "gm_dit".

    Returns:
        The row, and the name of the head, which is empty for a teacher or a network without
        students.

    Raises:
        ValueError: There is no such name.
    """
    known = {row.name: (row, "") for row in _ROWS}
    known |= {f"{h}_{row.name}": (row, h) for row in _ROWS if row.output for h in HEADS if h}
    if model not in known:
        raise ValueError(f"unknown model {model!r}, known are {sorted(known)}")
    return known[model]


def kind_of(module: nn.Module) -> Kind:
    """The kind with the official names for a module's parameters.

    Args:
        module: The network.

    Returns:
        The row.

    Raises:
        ValueError: There are no official names for such a module.
    """
    written = {row.module: row for row in _ROWS if row.rules is not None}
    if type(module) not in written:
        known = sorted(cls.__name__ for cls in written)
        raise ValueError(f"cannot export a {type(module).__name__}, known are {known}")
    return written[type(module)]


def network_of(state: Mapping[str, Any], model: str) -> Mapping[str, Any]:
    """The arrays of a network of a kind, without a prefix that all its names share.

    Args:
        state: Arrays by name.
        model: See `named`.

    Returns:
        `state`, or the part of it under the only prefix with such a network.

    Raises:
        ValueError: There are several such networks, or the weights belong to something else, which
            the message names.
    """
    path = getattr(state, "path", None)
    if path is not None and _SHARD.search(path.name):
        raise ValueError(f"{path} is one of several shards: give their index, or their folder")
    kind, head = named(model)
    mark = kind.mark
    if mark not in state:
        prefixes = sorted(n.removesuffix(mark) for n in state if n.endswith(f".{mark}"))
        if len(prefixes) > 1:
            names = ", ".join(prefix.removesuffix(".") for prefix in prefixes)
            raise ValueError(f"there are several networks, select one by open_weights: {names}")
        if not prefixes:
            _refuse_others(state, model)
            return state
        (prefix,) = prefixes
        logging.info("took what is called %s*", prefix)
        state = {n.removeprefix(prefix): a for n, a in state.items() if n.startswith(prefix)}
    if kind.output:
        _check_head(state, kind, head, model)
    return state


def _check_head(state: Mapping[str, Any], kind: Kind, head: str, model: str) -> None:
    """Refuses a student with another prediction, if an array shows it."""
    marked = [name for name, row in HEADS.items() if row.mark and row.mark in state]
    if marked and head not in marked:
        raise ValueError(
            f"missing {kind.output}.weight: these are weights of a {marked[0]}_{kind.name}, a "
            f"student that predicts a mixture, not of a {model}"
        )
    if HEADS[head].mark and not marked:
        raise ValueError(
            f"missing {HEADS[head].first}: these are weights of a teacher ({kind.name}) or of a "
            f"grid (dx_{kind.name}), not of a {model}"
        )


def _refuse_others(state: Mapping[str, Any], model: str) -> None:
    adapter = adapter_of(state)
    if adapter is not None:
        raise ValueError(f"these are {adapter}, not a whole {model}")
    for name, kind in KINDS.items():
        if any(f".{array}".endswith(f".{kind.mark}") for array in state):
            raise ValueError(f"these are weights of a {name}, not of a {model}")
    for mark, what in _FOREIGN.items():
        if any(f".{name}".endswith(f".{mark}") for name in state):
            raise ValueError(f"these are weights of {what}, not of a {model}")
