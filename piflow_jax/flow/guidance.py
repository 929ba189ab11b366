"""Classifier-free guidance of velocities, with an interval and an orthogonal variant."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from piflow_jax.arguments import check_between, check_shape, known
from piflow_jax.flow.policies.base import per_sample

__all__ = ["Null", "guided_velocity", "null_conditions"]

Null = Any | Callable[[Any], Any]
"""The condition of one example that stands for none, or a function, see `null_conditions`."""


def null_conditions(cond: Any, null: Null) -> Any:
    """The conditions of the unconditional half of a guided batch.

    Source: classifier-free guidance, arXiv 2207.12598.

    Args:
      cond: conditions, arrays `[B, ...]` in any structure.
      null: the null condition: `cond` of one example, without the axis `B`. If it differs between
        examples, as in editing, where each keeps its reference images, it is a function of `cond`.

    Returns:
      Arrays like `cond`.

    Raises:
      ValueError: `null` is not of the structure and shapes of `cond`, or the dtype of `cond` does
        not have a known value of it.
    """
    return null(cond) if callable(null) else nothing_of(cond, null)


def nothing_of(cond: Any, null: Any) -> Any:
    """The null condition of one example, for all examples of `cond`; see `null_conditions`."""

    def nothing(given, null):
        return jnp.broadcast_to(jnp.asarray(null), given.shape).astype(jnp.asarray(given).dtype)

    try:
        found = jax.tree.map(nothing, cond, null)
    except (TypeError, ValueError) as error:
        raise ValueError(
            "null_cond must be the condition of one example: of the structure of cond, and of "
            "its shapes without B"
        ) from error
    jax.tree.map(_check_null, found, null)
    return found


def _check_null(found: jax.Array, null: Any) -> None:
    # Embeddings are large, and are not fetched for this.
    values = None if jnp.issubdtype(found.dtype, jnp.floating) else known(null)
    if values is not None and not np.array_equal(values.astype(found.dtype), values):
        raise ValueError(
            f"null_cond is {values.tolist()}, which conditions of dtype {found.dtype} cannot hold: "
            "give them in a dtype that can"
        )


def check_guidance(
    scale: float | jax.Array, interval: tuple[float, float], orthogonal: float
) -> None:
    """Refuses invalid guidance.

    Args:
      scale: see `guided_velocity`.
      interval: see `guided_velocity`.
      orthogonal: see `guided_velocity`.

    Raises:
      ValueError: a known number is not finite or out of range, or the interval is empty.
    """
    check_between("the guidance's scale", scale)
    check_between("the guidance's orthogonal share", orthogonal, 0, 1)
    ends = [known(end) for end in interval] if isinstance(interval, Sequence) else []
    if len(ends) != 2 or (not any(end is None for end in ends) and not ends[0] <= ends[1]):
        raise ValueError(f"the guidance's interval must be (low, high), got {interval}")


def guided_velocity(
    u_cond: jax.Array,
    u_uncond: jax.Array,
    scale: float | jax.Array,
    sigma: jax.Array,
    interval: tuple[float, float] = (0.0, 1.0),
    orthogonal: float = 0.0,
    x: jax.Array | None = None,
) -> jax.Array:
    """Guided velocity `u_c + (w - 1)(u_c - u_u)` inside an interval of noise levels.

    Interval guidance follows arXiv 2404.07724. The orthogonal variant follows arXiv 2410.02416: it
    scales the component of the guidance parallel to the predicted `x_0` (per sample, over all sites
    and channels) by `1 - orthogonal`.

    Args:
      u_cond: `[B, *sites, C]`.
      u_uncond: `[B, *sites, C]`.
      scale: `w`, a scalar or `[B]`; 1 is no guidance. A traced NaN gives NaN.
      sigma: `[B]`, noise levels.
      interval: noise levels at which to guide, both ends included; outside it the scale is 1.
      orthogonal: share of the parallel component to remove, in [0, 1].
      x: `[B, *sites, C]`, the state; needed only when `orthogonal` is not 0.

    Returns:
      `u[B, *sites, C]`.

    Raises:
      ValueError: if `orthogonal` is used without `x`, shapes do not match, or a known number is out
        of range.
    """
    check_guidance(scale, interval, orthogonal)
    check_shape("u_uncond", u_uncond, u_cond.shape, "u_cond")
    inside = (sigma >= interval[0]) & (sigma <= interval[1])
    gain = jnp.where(inside, jnp.asarray(scale, sigma.dtype) - 1, 0)
    bias = per_sample(gain, u_cond.ndim).astype(u_cond.dtype) * (u_cond - u_uncond)
    if orthogonal:
        if x is None:
            raise ValueError("orthogonal guidance projects on x_0 and needs the state x")
        axis = x - per_sample(sigma, x.ndim) * u_cond
        over = tuple(range(1, axis.ndim))
        along = jnp.mean(bias * axis, over, keepdims=True)
        along = along / jnp.maximum(jnp.mean(jnp.square(axis), over, keepdims=True), 1e-6)
        bias = bias - orthogonal * along * axis
    return u_cond + bias
