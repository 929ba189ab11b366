"""Weights of Qwen-Image and of its pi-Flow students with their official names.

Source: parameter names and layouts of `diffusers` (`QwenImageTransformer2DModel`) and of the
pi-Flow release (arXiv 2510.14974). Patches and rows of output layers are ordered as in FLUX.1.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from piflow_jax.convert.flux import (
    ATTENTION,
    AXES_DIMS_ROPE,
    OUTPUT,
    TIME,
    patch_head_rules,
    patch_rules,
    read_width,
    stream_rules,
)
from piflow_jax.convert.heads import read_head
from piflow_jax.convert.kinds import Kind
from piflow_jax.convert.rules import Place, Rule, as_jax, embedder_rules, import_state, linear
from piflow_jax.convert.sizes import check_given, count_layers, linear_sizes
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


def load_qwen_image(
    state: Mapping[str, np.ndarray],
    head: str,
    *,
    axes_dims_rope: tuple[int, int, int] = AXES_DIMS_ROPE,
    place: Place | None = None,
    **given: float,
) -> tuple[QwenImage, dict]:
    """Loads a Qwen-Image, or a student of it with adapters merged into its weights.

    Args:
        state: Arrays by official name.
        head: A name in `HEADS`.
        axes_dims_rope: See `QwenImage`; small networks need it.
        place: Puts each leaf on its devices as soon as it is built, see `import_state`; None keeps
            leaves on the default device.
        **given: Sizes that shapes show, as a check: `patch_size`, `in_channels`, `hidden`,
            `num_heads`, `depth`, `text_features`, `num_components`, `logstd_hidden`, `num_grid`. A
            mixture without a logstd head needs `constant_logstd`.

    Returns:
        The module, and `{"params": ...}` as JAX arrays with the dtypes of `state`.

    Raises:
        ValueError: Names, shapes or dtypes do not match (the message lists the faults), numbers are
            not finite, or a given size contradicts the weights.
    """
    state = dict(state)
    sizes = read_width(state, "img_in") | {
        "depth": count_layers(state, "transformer_blocks"),
        "text_features": linear_sizes(state, "txt_in")[1],
    }
    predicts, head_sizes = read_head(state, head, QWEN_IMAGE, sizes, given)
    check_given(given, sizes | head_sizes)
    module = QwenImage(**sizes, axes_dims_rope=tuple(axes_dims_rope), head=predicts)
    return module, {"params": import_state(state, qwen_image_rules(module), 0, place or as_jax)}


def _unread(module: QwenImage) -> str:
    """Prefix of the text MLP in the last block, which nothing reads."""
    return f"transformer_blocks.{module.depth - 1}.txt_mlp."


def _release(module: QwenImage) -> dict[str, Any]:
    return {"_class_name": "QwenImageTransformer2DModel", "num_layers": module.depth}


QWEN_IMAGE = Kind(
    name="qwen_image",
    mark="txt_norm.weight",
    load=load_qwen_image,
    module=QwenImage,
    output=OUTPUT,
    sizes=(
        *("patch_size", "in_channels", "hidden", "num_heads", "depth", "text_features"),
        "axes_dims_rope",
    ),
    rules=qwen_image_rules,
    unread=_unread,
    release=_release,
)
