"""Matching of distributions instead of paths: the directions in which DMD moves samples.

Sources: DMD (arXiv 2311.18828) and variational score distillation (arXiv 2305.16213).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from piflow_jax.flow.policies.base import per_sample

__all__ = ["distribution_matching_loss", "distribution_matching_loss_at"]

_LEAST_UNIT = 1e-6


def distribution_matching_loss(
    generated: jax.Array,
    real: Callable[[jax.Array, jax.Array], jax.Array],
    fake: Callable[[jax.Array, jax.Array], jax.Array],
    noise: jax.Array,
    t: jax.Array,
) -> jax.Array:
    """A loss whose gradient with respect to samples is a difference of scores (DMD, Eq. 7).

    Args:
      generated: `[B, *sites, C]`, samples of the student; gradients flow into them.
      real: the teacher's velocity, guided, `(x[B, *sites, C], t[B]) -> u[B, *sites, C]`.
      fake: the velocity of the student's distribution.
      noise: `[B, *sites, C]`, standard normal, mixed into the samples.
      t: `[B]`, noise levels in (0, 1).

    Returns:
      `loss[]`, see `distribution_matching_loss_at`.
    """
    level = per_sample(t, noise.ndim)
    x = jax.lax.stop_gradient((1 - level) * generated + level * noise)
    return distribution_matching_loss_at(generated, x, t, real(x, t), fake(x, t))


def distribution_matching_loss_at(
    generated: jax.Array, x: jax.Array, t: jax.Array, real: jax.Array, fake: jax.Array
) -> jax.Array:
    """The same loss at given states, with the velocities there.

    Scores are compared as predictions of `x_0`, `x_t - t u`, in units of the mean distance between
    the sample and the teacher's prediction (DMD, Eq. 8).

    Args:
      generated: `[B, *sites, C]`, samples of the student; gradients flow into them alone.
      x: `[B, *sites, C]`, states from which the samples are one or more steps away.
      t: `[B]`, noise levels of the states.
      real: `[B, *sites, C]`, the teacher's velocities there.
      fake: `[B, *sites, C]`, those of the student's distribution.

    Returns:
      `loss[]`. Its gradient with respect to a value of the samples is the difference there over
      the number of values.
    """
    level = per_sample(t, x.ndim)
    over = tuple(range(1, x.ndim))
    unit = jnp.mean(jnp.abs(generated - (x - level * real)), over, keepdims=True)
    direction = level * (real - fake) / jnp.maximum(unit, _LEAST_UNIT)
    target = jax.lax.stop_gradient(generated - direction)
    return 0.5 * jnp.mean(jnp.square(generated - target))
