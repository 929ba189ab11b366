"""Weights of FLUX.2 and of its pi-Flow students with their official names.

Source: parameter names and layouts of `diffusers` (`Flux2Transformer2DModel`) and of the pi-Flow
release (arXiv 2510.14974). Patches and rows of output layers are ordered as in FLUX.1.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from piflow_jax.convert.flux import (
    ATTENTION,
    DOUBLE,
    OUTPUT,
    SINGLE,
    attention_rules,
    first_embedder,
    load_text_network,
    norm_rules,
    patch_head_rules,
    patch_rules,
    read_width,
    whole,
)
from piflow_jax.convert.kinds import Kind
from piflow_jax.convert.rules import Rule, embedder_rules, linear
from piflow_jax.convert.sizes import count_layers, linear_sizes
from piflow_jax.models.flux2 import Flux2, Flux2Layers
from piflow_jax.models.layers import TIME_FEATURES

RATIO = Flux2Layers.mlp_ratio
TIME = "time_guidance_embed.timestep_embedder.linear_{}"
GUIDANCE = "time_guidance_embed.guidance_embedder.linear_{}"
MODULATIONS = {
    "image_modulation": ("double_stream_modulation_img", 6),
    "text_modulation": ("double_stream_modulation_txt", 6),
    "single_modulation": ("single_stream_modulation", 3),
}
# Of each stream: the prefix of our names, attention, its output, the MLP.
STREAMS = (
    ("image_", ATTENTION[0], "to_out.0", "ff"),
    ("text_", ATTENTION[1], "to_add_out", "ff_context"),
)


def flux2_rules(module: Flux2) -> list[Rule]:
    """The table for a FLUX.2 without adapters.

    Args:
        module: A `Flux2` with any of the heads of `piflow_jax.models.heads`.

    Returns:
        Rules that cover every parameter once.

    Raises:
        ValueError: The head has no official counterpart.
    """
    d, head_size = module.hidden, module.hidden // module.num_heads
    rules = [
        *patch_rules("x_embedder", module),
        *linear("context_embedder", ("text_embed",), d, module.text_features, bias=False),
        *embedder_rules(TIME, "time", d, TIME_FEATURES, bias=False),
        *linear("norm_out.linear", ("final_modulation",), d, d, pieces=2, bias=False),
        *patch_head_rules(module),
    ]
    if module.guidance_embed:
        rules += embedder_rules(GUIDANCE, "guidance", d, TIME_FEATURES, bias=False)
    for ours, (name, pieces) in MODULATIONS.items():
        rules += linear(f"{name}.linear", (ours,), d, d, pieces=pieces, bias=False)
    for stream in STREAMS:
        rules += _stream_rules(d, head_size, module.double_depth, *stream)
    depth, path, attn = module.single_depth, ("single_blocks",), f"{SINGLE}attn."
    fused = {"pieces": 3 + 2 * RATIO, "depth": depth, "bias": False}
    rules += linear(f"{attn}to_qkv_mlp_proj", (*path, "qkv_mlp"), d, d, **fused)
    rules += norm_rules(path, "", attn, ATTENTION[0][1], head_size, depth)
    sizes = {"o": d, "s": 1 + RATIO, "i": d}
    out = (*path, "out", "kernel")
    return [*rules, Rule((f"{attn}to_out.weight",), out, "l o (s i) -> l s i o", sizes, depth)]


def _stream_rules(d, head_size, depth, prefix, attention, out, mlp) -> list[Rule]:
    """Rules for one stream of the double blocks."""
    path, attn, mlp = ("double_blocks",), f"{DOUBLE}attn.", f"{DOUBLE}{mlp}."
    options = {"depth": depth, "bias": False}
    return [
        *attention_rules(path, prefix, attn, attention, d, head_size, **options),
        *linear(f"{attn}{out}", (*path, f"{prefix}attention_out"), d, d, **options),
        *linear(f"{mlp}linear_in", (*path, f"{prefix}mlp_in"), RATIO * d, d, pieces=2, **options),
        *linear(f"{mlp}linear_out", (*path, f"{prefix}mlp_out"), d, RATIO * d, **options),
    ]


def _read(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return read_width(state, "x_embedder", bias=False) | {
        "double_depth": count_layers(state, "transformer_blocks"),
        "single_depth": count_layers(state, "single_transformer_blocks"),
        "text_features": linear_sizes(state, "context_embedder", bias=False)[1],
        "guidance_embed": f"{GUIDANCE.format(1)}.weight" in state,
    }


def _release(module: Flux2) -> dict[str, Any]:
    return {
        "_class_name": "Flux2Transformer2DModel",
        "num_layers": module.double_depth,
        "num_single_layers": module.single_depth,
        "guidance_embeds": module.guidance_embed,
    }


def _first_stream(first: str, stream: tuple) -> dict[str, tuple]:
    _, attention, out, mlp = stream
    block = f"double_blocks.{{layer}}.{first}"
    return {
        f"{block}_attn.qkv": whole(*(f"{DOUBLE}attn.{name}" for name in attention[0])),
        f"{block}_attn.proj": whole(f"{DOUBLE}attn.{out}"),
        f"{block}_mlp.0": whole(f"{DOUBLE}{mlp}.linear_in"),
        f"{block}_mlp.2": whole(f"{DOUBLE}{mlp}.linear_out"),
    }


# Layers of the first release of FLUX.2, whose names kohya's scripts and ComfyUI use.
FIRST_NAMES = {
    **_first_stream("img", STREAMS[0]),
    **_first_stream("txt", STREAMS[1]),
    "single_blocks.{layer}.linear1": whole(f"{SINGLE}attn.to_qkv_mlp_proj"),
    "single_blocks.{layer}.linear2": whole(f"{SINGLE}attn.to_out"),
    **{f"{name}.lin": whole(f"{name}.linear") for name, _ in MODULATIONS.values()},
    "img_in": whole("x_embedder"),
    "txt_in": whole("context_embedder"),
    **first_embedder("time_in", TIME),
    **first_embedder("guidance_in", GUIDANCE),
    "final_layer.linear": whole(OUTPUT),
    # The shift comes before the scale there.
    "final_layer.adaLN_modulation.1": (("norm_out.linear", 1, 2), ("norm_out.linear", 0, 2)),
}

FLUX2 = Kind(
    name="flux2",
    mark="double_stream_modulation_img.linear.weight",
    load=load_text_network,
    read=_read,
    module=Flux2,
    output=OUTPUT,
    rules=flux2_rules,
    release=_release,
    first_names=FIRST_NAMES,
)
