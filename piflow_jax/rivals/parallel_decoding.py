"""Parallel decoding distillation, PDD: one output per interval of time (arXiv 2607.26004).

Raw time is divided into intervals, and the network has an output layer for each. From the state at
the start of a block it predicts the mean velocities over all of the block's intervals at once.
Their sum gives the state at the end of any of these intervals. Each output learns one step of the
teacher by plain regression, at the state that the student's own velocities lead to. Outputs belong
to intervals and not to blocks, so one network can sample with as many evaluations as there are ways
to form blocks.

In sampling, the paper fuses the output layers of a block into one. Here their outputs are added,
which gives the same numbers.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from piflow_jax.config import ModelConfig
from piflow_jax.flow.policies.base import per_sample
from piflow_jax.flow.schedule import TimeWarp
from piflow_jax.models import DXHead
from piflow_jax.rivals.base import Rival, Setting, Velocity, gradient_step, interpolate
from piflow_jax.systems.built_in import BuiltIn
from piflow_jax.systems.networks import teacher_network
from piflow_jax.systems.shapes import DataShape

__all__ = ["PDD", "block_bounds", "decode", "decoding_indices", "decoding_loss", "interval_levels"]

# From the paper's ImageNet run, where the teacher takes midpoint steps.
INTERVALS = 64


def interval_levels(warp: TimeWarp, intervals: int = INTERVALS) -> jax.Array:
    """Noise levels `[N + 1]` at the ends of the `intervals`, from 1 to 0, uniform before `warp`."""
    return jnp.asarray(warp.warp(np.linspace(1, 0, intervals + 1)), jnp.result_type(float))


def block_bounds(nfe: int, intervals: int = INTERVALS) -> np.ndarray:
    """Indices `[nfe + 1]` of the intervals where the blocks of `nfe` evaluations begin and end.

    Args:
      nfe: network evaluations.
      intervals: `N`.

    Returns:
      `[nfe + 1]`, from 0 to `N`; blocks are as equal as whole intervals allow.
    """
    return np.round(np.linspace(0, intervals, nfe + 1)).astype(np.int32)


def decoding_indices(
    key: jax.Array, batch: int, nfes: Sequence[int], intervals: int = INTERVALS
) -> tuple[jax.Array, jax.Array]:
    """Draws the start of a block and one of the intervals after it for training.

    Args:
      key: a PRNG key.
      batch: `B`.
      nfes: numbers of evaluations for later sampling.
      intervals: `N`.

    Returns:
      `(start[B], index[B])`. All block starts are equally likely, and so are all intervals in the
      longest block from a start.
    """
    start_key, index_key = jax.random.split(key)
    starts = np.unique(np.concatenate([block_bounds(nfe, intervals)[:-1] for nfe in nfes]))
    start = jax.random.choice(start_key, jnp.asarray(starts), (batch,))
    longest = np.max(np.diff(block_bounds(min(nfes), intervals)))
    stop = jnp.minimum(start + longest, intervals)
    return start, jax.random.randint(index_key, (batch,), start, stop)


def decode(
    velocities: jax.Array, x: jax.Array, levels: jax.Array, start: jax.Array, stop: jax.Array
) -> jax.Array:
    """The state to which a block's velocities lead, `x + sum_k (t_{k+1} - t_k) u_k`.

    Args:
      velocities: `[B, *sites, N, C]`, mean velocities over the intervals.
      x: `[B, *sites, C]`, states at the start of the interval `start`.
      levels: `[N + 1]`, see `interval_levels`.
      start: `[B]`, the first interval of the sum.
      stop: `[B]`, the interval after the last one.

    Returns:
      `[B, *sites, C]`, states at the start of the interval `stop`.
    """
    index = jnp.arange(len(levels) - 1)[None]
    inside = (index >= start[:, None]) & (index < stop[:, None])
    steps = jnp.where(inside, jnp.diff(levels)[None], 0)
    steps = jnp.expand_dims(steps, (*range(1, x.ndim - 1), x.ndim))
    return x + jnp.sum(steps * velocities, axis=-2)


def decoding_loss(
    network: Velocity,
    teacher: Velocity,
    x: jax.Array,
    levels: jax.Array,
    start: jax.Array,
    index: jax.Array,
) -> jax.Array:
    """`|u_k - v_k|^2` on one interval, with the teacher's midpoint step at the student's own state.

    Args:
      network: `(x[B, *sites, C], t[B]) -> u[B, *sites, N, C]`.
      teacher: `(x[B, *sites, C], t[B]) -> v[B, *sites, C]`; no gradient flows through it, nor into
        the state that it is evaluated at.
      x: `[B, *sites, C]`, states at the start of the interval `start`.
      levels: `[N + 1]`, see `interval_levels`.
      start: `[B]`, the first interval of the block.
      index: `[B]`, `k`, the interval in training.

    Returns:
      The loss, a scalar.
    """
    velocities = network(x, levels[start])
    state = decode(velocities, x, levels, start, index)
    t, half = levels[index], (levels[index + 1] - levels[index]) / 2
    middle = state + per_sample(half, x.ndim) * teacher(state, t)
    target = jax.lax.stop_gradient(teacher(middle, t + half))
    predicted = jnp.take_along_axis(velocities, per_sample(index, velocities.ndim), axis=-2)
    return jnp.mean(jnp.square(jnp.squeeze(predicted, -2) - target))


def _network(model: ModelConfig, data: DataShape) -> BuiltIn:
    network = teacher_network(model, data)
    return dataclasses.replace(network, module=network.module.clone(head=DXHead(INTERVALS)))


def _loss(setting: Setting, params, state, given, key, x0, labels):
    index_key, noise_key = jax.random.split(key)
    config, levels = setting.config, interval_levels(TimeWarp(setting.config.train.shift))
    start, index = decoding_indices(index_key, x0.shape[0], config.rivals.nfes)
    x = interpolate(x0, jax.random.normal(noise_key, x0.shape, x0.dtype), levels[start])
    teacher = setting.guided(given["teacher"], labels)
    return decoding_loss(setting.bind(params, labels), teacher, x, levels, start, index)


def _sample(network: Velocity, noise: jax.Array, nfe: int, warp: TimeWarp) -> jax.Array:
    levels = interval_levels(warp)

    def block(x, bounds):
        start, stop = (jnp.full(x.shape[:1], bound) for bound in bounds)
        return decode(network(x, levels[start]), x, levels, start, stop), None

    bounds = jnp.asarray(block_bounds(nfe))
    return jax.lax.scan(block, noise, (bounds[:-1], bounds[1:]))[0]


PDD = Rival(
    name="pdd",
    title="parallel decoding (PDD)",
    given="teacher",
    step=gradient_step(_loss),
    sample=_sample,
    network=_network,
)
