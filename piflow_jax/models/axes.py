"""Logical names of the parameters' axes, by which `piflow_jax.parallel` shards them.

`embed` is the width of the tokens, `heads` all attention heads together, `mlp` the hidden layer of
an MLP, `layers` the blocks of a scan. An axis without a name is never split.
"""

from collections.abc import Sequence

__all__ = ["parameter_axes"]

Axes = tuple[str | None, ...]

# By the last names of a parameter's path.
_DIT: dict[tuple[str, ...], Axes] = {
    ("patch_embed", "kernel"): (None, "embed"),
    ("time_in", "kernel"): (None, "embed"),
    ("time_out", "kernel"): ("embed", None),
    ("class_embed",): (None, "embed"),
    ("blocks", "modulation", "kernel"): ("layers", "embed", None, None),
    ("blocks", "modulation", "bias"): ("layers", None, None),
    ("blocks", "qkv", "kernel"): ("layers", "embed", None, "heads"),
    ("blocks", "qkv", "bias"): ("layers", None, "heads"),
    ("blocks", "attention_out", "kernel"): ("layers", "heads", "embed"),
    ("blocks", "attention_out", "bias"): ("layers", None),
    ("blocks", "mlp_in", "kernel"): ("layers", "embed", "mlp"),
    ("blocks", "mlp_in", "bias"): ("layers", "mlp"),
    ("blocks", "mlp_out", "kernel"): ("layers", "mlp", "embed"),
    ("blocks", "mlp_out", "bias"): ("layers", None),
    ("final_modulation", "kernel"): ("embed", None, None),
    ("final_modulation", "bias"): (None, None),
    ("head", "output", "kernel"): ("embed", None),
    ("head", "means", "kernel"): ("embed", None),
    ("head", "logweights", "kernel"): ("embed", None),
    ("head", "logstd_in", "kernel"): ("embed", None),
    ("head", "logstd_out", "kernel"): (None, None),
}


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
    axes = _DIT.get(tuple(path))
    if axes is None and ndim < 2:
        return (None,) * ndim
    if axes is None or len(axes) != ndim:
        raise ValueError(
            f"the parameter {'/'.join(path)} with {ndim} axes is not in the table of axes "
            "(piflow_jax/models/axes.py)"
        )
    return axes
