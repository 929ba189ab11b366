"""Shortcut models: a long step is two short ones (arXiv 2410.12557).

A network `s(x, t, d)` gives the mean velocity of a step of length `d`; at `d = 0` it is trained by
flow matching, and beyond by its own two steps of half the length (Eqs. 4 and 5). The paper has data
at `t = 1`; here steps go down, `x_{t-d} = x_t - d s(x_t, t, d)`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from piflow_jax.flow.policies.base import per_sample

__all__ = ["shortcut_steps", "shortcut_target"]


def shortcut_steps(key: jax.Array, batch: int, smallest: int = 128) -> tuple[jax.Array, jax.Array]:
    """Draws lengths of half steps, and the times at which the whole ones start (Sec. 3.2).

    Args:
      key: a PRNG key.
      batch: `B`.
      smallest: `M`, a power of two: the shortest half step is `1 / M`.

    Returns:
      `(t[B], d[B])`: `d` is uniform over `1 / 2, 1 / 4, ..., 1 / M`, and `t` over the multiples of
      `2 d` in `(0, 1]`.

    Raises:
      ValueError: if `smallest` is no power of two above 1.
    """
    levels = smallest.bit_length() - 1
    if smallest < 2 or smallest != 1 << levels:
        raise ValueError(f"smallest must be a power of two above 1, got {smallest}")
    level_key, time_key = jax.random.split(key)
    level = jax.random.randint(level_key, (batch,), 1, levels + 1)
    d = jnp.exp2(-level.astype(jnp.result_type(float)))
    starts = jnp.exp2((level - 1).astype(d.dtype))  # multiples of 2 d in (0, 1]
    index = jnp.floor(jax.random.uniform(time_key, (batch,), d.dtype) * starts)
    return 2 * d * (jnp.minimum(index, starts - 1) + 1), d


def shortcut_target(
    network: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    x: jax.Array,
    t: jax.Array,
    d: jax.Array,
    smallest: int = 128,
) -> jax.Array:
    """What a step of `2 d` should be: the mean of two steps of `d` (Eq. 4).

    Args:
      network: `(x[B, *sites, C], t[B], d[B]) -> s[B, *sites, C]`; the paper asks averaged weights.
      x: `[B, *sites, C]`, states at `t`.
      t: `[B]`, at least `2 d`.
      d: `[B]`, lengths of the half steps.
      smallest: `M`; steps of `1 / M` are asked as `d = 0`, where flow matching has taught them.

    Returns:
      `[B, *sites, C]`, without gradient.
    """
    asked = jnp.where(d <= 1 / smallest, 0, d)
    first = network(x, t, asked)
    halfway = x - per_sample(d, x.ndim) * first
    second = network(halfway, t - d, asked)
    return jax.lax.stop_gradient((first + second) / 2)
