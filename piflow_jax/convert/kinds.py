"""Whose weights a state holds, by its names; and what it is instead of what it is taken for."""

import re
from collections.abc import Mapping
from typing import Any

from absl import logging

# An array that every network of a kind has, and no other.
_MARKS = {
    "dit": "transformer_blocks.0.attn1.to_q.weight",
    "original_dit": "t_embedder.mlp.0.weight",
    "flux": "single_transformer_blocks.0.proj_mlp.weight",
    "qwen_image": "txt_norm.weight",
    "vae": "decoder.mid_block.resnets.0.norm1.weight",
    "qwen_vae": "decoder.mid_block.resnets.0.norm1.gamma",
    "inception": "Mixed_5b.branch1x1.conv.weight",
}
# And of networks that are not read.
_FOREIGN = {
    "double_blocks.0.img_attn.qkv.weight": (
        "FLUX.1 under its first names, which are not read; take the folder transformer of the "
        "release in the form of diffusers"
    ),
    "decoder.mid.block_1.norm1.weight": (
        "an autoencoder under its first names, which are not read; take the folder vae of a "
        "release in the form of diffusers"
    ),
    "encoder.block.0.layer.0.SelfAttention.q.weight": "the text encoder T5",
    "text_model.encoder.layers.0.self_attn.q_proj.weight": "the text encoder CLIP",
    "layers.0.self_attn.q_proj.weight": "a language model",
}
_LORA_MATRIX = re.compile(r"(?:^|[._])lora(?:_|\.)(?:A|B|down|up)\b")
_SHARD = re.compile(r"-\d+-of-0*(?:[2-9]|1\d)\d*\.safetensors$")


def network_of(state: Mapping[str, Any], model: str) -> Mapping[str, Any]:
    """The arrays of a network of a kind, without a prefix that all its names have.

    Args:
        state: Arrays by name.
        model: A name in `LOADERS`.

    Returns:
        `state`, or the part of it behind the only prefix under which there is such a network.

    Raises:
        ValueError: There are several such networks; or these are weights of something else, which
            is named.
    """
    path = getattr(state, "path", None)
    if path is not None and _SHARD.search(path.name):
        raise ValueError(f"{path} is one of several shards: give their index, or their folder")
    kind = {"original_sit": "original_dit"}.get(model, re.sub("^(gm|dx)_", "", model))
    mark = _MARKS[kind]
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
    if kind in ("dit", "flux", "qwen_image"):
        mixture = "proj_out_means.weight" in state
        if mixture and not model.startswith("gm_"):
            output = "proj_out_2" if kind == "dit" else "proj_out"
            raise ValueError(
                f"missing {output}.weight: these are weights of a gm_{kind}, a student that "
                f"predicts a mixture, not of a {model}"
            )
        if model.startswith("gm_") and not mixture:
            raise ValueError(
                f"missing proj_out_logweights.bias: these are weights of a teacher ({kind}) or of "
                f"a grid (dx_{kind}), not of a {model}"
            )
    return state


def _refuse_others(state: Mapping[str, Any], model: str) -> None:
    adapter = adapter_of(state)
    if adapter is not None:
        raise ValueError(f"these are {adapter}, not a whole {model}")
    for kind, mark in _MARKS.items():
        if any(f".{name}".endswith(f".{mark}") for name in state):
            raise ValueError(f"these are weights of a {kind}, not of a {model}")
    for mark, what in _FOREIGN.items():
        if any(f".{name}".endswith(f".{mark}") for name in state):
            raise ValueError(f"these are weights of {what}, not of a {model}")


def adapter_of(state: Mapping[str, Any]) -> str | None:
    """Whose matrices of adapters a state holds, None without any."""
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
