"""DMD2: the student's distribution pulled to the teacher's (arXiv 2405.14867).

The gradient of the divergence between the two, at noised samples of the student, is the difference
of their scores (Eq. 1); the student's own is that of a second network, kept up to date by flow
matching on what the student generates, several updates for each of the student's (Sec. 4.2). The
GAN loss of the paper's Sec. 4.3 is left out: it needs a discriminator and adds real data, whereas
this room compares distillations of one teacher.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from piflow_jax.flow.policies.base import per_sample

__all__ = ["backward_simulation", "distribution_matching_loss"]

Velocity = Callable[[jax.Array, jax.Array], jax.Array]


def distribution_matching_loss(
    generated: jax.Array, real: Velocity, fake: Velocity, noise: jax.Array, t: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A loss whose gradient by the samples is the difference of scores (Eq. 1; DMD, 2311.18828).

    Scores are compared as predictions of `x_0`, `x_t - t u`, in units of the mean distance of the
    sample to the teacher's (DMD, Eq. 8).

    Args:
      generated: `[B, *sites, C]`, samples of the student; gradients flow into them.
      real: the teacher's velocity, guided, `(x[B, *sites, C], t[B]) -> u[B, *sites, C]`.
      fake: the velocity of the student's distribution.
      noise: `[B, *sites, C]`, standard normal.
      t: `[B]`, noise levels in (0, 1).

    Returns:
      `(loss[], direction[B, *sites, C])`; samples move against the direction.
    """
    level = per_sample(t, noise.ndim)
    x = jax.lax.stop_gradient((1 - level) * generated + level * noise)
    real_x0, fake_x0 = x - level * real(x, t), x - level * fake(x, t)
    over = tuple(range(1, noise.ndim))
    unit = jnp.mean(jnp.abs(generated - real_x0), over, keepdims=True)
    direction = jax.lax.stop_gradient((fake_x0 - real_x0) / jnp.maximum(unit, 1e-6))
    target = jax.lax.stop_gradient(generated) - direction
    return 0.5 * jnp.mean(jnp.square(generated - target)), direction


def backward_simulation(
    generator: Velocity,
    key: jax.Array,
    noise: jax.Array,
    nfes: Sequence[int],
) -> tuple[jax.Array, jax.Array]:
    """States at which the student is trained: those that it meets when it samples (Sec. 4.5).

    A number of evaluations and one of its steps are drawn for every sample, and the steps before
    are simulated without gradient: predict `x_0`, noise it anew to the next level.

    Args:
      generator: the student's velocity, `(x[B, *sites, C], t[B]) -> u[B, *sites, C]`.
      key: a PRNG key.
      noise: `[B, *sites, C]`, standard normal, the first states.
      nfes: numbers of evaluations at which the student will sample; levels are `1 - i / nfe`.

    Returns:
      `(x[B, *sites, C], t[B])`, without gradient.
    """
    nfe_key, step_key, noise_key = jax.random.split(key, 3)
    batch, dtype = noise.shape[0], noise.dtype
    nfe = jax.random.choice(nfe_key, jnp.asarray(nfes, dtype), (batch,))
    steps = jnp.floor(jax.random.uniform(step_key, (batch,), dtype) * nfe)
    steps = jnp.minimum(steps, nfe - 1)

    def simulate(carry, index):
        x, t = carry
        fresh = jax.random.normal(jax.random.fold_in(noise_key, index), x.shape, dtype)
        x0 = x - per_sample(t, x.ndim) * generator(x, t)
        after = 1 - (index + 1) / nfe
        level = per_sample(after, x.ndim)
        goes_on = index < steps
        x = jnp.where(per_sample(goes_on, x.ndim), (1 - level) * x0 + level * fresh, x)
        return (x, jnp.where(goes_on, after, t)), None

    start = (noise, jnp.ones((batch,), dtype))
    (x, t), _ = jax.lax.scan(simulate, start, jnp.arange(max(nfes) - 1))
    return jax.lax.stop_gradient((x, t))
