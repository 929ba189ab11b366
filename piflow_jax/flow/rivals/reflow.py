"""Reflow and direct regression on a teacher's endpoints (rectified flow, arXiv 2209.03003)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from piflow_jax.flow.policies.base import per_sample

__all__ = ["reflow_loss"]


def reflow_loss(
    network: Callable[[jax.Array, jax.Array], jax.Array],
    noise: jax.Array,
    endpoints: jax.Array,
    t: jax.Array,
) -> jax.Array:
    """Flow matching on the teacher's own pairs of noise and endpoint (Eq. 1, Sec. 2.2).

    `|u(x_t, t) - (eps - x_0)|^2` on the straight line between the two. At `t = 1` alone it is the
    paper's distillation of a flow into one step: regression of endpoints on noise.

    Args:
      network: `(x[B, *sites, C], t[B]) -> u[B, *sites, C]`.
      noise: `[B, *sites, C]`, where the teacher's paths start.
      endpoints: `[B, *sites, C]`, where they end.
      t: `[B]`, noise levels.

    Returns:
      The loss, a scalar.
    """
    level = per_sample(t, noise.ndim)
    velocity = network((1 - level) * endpoints + level * noise, t)
    return jnp.mean(jnp.square(velocity - (noise - endpoints)))
