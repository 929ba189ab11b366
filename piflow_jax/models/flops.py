"""Floating point operations: of a DiT by its shapes, of a program by its matrix products."""

import math

import jax

from piflow_jax.models.dit import DiT
from piflow_jax.models.heads import DXHead, GMHead
from piflow_jax.models.layers import TIME_FEATURES

__all__ = ["forward_flops", "traced_flops"]


def forward_flops(module: DiT, height: int, width: int) -> int:
    """FLOPs of one forward evaluation of one example; a backward pass costs twice that.

    Matrix products only, two operations per multiply-add. XLA's own count is of no use here: it
    counts the body of a loop once, and layers and substeps are loops.

    Args:
      module: the network.
      height: sites of the input.
      width: sites of the input.

    Returns:
      The count.
    """
    tokens = (height // module.patch_size) * (width // module.patch_size)
    d = module.hidden
    patch = module.patch_size**2 * module.in_channels
    per_token = (4 + 2 * module.mlp_ratio) * d * d
    block = tokens * per_token + 2 * tokens * tokens * d + 6 * d * d
    head = module.head
    if isinstance(head, GMHead):
        rows = head.num_components * (patch + module.patch_size**2)
    elif isinstance(head, DXHead):
        rows = head.num_grid * patch
    else:
        rows = patch
    embedding = TIME_FEATURES * d + d * d + 2 * d * d
    return int(2 * (module.depth * block + tokens * d * (patch + rows) + embedding))


def traced_flops(function, *args) -> int:
    """FLOPs of the matrix products and convolutions in a traced program.

    Loops are counted as often as they run.

    Counted from the program that JAX hands to the compiler: recomputation by remat is in it, what
    the compiler merges later is too. `while` loops, whose length is not known, count once;
    rollouts have no matrix products that matter.

    Args:
      function: what to trace.
      *args: its arguments, or their shapes.

    Returns:
      The count, two operations per multiply-add.
    """
    return _jaxpr_flops(jax.make_jaxpr(function)(*args).jaxpr)


def _jaxpr_flops(jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            depth = math.prod(left[axis] for axis in contracted)
            total += 2 * depth * math.prod(equation.outvars[0].aval.shape)
            continue
        if name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            outputs = kernel[params["dimension_numbers"].rhs_spec[0]]
            total += 2 * math.prod(kernel) // outputs * math.prod(equation.outvars[0].aval.shape)
            continue
        repeats = params["length"] if name == "scan" else 1
        if name == "cond":
            total += max(_jaxpr_flops(branch.jaxpr) for branch in params["branches"])
            continue
        for value in params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += repeats * _jaxpr_flops(inner)
    return total
