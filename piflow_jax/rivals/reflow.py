"""Reflow and direct regression on a teacher's endpoints (rectified flow, arXiv 2209.03003)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from piflow_jax.flow.sampling import ode_sample
from piflow_jax.rivals.base import Rival, Setting, Velocity, gradient_step, interpolate

__all__ = ["REFLOW", "REGRESSION", "reflow_loss"]


def reflow_loss(
    network: Velocity, noise: jax.Array, endpoints: jax.Array, t: jax.Array
) -> jax.Array:
    """Flow matching on the teacher's own pairs of noise and endpoint (Eq. 1, Sec. 2.2).

    `|u(x_t, t) - (eps - x_0)|^2` on the straight line between the two. At `t = 1` alone this is the
    paper's distillation of a flow into one step, the regression of endpoints on noise.

    Args:
      network: `(x[B, *sites, C], t[B]) -> u[B, *sites, C]`.
      noise: `[B, *sites, C]`, where the teacher's paths start.
      endpoints: `[B, *sites, C]`, where they end.
      t: `[B]`, noise levels.

    Returns:
      The loss, a scalar.
    """
    velocity = network(interpolate(endpoints, noise, t), t)
    return jnp.mean(jnp.square(velocity - (noise - endpoints)))


def _loss(setting: Setting, params, state, given, key, x0, labels, *, straight: bool):
    """The loss over all times, or at the noise alone."""
    index_key, time_key = jax.random.split(key)
    pairs, batch = given["pairs"], x0.shape[0]
    index = jax.random.randint(index_key, (batch,), 0, pairs.labels.shape[0])
    picked = jax.tree.map(lambda a: a[index], pairs)
    t = jax.random.uniform(time_key, (batch,)) if straight else jnp.ones((batch,))
    return reflow_loss(setting.bind(params, picked.labels), picked.noise, picked.endpoints, t)


REFLOW = Rival(
    name="reflow",
    title="reflow",
    given="pairs",
    step=gradient_step(functools.partial(_loss, straight=True)),
    sample=ode_sample,
)
REGRESSION = dataclasses.replace(
    REFLOW,
    name="regression",
    title="regression",
    step=gradient_step(functools.partial(_loss, straight=False)),
    nfes=lambda config: (1,),
)
