"""Shortcut models: one long step equals two short ones (arXiv 2410.12557).

A network `s(x, t, d)` gives the mean velocity of a step of length `d`. At `d = 0` it is trained by
flow matching, and at larger `d` by its own two steps of half the length (Eqs. 4 and 5). The paper
has data at `t = 1`. Here steps go down: `x_{t-d} = x_t - d s(x_t, t, d)`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from piflow_jax.flow.policies.base import per_sample
from piflow_jax.flow.schedule import TimeWarp
from piflow_jax.rivals.base import Setting, gradient_step
from piflow_jax.rivals.flow_map import MeanVelocity, flow_map_rival, flow_map_sample, flow_states

__all__ = ["SHORTCUT", "shortcut_steps", "shortcut_target"]

# The shortest step, and the share of a batch that bootstraps (Sec. 4).
SHORTEST = 128
BOOTSTRAP_SHARE = 4


def shortcut_steps(key: jax.Array, batch: int, smallest: int = 128) -> tuple[jax.Array, jax.Array]:
    """Draws lengths of half steps, and the times at which the whole steps start (Sec. 3.2).

    Args:
      key: a PRNG key.
      batch: `B`.
      smallest: `M`, a power of two: the shortest half step is `1 / M`.

    Returns:
      `(t[B], d[B])`: `d` is uniform over `1 / 2, 1 / 4, ..., 1 / M`, and `t` over the multiples of
      `2 d` in `(0, 1]`.

    Raises:
      ValueError: if `smallest` is not a power of two above 1.
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
    """The target of a step of `2 d`: the mean of two steps of `d` (Eq. 4).

    Args:
      network: `(x[B, *sites, C], t[B], d[B]) -> s[B, *sites, C]`; the paper uses averaged weights.
      x: `[B, *sites, C]`, states at `t`.
      t: `[B]`, at least `2 d`.
      d: `[B]`, lengths of the half steps.
      smallest: `M`; steps of `1 / M` use `d = 0`, which flow matching trains.

    Returns:
      `[B, *sites, C]`, without gradient.
    """
    asked = jnp.where(d <= 1 / smallest, 0, d)
    first = network(x, t, asked)
    halfway = x - per_sample(d, x.ndim) * first
    second = network(halfway, t - d, asked)
    return jax.lax.stop_gradient((first + second) / 2)


def _coded(network: Callable[..., jax.Array]) -> MeanVelocity:
    """Encodes a length by its logarithm, from 1 / 8 to 1, and a length of 0 by 0."""

    def coded(x, t, d):
        levels = SHORTEST.bit_length()
        code = (jnp.log2(jnp.maximum(d, 1e-9) * SHORTEST) + 1) / levels
        return network(x, t, jnp.where(d > 0, code, 0))

    return coded


def _loss(setting: Setting, params, state, given, key, x0, labels):
    keys = jax.random.split(key, 4)
    batch = x0.shape[0]
    boot = max(batch // BOOTSTRAP_SHARE, 1)
    t_boot, d_boot = shortcut_steps(keys[0], boot, SHORTEST)
    t = jnp.concatenate([t_boot, jax.random.uniform(keys[1], (batch - boot,))])

    def bound(params, labels):
        return _coded(setting.bind(params, labels))

    averaged = functools.partial(bound, state.ema_params)
    x, velocity, dropped = flow_states(setting, averaged, keys[2:], x0, t, labels)
    # Longer steps keep their labels, because the underlying flow has the guidance built in.
    labels = jnp.concatenate([labels[:boot], dropped[boot:]])
    target = shortcut_target(averaged(labels[:boot]), x[:boot], t_boot, d_boot, SHORTEST)
    target = jnp.concatenate([target, velocity[boot:]])
    steps = jnp.concatenate([2 * d_boot, jnp.zeros((batch - boot,))])
    return jnp.mean(jnp.square(bound(params, labels)(x, t, steps) - target))


def _sample(network: MeanVelocity, noise: jax.Array, nfe: int, warp: TimeWarp) -> jax.Array:
    # No `warp`: the network is trained at levels uniform in t.
    return flow_map_sample(_coded(network), noise, nfe, TimeWarp())


SHORTCUT = flow_map_rival(
    name="shortcut", title="shortcut", step=gradient_step(_loss), sample=_sample
)
