"""One substep in a kernel, for a block of sites: each channel and component is its own array.

Source: the GMFlow policy of pi-Flow (arXiv 2510.14974, Sec. 3.2) in the form of `Recurrence`.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from piflow_jax.kernels.recurrence import Recurrence

__all__ = ["Component", "shaped_like", "substep"]

# Starts with the first term, not with zero as `sum` does.
_sum = functools.partial(functools.reduce, operator.add)


class Component(NamedTuple):
    """A component of a block's mixture.

    Attributes:
      offset: its offset from the centre, one array of the block's shape per channel.
      logweight: its log-weight, of the block's shape.
      norm: the squared length of its offset, of the block's shape.
    """

    offset: Sequence[jax.Array]
    logweight: jax.Array
    norm: jax.Array


def substep(
    of: Recurrence,
    y: Sequence[jax.Array],
    previous: Sequence[jax.Array],
    residual_src: Sequence[jax.Array],
    center: Sequence[jax.Array],
    component: Callable[[int], Component],
    components: int,
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Takes a block of sites through one substep; see `Recurrence`.

    Args:
      of: the substep's coefficients, scalars.
      y: the state relative to the centre, one array of the block's shape per channel.
      previous: the velocity of the previous substep, relative to the centre; shaped like `y`.
      residual_src: the residual at the source, shaped like `y`.
      center: the centre, shaped like `y`.
      component: gives the mixture's components by index; called twice for each, on fast memory.
      components: number of components, at least 1.

    Returns:
      The state after the substep and the velocity of the substep, both shaped like `y`.
    """
    sources = list(zip(y, residual_src, center, strict=True))
    pull = [of.pull * a + of.pull_src * b + of.pull_center * c for a, b, c in sources]
    logits = []
    for k in range(components):
        offset, logweight, norm = component(k)
        inner = _sum(d * p for d, p in zip(offset, pull, strict=True))
        logits.append(logweight - of.half_zeta * norm + inner)
    largest = functools.reduce(jnp.maximum, logits)
    weights = [jnp.exp(logit - largest) for logit in logits]
    scale = of.gain_offset / _sum(weights)
    sums = [weights[0] * d for d in component(0).offset]
    for k in range(1, components):
        offset = component(k).offset
        sums = [total + weights[k] * d for total, d in zip(sums, offset, strict=True)]
    velocity = tuple(
        of.gain * a + of.gain_src * b + of.gain_center * c - scale * total
        for (a, b, c), total in zip(sources, sums, strict=True)
    )
    moved = zip(y, velocity, previous, strict=True)
    return tuple(a + of.step * u + of.step_previous * p for a, u, p in moved), velocity


def shaped_like(values: jax.Array, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """The shape of a result that varies over the same axes of a `shard_map` as an argument.

    Args:
      values: the argument, of any shape.
      shape: shape of the result.

    Returns:
      The shape with the dtype of `values`.
    """
    aval = jax.typeof(values)
    # JAX renamed the keyword after 0.10.
    for name in ("manual_axis_type", "vma"):
        if hasattr(aval, name):
            return jax.ShapeDtypeStruct(shape, aval.dtype, **{name: getattr(aval, name)})
    return jax.ShapeDtypeStruct(shape, aval.dtype)
