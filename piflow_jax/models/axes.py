"""Logical names of the parameters' axes, by which `piflow_jax.parallel` shards them.

`embed` is the width of the tokens, `heads` all attention heads together, `mlp` the hidden layer of
an MLP, `layers` the blocks of a scan, `rank` the inner size of an adapter where its factor has no
`embed`. An axis without a name is never split.

What networks have in common is listed once; a network's blocks are a table of their own. An
adapter's factors (`lora_a`, `lora_b`) have the axes of the kernel beside them.
"""

from collections.abc import Sequence

__all__ = ["parameter_axes"]

Axes = tuple[str | None, ...]

# By the names of a parameter's path, down from the network.
_OUTSIDE_BLOCKS: dict[tuple[str, ...], Axes] = {
    ("patch_embed", "kernel"): (None, "embed"),
    ("text_embed", "kernel"): (None, "embed"),
    ("time_in", "kernel"): (None, "embed"),
    ("time_out", "kernel"): ("embed", None),
    ("second_time_in", "kernel"): (None, "embed"),
    ("second_time_out", "kernel"): ("embed", None),
    ("guidance_in", "kernel"): (None, "embed"),
    ("guidance_out", "kernel"): ("embed", None),
    ("pooled_in", "kernel"): (None, "embed"),
    ("pooled_out", "kernel"): ("embed", None),
    ("class_embed",): (None, "embed"),
    ("final_modulation", "kernel"): ("embed", None, None),
    ("final_modulation", "bias"): (None, None),
    ("head", "output", "kernel"): ("embed", None),
    ("head", "means", "kernel"): ("embed", None),
    ("head", "logweights", "kernel"): ("embed", None),
    ("head", "rates", "kernel"): ("embed", None),
    ("head", "logstd_in", "kernel"): ("embed", None),
    ("head", "logstd_out", "kernel"): (None, None),
}
# By the name of a layer in its block: the axes of its kernel, behind `layers`. A bias has the axes
# that the kernel's last ones are, without `embed`: what is added to tokens is whole on each device.
_DIT_BLOCK: dict[str, Axes] = {
    "modulation": ("embed", None, None),
    "qkv": ("embed", None, "heads"),
    "attention_out": ("heads", "embed"),
    "mlp_in": ("embed", "mlp"),
    "mlp_out": ("mlp", "embed"),
}
_SINGLE_BLOCK: dict[str, Axes] = {
    "modulation": ("embed", None, None),
    "qkv": ("embed", None, "heads"),
    "mlp_in": ("embed", None, "mlp"),
    # Attention's output and four pieces of the hidden layer; heads and hidden units lie alike.
    "out": (None, "mlp", "embed"),
}
# Streams of text and image, each with layers like a DiT's.
_JOINT_BLOCK: dict[str, Axes] = {
    f"{stream}_{layer}": axes for stream in ("image", "text") for layer, axes in _DIT_BLOCK.items()
}
_BLOCKS: dict[str, dict[str, Axes]] = {
    "blocks": _DIT_BLOCK,
    "single_blocks": _SINGLE_BLOCK,
    "double_blocks": _JOINT_BLOCK,
    "joint_blocks": _JOINT_BLOCK,
}
_NORMS = ("query_norm", "key_norm")


def _rank(others: Axes) -> str | None:
    """The name of an adapter's rank, none where the factor is split along `embed`."""
    return None if "embed" in others else "rank"


def _in_block(blocks: str, layer: str, leaf: str) -> Axes | None:
    """Axes of a stacked parameter, None if there is no such layer."""
    if leaf == "scale" and layer.removeprefix("image_").removeprefix("text_") in _NORMS:
        return ("layers", None)
    kernel = _BLOCKS[blocks].get(layer)
    if kernel is None:
        return None
    outs = len(kernel) - (2 if layer == "out" else 1)
    ins, outputs = kernel[:-outs], kernel[-outs:]
    leaves = {
        "kernel": kernel,
        "bias": tuple(None if axis == "embed" else axis for axis in outputs),
        "lora_a": (*ins, _rank(ins)),
        "lora_b": (_rank(outputs), *outputs),
    }
    return ("layers", *leaves[leaf]) if leaf in leaves else None


def parameter_axes(path: Sequence[str], ndim: int) -> Axes:
    """Names of the axes of a network's parameter.

    Args:
        path: Its names from the network down, such as `("blocks", "qkv", "kernel")`.
        ndim: Its number of axes.

    Returns:
        A name or None for each axis. Vectors (biases outside the blocks) have no names.

    Raises:
        ValueError: The parameter is not in the table, or has another number of axes there.
    """
    path = tuple(path)
    if len(path) == 3 and path[0] in _BLOCKS:
        axes = _in_block(*path)
    elif path[-1] in ("lora_a", "lora_b"):
        axes = _OUTSIDE_BLOCKS.get((*path[:-1], "kernel"))
        if axes is not None:
            ins, outputs = axes[:1], axes[1:]
            down = path[-1] == "lora_a"
            axes = (*ins, _rank(ins)) if down else (_rank(outputs), *outputs)
    else:
        axes = _OUTSIDE_BLOCKS.get(path)
        axes = (None,) * ndim if axes is None and ndim < 2 else axes
    if axes is None or len(axes) != ndim:
        raise ValueError(
            f"the parameter {'/'.join(path)} with {ndim} axes is not in the table of axes "
            "(piflow_jax/models/axes.py)"
        )
    return axes
