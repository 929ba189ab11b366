"""Floating point operations of a program, counted from its trace.

XLA's own count is not usable here: it counts the body of a loop once, and the layers are a loop.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from absl import logging

OTHER = "other"
"""The name of operations outside all scopes."""

# JAX's own scope around the recomputations of `jax.checkpoint` in the backward pass.
_RECOMPUTED = "rematted_computation"
# Operations that hide products from the trace.
_OPAQUE = ("ffi_call", "io_callback", "pure_callback", "ragged_dot_general", "scaled_matmul")


@dataclasses.dataclass(frozen=True)
class Flops:
    """Floating point operations in one run of a program, on all devices together.

    Attributes:
      by_scope: operations that the results need, by scope: all requested scopes and `other`.
      recomputed: operations that `jax.checkpoint` repeats in the backward pass.
    """

    by_scope: Mapping[str, int]
    recomputed: int

    @property
    def needed(self) -> int:
        """All operations except recomputations."""
        return sum(self.by_scope.values())

    @property
    def total(self) -> int:
        """All operations of the program."""
        return self.needed + self.recomputed


def flops(function: Callable, *args: Any, scopes: Sequence[str] = ()) -> Flops:
    """Counts the FLOPs of a program's matrix products and convolutions.

    A multiply-add counts as two operations. The program is the one that JAX hands to the compiler.
    Scans count as often as they run, kernels as often as their grid has points, and the bodies of
    `shard_map` on all devices. Of the branches of a condition only the most expensive counts.
    `while` loops count once, because the trace does not know their length. Operations that hide
    products from the trace are left out, with a warning that names them.

    Args:
      function: function to trace; nothing is computed.
      *args: its arguments, or their shapes.
      scopes: names given to `jax.named_scope`. A product and its derivatives belong to the
        innermost scope.

    Returns:
      The counts.
    """
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    counted, opaque = Counter(), Counter()
    for stack, operation, count in _products(jaxpr, (), 1):
        if count is None:
            opaque[operation] += 1
            continue
        within = [word for part in stack for word in re.findall(r"[\w.-]+", part)]
        if _RECOMPUTED in within:
            counted[_RECOMPUTED] += count
        else:
            found = (word for word in reversed(within) if word in scopes)
            counted[next(found, OTHER)] += count
    if opaque:
        names = ", ".join(f"{name} ({number})" for name, number in sorted(opaque.items()))
        logging.warning("FLOPs are counted without those of the operations %s", names)
    by_scope = {scope: counted[scope] for scope in dict.fromkeys((*scopes, OTHER))}
    return Flops(by_scope, counted[_RECOMPUTED])


Stack = tuple[str, ...]


def _products(jaxpr, stack: Stack, repeats: int) -> Iterator[tuple[Stack, str, int | None]]:
    """Scopes, operation and FLOPs of each product; FLOPs are None if unknown."""
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name.removesuffix("_wrapper"), equation.params
        within = (*stack, str(equation.source_info.name_stack))
        if name in _COUNTS:
            yield within, name, repeats * _COUNTS[name](equation)
        elif name in _OPAQUE:
            yield within, name, None
        elif name == "cond":
            branches = [list(_products(b.jaxpr, within, repeats)) for b in params["branches"]]
            yield from max(branches, key=lambda found: sum(count or 0 for *_, count in found))
        else:
            for value in params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from _products(inner, within, repeats * _trips(name, params))


def _trips(name: str, params: Mapping[str, Any]) -> int:
    """Number of times that the body of an operation runs."""
    if name == "scan":
        return params["length"]
    if name == "pallas_call":
        return math.prod(size for size in params["grid_mapping"].grid if isinstance(size, int))
    if name == "shard_map":
        return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    return 1


def _dot(equation) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    return 2 * math.prod(left[axis] for axis in contracted) * math.prod(out)


def _convolution(equation) -> int:
    kernel, out = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
    outputs = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
    return 2 * math.prod(kernel) // outputs * math.prod(out)


def _attention(products: int) -> Callable[[Any], int]:
    """FLOPs of `products` products of queries `[B, T, heads, D]` with keys `[B, S, heads, D]`."""

    def count(equation) -> int:
        query, key = (variable.aval.shape for variable in equation.invars[:2])
        return 2 * products * math.prod(query) * key[1]

    return count


_COUNTS: dict[str, Callable[[Any], int]] = {
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    # cuDNN's attention; the backward pass counts without the product that it repeats.
    "dot_product_attention_fwd": _attention(2),
    "dot_product_attention_bwd": _attention(4),
}
