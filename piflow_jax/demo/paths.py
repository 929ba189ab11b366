"""The way of one sample from noise to data: the student's rollout, and its teacher's steps.

Sources: rollouts are those of pi-Flow, arXiv 2510.14974, Alg. 1; a teacher takes Euler steps.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from piflow_jax.flow.policies import Policy
from piflow_jax.flow.policies.base import per_sample
from piflow_jax.flow.rollout import rollout
from piflow_jax.flow.schedule import FlowMapTimes, TimeWarp
from piflow_jax.flow.substeps import Rounding, Solver


class Way(NamedTuple):
    """One sample at `F` raw times.

    Attributes:
      states: `[F, *sites, C]`.
      x0: `[F, *sites, C]`, the data that the velocity points at.
      weights: `[F, *sites, K]`, where the mixture's weight is; None without a mixture.
    """

    states: np.ndarray
    x0: np.ndarray
    weights: np.ndarray | None = None


def follow_policy(
    predict: Callable[[jax.Array, jax.Array], Policy],
    noise: jax.Array,
    times: FlowMapTimes,
    warp: TimeWarp,
    taus: np.ndarray,
    *,
    substeps: int,
    solver: Solver,
    rounding: Rounding,
) -> Way:
    """Follows a student's policies; the last state is its sample.

    A state is what the rollout from the start of its segment makes of it, with as many substeps as
    the sampler takes over that interval. So states do not depend on which others are asked for.

    Args:
      predict: `(x[B, *sites, C], t[B]) -> policy`, one network evaluation.
      noise: `[1, *sites, C]`.
      times: from `sampling_times` without noise between segments, known numbers.
      warp: raw time to noise level.
      taus: raw times `[F]` at which to look, in [0, 1].
      substeps: policy substeps per unit of raw time.
      solver: solver of the rollouts.
      rounding: rounding of their substeps.

    Returns:
      The way. At the border of two segments it is that of the earlier one.
    """
    options = {"solver": solver, "rounding": rounding}
    src, dst = (warp.unwarp(np.asarray(level)) for level in (times.src, times.dst))

    def segment(x, ends):
        begin, end = (jnp.full((1,), tau, x.dtype) for tau in ends)
        policy = predict(x, warp.warp(begin))

        def look(tau):
            there = jnp.clip(tau, end, begin)
            state, t = rollout(policy, x, begin, there, warp, substeps, **options)
            x0 = state - per_sample(t, x.ndim) * policy.velocity(state, t)
            weights = policy.weights(state, t)[0] if hasattr(policy, "weights") else None
            return state[0], x0[0], weights

        found = jax.vmap(look)(jnp.asarray(taus, x.dtype))
        return rollout(policy, x, begin, end, warp, substeps, **options)[0], found

    ends = (jnp.asarray(src, noise.dtype), jnp.asarray(dst, noise.dtype))
    _, found = jax.lax.scan(segment, noise, ends)
    # The first segment that reaches down to each raw time.
    owner = np.argmax(dst[:, None] <= np.asarray(taus) + 1e-6, axis=0)
    return Way(*jax.tree.map(lambda a: a[owner, np.arange(len(taus))], found))


def step_teacher(
    velocity: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, levels: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Euler steps of a teacher between given noise levels.

    Args:
      velocity: `(x[B, *sites, C], t[B]) -> u[B, *sites, C]`, guided.
      x: `[B, *sites, C]`, states at the first level.
      levels: `[N + 1]`, falling; they may be traced.

    Returns:
      `(x_end[B, *sites, C], states[N, B, *sites, C], velocities[N, B, *sites, C])`, the states at
      the beginning of each step.
    """

    def step(x, ends):
        begin, end = ends
        u = velocity(x, jnp.full(x.shape[:1], begin)).astype(x.dtype)
        return x + (end - begin) * u, (x, u)

    end, (states, velocities) = jax.lax.scan(step, x, (levels[:-1], levels[1:]))
    return end, states, velocities


def teacher_way(
    states: np.ndarray, velocities: np.ndarray, warp: TimeWarp, taus: np.ndarray
) -> Way:
    """A teacher's way; within an Euler step its velocity stays as it is.

    Args:
      states: `[N, *sites, C]`, at the beginning of steps uniform in raw time from 1 to 0.
      velocities: `[N, *sites, C]`.
      warp: raw time to noise level.
      taus: raw times `[F]` at which to look, in [0, 1].

    Returns:
      The way.
    """
    steps, taus = len(states), np.asarray(taus, np.float64)
    step = np.clip(np.floor((1 - taus) * steps + 1e-6), 0, steps - 1).astype(int)
    level, begin = (np.asarray(warp.warp(tau), np.float32) for tau in (taus, 1 - step / steps))
    level, begin = (per_sample(a, np.ndim(states)) for a in (level, begin))
    found = states[step] + (level - begin) * velocities[step]
    return Way(np.asarray(found), np.asarray(found - level * velocities[step]))


def between(first: jax.Array, second: jax.Array, count: int) -> jax.Array:
    """Noise that turns from one to another; all of it is standard normal.

    Args:
      first: noise `[N, *sites, C]`.
      second: independent noise of the same shape.
      count: number of noises, at least 2.

    Returns:
      `[N, count, *sites, C]`, from `first` to `second`.
    """
    angles = np.linspace(0, np.pi / 2, count, dtype=np.float32)
    shape = (1, count) + (1,) * (first.ndim - 1)
    ahead, aside = (f(angles).reshape(shape) for f in (np.cos, np.sin))
    return ahead * first[:, None] + aside * second[:, None]
