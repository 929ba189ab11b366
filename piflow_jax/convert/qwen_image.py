"""Weights of Qwen-Image and of its pi-Flow students with their official names.

Source: parameter names and layouts of `diffusers` (`QwenImageTransformer2DModel`) and of the
pi-Flow release (arXiv 2510.14974). Patches and rows of output layers are ordered as in FLUX.1.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from piflow_jax.convert.flux import (
    ATTENTION,
    OUTPUT,
    TIME,
    load_text_network,
    patch_head_rules,
    patch_rules,
    read_width,
    stream_rules,
)
from piflow_jax.convert.kinds import Kind
from piflow_jax.convert.rules import Rule, embedder_rules, linear
from piflow_jax.convert.sizes import count_layers, linear_sizes
from piflow_jax.models.layers import TIME_FEATURES
from piflow_jax.models.qwen_image import QwenImage

# Names in one stream: attention, output, modulation, MLP.
STREAMS = (
    (ATTENTION[0], "to_out.0", "img_mod.1", "img_mlp"),
    (ATTENTION[1], "to_add_out", "txt_mod.1", "txt_mlp"),
)


def qwen_image_rules(module: QwenImage) -> list[Rule]:
    """The table for a Qwen-Image without adapters.

    Args:
        module: A `QwenImage` with any of the heads of `piflow_jax.models.heads`.

    Returns:
        Rules that cover every parameter once.

    Raises:
        ValueError: The head has no official counterpart.
    """
    d, head_size, depth = module.hidden, module.hidden // module.num_heads, module.depth
    sizes = {"o": module.text_features}
    return [
        *patch_rules("img_in", module),
        Rule(("txt_norm.weight",), ("text_norm", "scale"), "o -> o", sizes),
        *linear("txt_in", ("text_embed",), d, module.text_features),
        *embedder_rules(TIME, "time", d, TIME_FEATURES),
        *stream_rules("joint_blocks", "image_", d, head_size, depth, STREAMS[0]),
        *stream_rules("joint_blocks", "text_", d, head_size, depth, STREAMS[1]),
        *linear("norm_out.linear", ("final_modulation",), d, d, pieces=2),
        *patch_head_rules(module),
    ]


def _read(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return read_width(state, "img_in") | {
        "depth": count_layers(state, "transformer_blocks"),
        "text_features": linear_sizes(state, "txt_in")[1],
    }


def _unread(module: QwenImage) -> str:
    """Prefix of the text MLP in the last block, which nothing reads."""
    return f"transformer_blocks.{module.depth - 1}.txt_mlp."


def _release(module: QwenImage) -> dict[str, Any]:
    return {"_class_name": "QwenImageTransformer2DModel", "num_layers": module.depth}


QWEN_IMAGE = Kind(
    name="qwen_image",
    mark="txt_norm.weight",
    load=load_text_network,
    read=_read,
    module=QwenImage,
    output=OUTPUT,
    rules=qwen_image_rules,
    unread=_unread,
    release=_release,
)
