"""Samplers: few-step students by policy rollouts, teachers by their flow ODE."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from piflow_jax.flow.policies.base import Policy, promote
from piflow_jax.flow.rollout import rollout
from piflow_jax.flow.schedule import TimeWarp, sampling_times
from piflow_jax.flow.substeps import Solver

__all__ = ["few_step_sample", "ode_sample"]


def few_step_sample(
    policy_fn: Callable[[jax.Array, jax.Array], Policy],
    noise: jax.Array,
    nfe: int,
    warp: TimeWarp,
    *,
    total_substeps: int = 128,
    final_step_size_scale: float = 1.0,
    h: float = 0.0,
    temperature: float = 1.0,
    key: jax.Array | None = None,
    start: float = 1.0,
    solver: Solver = "euler",
) -> jax.Array:
    """Samples from a pi-Flow student (paper, Alg. 1; flow-map SDE of its Sec. 4).

    Args:
      policy_fn: `(x[B, *sites, C], sigma[B]) -> policy`, one network evaluation; traced once.
      noise: `[B, *sites, C]`, standard normal; or states at the noise level `start`.
      nfe: network evaluations, at least 1.
      warp: raw time to noise level.
      total_substeps: policy substeps per unit of raw time.
      final_step_size_scale: relative length of the last segment.
      h: stochasticity between segments; 0 is deterministic, `inf` renews all noise.
      temperature: mixture temperature of all evaluations but the last, in (0, 1]; needs a policy
        with `with_temperature` when it is not 1.
      key: PRNG key of the noise between segments, needed only when `h > 0`; one for all, or typed
        keys `[B]`, with which a sample's noise does not depend on the others.
      start: noise level of `noise`; below 1 for image to image.
      solver: of the rollouts, `euler` or `multistep`; see `rollout`.

    Returns:
      `x_0[B, *sites, C]` in float32 or float64.

    Raises:
      ValueError: if `h > 0` without a key, if a policy has no temperature or it is out of range,
        `nfe < 1`, or the solver is unknown.
    """
    times = sampling_times(nfe, warp, final_step_size_scale, h, start)
    if not 0 < temperature <= 1:
        raise ValueError(f"temperature must be in (0, 1], got {temperature}")
    if h > 0 and key is None:
        raise ValueError("h > 0 draws noise between segments and needs key")
    (x,) = promote(noise)
    batch, dtype = x.shape[0], x.dtype
    # The longest segment bounds every rollout; a compile-time number, as the times are.
    lengths = warp.unwarp(times.src) - warp.unwarp(times.dst)
    bound = max(int(np.max(np.round(lengths * total_substeps))), 1)

    def segment(x, inputs):
        src, dst, to, m, index = inputs
        sigma = jnp.full((batch,), src, dtype)
        policy = policy_fn(x, sigma)
        if temperature != 1:
            if not hasattr(policy, "with_temperature"):
                raise ValueError(f"{type(policy).__name__} has no temperature")
            policy = policy.with_temperature(jnp.where(index < nfe - 1, temperature, 1.0))
        tau_dst = jnp.full((batch,), warp.unwarp(dst), dtype)
        tau_src = warp.unwarp(sigma)
        x, _ = rollout(
            policy, x, tau_src, tau_dst, warp, total_substeps, bound=bound, solver=solver
        )
        if h > 0:
            fresh = _fresh_noise(key, index, x.shape, dtype)
            x = (1 - to + to * m) * x + to * jnp.sqrt(1 - jnp.square(m)) * fresh
        return x.astype(dtype), None

    inputs = (*(jnp.asarray(value, dtype) for value in times), jnp.arange(nfe))
    x, _ = jax.lax.scan(segment, x, inputs)
    return x


def _fresh_noise(key: jax.Array, index: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
    def draw(key, shape):
        return jax.random.normal(jax.random.fold_in(key, index), shape, dtype)

    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim == 1:
        return jax.vmap(lambda one: draw(one, shape[1:]))(key)
    return draw(key, shape)


def ode_sample(
    velocity_fn: Callable[[jax.Array, jax.Array], jax.Array],
    noise: jax.Array,
    steps: int,
    warp: TimeWarp,
    solver: Literal["euler", "heun"] = "euler",
) -> jax.Array:
    """Samples from a flow-matching teacher by integrating its ODE from noise to data.

    The Euler steps are those by which the paper's teachers sample; Heun as in arXiv 2206.00364.

    Args:
      velocity_fn: `(x[B, *sites, C], sigma[B]) -> u[B, *sites, C]`, with guidance; traced once
        (twice for `heun`).
      noise: `[B, *sites, C]`, standard normal.
      steps: steps uniform in raw time, at least 1.
      warp: raw time to noise level.
      solver: `euler`, one evaluation a step, or `heun`, second order, two evaluations a step.

    Returns:
      `x_0[B, *sites, C]` in float32 or float64.

    Raises:
      ValueError: if `steps < 1` or the solver is unknown.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if solver not in ("euler", "heun"):
        raise ValueError(f"unknown solver {solver!r}; it is 'euler' or 'heun'")
    (x,) = promote(noise)
    batch, dtype = x.shape[0], x.dtype
    sigmas = jnp.asarray(warp.warp(np.linspace(1, 0, steps + 1)), dtype)

    def step(x, levels):
        start, end = levels
        u = velocity_fn(x, jnp.full((batch,), start)).astype(dtype)
        if solver == "heun":
            x_end = x + (end - start) * u
            u = (u + velocity_fn(x_end, jnp.full((batch,), end)).astype(dtype)) / 2
        return x + (end - start) * u, None

    x, _ = jax.lax.scan(step, x, (sigmas[:-1], sigmas[1:]))
    return x
