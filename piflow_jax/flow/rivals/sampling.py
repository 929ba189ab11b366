"""Samplers of the rivals: jumps along the flow, or to the data and back up."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from piflow_jax.flow.policies.base import per_sample
from piflow_jax.flow.schedule import TimeWarp, sampling_times

__all__ = ["flow_map_sample", "renoised_sample"]


def flow_map_sample(
    mean_velocity: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    noise: jax.Array,
    nfe: int,
    warp: TimeWarp,
) -> jax.Array:
    """Samples by `x_r = x_t - (t - r) u(x_t, t, t - r)` (MeanFlow, arXiv 2505.13447, Eq. 12).

    Args:
      mean_velocity: `(x[B, *sites, C], t[B], t - r [B]) -> u[B, *sites, C]`; traced once.
      noise: `[B, *sites, C]`, standard normal.
      nfe: evaluations, in steps uniform in raw time.
      warp: raw time to noise level.

    Returns:
      `x_0[B, *sites, C]`.

    Raises:
      ValueError: if `nfe` is below 1.
    """

    def step(x, levels):
        t, r = (jnp.full(x.shape[:1], level, x.dtype) for level in levels)
        return x - per_sample(t - r, x.ndim) * mean_velocity(x, t, t - r), None

    times = sampling_times(nfe, warp)
    levels = (jnp.asarray(times.src, noise.dtype), jnp.asarray(times.to, noise.dtype))
    return jax.lax.scan(step, noise, levels)[0]


def renoised_sample(
    velocity: Callable[[jax.Array, jax.Array], jax.Array],
    noise: jax.Array,
    nfe: int,
    warp: TimeWarp,
    key: jax.Array,
) -> jax.Array:
    """Samples by `x_0 = x_t - t u(x_t, t)` and fresh noise up to the next level.

    The multistep sampler of consistency models (arXiv 2303.01469, Alg. 1) and of DMD2 (arXiv
    2405.14867, Sec. 4.4).

    Args:
      velocity: `(x[B, *sites, C], t[B]) -> u[B, *sites, C]`; traced once.
      noise: `[B, *sites, C]`, standard normal.
      nfe: evaluations, at levels uniform in raw time.
      warp: raw time to noise level.
      key: typed PRNG keys `[B]` of the fresh noise, one for each sample.

    Returns:
      `x_0[B, *sites, C]`.

    Raises:
      ValueError: if `nfe` is below 1.
    """

    def step(x, inputs):
        t, r, index = inputs
        x0 = x - t * velocity(x, jnp.full(x.shape[:1], t, x.dtype))
        draw = jax.vmap(
            lambda one: jax.random.normal(jax.random.fold_in(one, index), x.shape[1:], x.dtype)
        )
        return (1 - r) * x0 + r * draw(key), None

    times = sampling_times(nfe, warp)
    levels = (jnp.asarray(times.src, noise.dtype), jnp.asarray(times.to, noise.dtype))
    return jax.lax.scan(step, noise, (*levels, jnp.arange(nfe)))[0]
