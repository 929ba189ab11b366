"""Samplers: few-step students by policy rollouts, teachers by their flow's ODE or SDE."""

import functools
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from piflow_jax.arguments import check_choice, check_number, check_shape, whole
from piflow_jax.flow.policies.base import Policy, promote
from piflow_jax.flow.rollout import Implementation, rollout
from piflow_jax.flow.schedule import FlowMapTimes, TimeWarp, check_warp, sampling_times
from piflow_jax.flow.substeps import (
    Rounding,
    Solver,
    check_substeps,
    num_substeps,
    step_weights,
)
from piflow_jax.keys import as_key, folded_noise

__all__ = ["few_step_sample", "ode_sample", "sample_segments", "sde_sample", "segment_substeps"]

OdeSolver = Literal["euler", "heun", "multistep"]


def few_step_sample(
    policy_fn: Callable[[jax.Array, jax.Array], Policy],
    noise: jax.Array,
    nfe: int,
    warp: TimeWarp,
    *,
    total_substeps: int = 128,
    final_step_size_scale: float = 1.0,
    h: float = 0.0,
    temperature: float | jax.Array = 1.0,
    key: jax.Array | None = None,
    start: float = 1.0,
    solver: Solver = "euler",
    rounding: Rounding = "round",
) -> jax.Array:
    """Samples from a pi-Flow student (paper, Alg. 1; flow-map SDE of its Sec. 4).

    The program is compiled for the given `h` and `start`. `sample_segments` does the same with
    times that are arguments of the program.

    Args:
      policy_fn: `(x[B, *sites, C], sigma[B]) -> policy`, one network evaluation; traced once.
      noise: `[B, *sites, C]`, standard normal; or states at the noise level `start`.
      nfe: network evaluations, at least 1.
      warp: raw time to noise level.
      total_substeps: policy substeps per unit of raw time.
      final_step_size_scale: relative length of the last segment.
      h: stochasticity between segments; 0 is deterministic, `inf` renews all noise.
      temperature: mixture temperature of all evaluations but the last, a scalar in (0, 1]. Other
        values than 1 need a policy with `with_temperature`. A traced one is clipped.
      key: PRNG key of the noise between segments, needed only when `h > 0`: one for all samples, or
        typed keys `[B]`, with which a sample's noise does not depend on the other samples.
      start: noise level of `noise`; below 1 for image to image.
      solver: solver of the rollouts, `euler` or `multistep`; see `rollout`.
      rounding: rounding of the rollouts' substeps, `round` or `ceil`; see `rollout`. pi-Flow's own
        sampler uses `ceil` since its version 0.2.0.

    Returns:
      `x_0[B, *sites, C]` in float32 or float64.

    Raises:
      ValueError: if `h > 0` without a key, if a policy has no temperature, a number is out of
        range, `h` or `start` is traced, or the solver or the rounding is unknown.
    """
    times = sampling_times(nfe, warp, final_step_size_scale, h, start)
    return sample_segments(
        policy_fn,
        noise,
        times,
        warp,
        total_substeps=total_substeps,
        temperature=temperature,
        key=key,
        solver=solver,
        rounding=rounding,
    )


def sample_segments(
    policy_fn: Callable[[jax.Array, jax.Array], Policy],
    noise: jax.Array,
    times: FlowMapTimes,
    warp: TimeWarp,
    *,
    total_substeps: int = 128,
    temperature: float | jax.Array = 1.0,
    key: jax.Array | None = None,
    solver: Solver = "euler",
    rounding: Rounding = "round",
    implementation: Implementation = "auto",
) -> jax.Array:
    """Samples from a pi-Flow student at given times (paper, Alg. 1); see `few_step_sample`.

    Traced times and temperatures are arguments of the program, which then serves all values of `h`,
    `start` and `temperature`. Their values determine the length of its rollouts, so it has no
    reverse-mode gradient. With known times it has one.

    Args:
      policy_fn: see `few_step_sample`.
      noise: `[B, *sites, C]`, states at `times.src[0]`.
      times: from `sampling_times`.
      warp: raw time to noise level, the same as for the times.
      total_substeps: policy substeps per unit of raw time.
      temperature: a scalar, see `few_step_sample`.
      key: one PRNG key or `[B]`, see `few_step_sample`. Known times decide whether noise is drawn
        and a key is needed. With traced times noise is drawn where `m` is below 1 and a key is
        given.
      solver: see `few_step_sample`.
      rounding: see `few_step_sample`.
      implementation: implementation of the rollouts, see `rollout`.

    Returns:
      `x_0[B, *sites, C]` in float32 or float64.

    Raises:
      ValueError: see `few_step_sample`.
    """
    total_substeps = check_substeps(total_substeps, solver, rounding)
    check_number("temperature", temperature, 0, 1, open_low=True)
    traced = any(isinstance(value, jax.core.Tracer) for value in times)
    if not traced:
        times = FlowMapTimes(*(np.asarray(value, np.float64) for value in times))
    noisy = key is not None if traced else bool((times.m < 1).any())
    if noisy and key is None:
        raise ValueError("h > 0 draws noise between segments and needs key")
    if key is not None and not isinstance(key, jax.Array):
        key = as_key(key)
    check_warp(warp)
    x = _states(noise)
    nfe, batch, dtype = times.src.shape[0], x.shape[0], x.dtype
    tau_src, tau_dst = warp.unwarp(times.src), warp.unwarp(times.dst)
    bound = "traced"
    if not traced:
        # The longest segment bounds every rollout. It is a compile-time number, as the times are.
        bound = int(segment_substeps(times, warp, total_substeps, rounding).max())
    sharpened = isinstance(temperature, jax.core.Tracer) or temperature != 1

    def segment(x, inputs):
        src, start, end, to, m, index = inputs
        policy = policy_fn(x, jnp.full((batch,), src))
        if sharpened and not hasattr(policy, "with_temperature"):
            raise ValueError(f"{type(policy).__name__} has no temperature")
        if sharpened and nfe > 1:
            policy = policy.with_temperature(jnp.where(index < nfe - 1, temperature, 1.0))
        x, _ = rollout(
            policy,
            x,
            jnp.full((batch,), start),
            jnp.full((batch,), end),
            warp,
            total_substeps,
            bound=bound,
            solver=solver,
            rounding=rounding,
            implementation=implementation,
        )

        def renewed(x):
            fresh = folded_noise(key, index, x.shape, dtype)
            return (1 - to + to * m) * x + to * jnp.sqrt(1 - jnp.square(m)) * fresh

        if noisy:
            x = jax.lax.cond(m < 1, renewed, lambda x: x, x) if traced else renewed(x)
        return x.astype(dtype), None

    values = (times.src, tau_src, tau_dst, times.to, times.m)
    inputs = (*(jnp.asarray(value, dtype) for value in values), jnp.arange(nfe))
    x, _ = jax.lax.scan(segment, x, inputs)
    return x


def segment_substeps(
    times: FlowMapTimes, warp: TimeWarp, total_substeps: int, rounding: Rounding
) -> np.ndarray:
    """Number of substeps in each of a sampler's segments (paper, Alg. 1).

    Args:
      times: from `sampling_times`.
      warp: raw time to noise level.
      total_substeps: policy substeps per unit of raw time.
      rounding: how their number is rounded to an integer.

    Returns:
      Whole numbers `[nfe]`.
    """
    lengths = warp.unwarp(times.src) - warp.unwarp(times.dst)
    return num_substeps(lengths, total_substeps, rounding).astype(int)


def _states(noise: jax.Array) -> jax.Array:
    if np.ndim(noise) < 2 or not np.size(noise):
        raise ValueError(
            f"noise must hold at least one state [B, *sites, C], got shape {np.shape(noise)}"
        )
    return promote(noise)[0]


def ode_sample(
    velocity_fn: Callable[[jax.Array, jax.Array], jax.Array],
    noise: jax.Array,
    steps: int,
    warp: TimeWarp,
    solver: OdeSolver = "euler",
) -> jax.Array:
    """Samples from a flow-matching teacher by integrating its ODE from noise to data.

    The paper's teachers sample with these Euler steps. Heun's method follows arXiv 2206.00364. The
    multistep method is that of policies: two-step Adams-Bashforth in the noise level, whose first
    step is Euler's.

    Args:
      velocity_fn: `(x[B, *sites, C], sigma[B]) -> u[B, *sites, C]`, with guidance; traced once
        (twice for `heun`).
      noise: `[B, *sites, C]`, standard normal.
      steps: steps uniform in raw time, at least 1.
      warp: raw time to noise level.
      solver: `euler`, one evaluation per step; `heun`, of second order, two evaluations per step;
        or `multistep`, of second order, one evaluation per step.

    Returns:
      `x_0[B, *sites, C]` in float32 or float64.

    Raises:
      ValueError: if `steps < 1`, the solver is unknown, or velocities differ in shape from their
        states.
    """
    steps = whole("steps", steps, 1)
    check_choice("solver", solver, get_args(OdeSolver))
    check_warp(warp)
    x = _states(noise)
    dtype = x.dtype
    sigmas = jnp.asarray(warp.warp(np.linspace(1, 0, steps + 1)), dtype)
    velocity = functools.partial(_velocity, velocity_fn)

    def one_step(x, levels):
        start, end = levels
        u = velocity(x, start)
        if solver == "heun":
            u = (u + velocity(x + (end - start) * u, end)) / 2
        return x + (end - start) * u, None

    def two_steps(carry, levels):
        x, previous = carry
        u = velocity(x, levels[1])
        now, before = step_weights(*levels, solver)
        return (x + now * u + before * previous, u), None

    if solver != "multistep":
        return jax.lax.scan(one_step, x, (sigmas[:-1], sigmas[1:]))[0]
    before = jnp.concatenate([sigmas[:1], sigmas[:-2]])
    (x, _), _ = jax.lax.scan(two_steps, (x, jnp.zeros_like(x)), (before, sigmas[:-1], sigmas[1:]))
    return x


def sde_sample(
    velocity_fn: Callable[[jax.Array, jax.Array], jax.Array],
    noise: jax.Array,
    steps: int,
    warp: TimeWarp,
    key: jax.Array,
    *,
    h: float | Callable[[float], float] | None = None,
    terminal_sigma: float = 0.04,
) -> jax.Array:
    """Samples from a flow-matching teacher by an SDE with the marginals of its ODE.

    It is the SDE `dx = ((1 + h^2) u + h^2 x / (1 - t)) dt + h sqrt(2 t / (1 - t)) dw`, from `t = 1`
    down to 0, by the Euler-Maruyama method. The release of pi-Flow (arXiv 2510.14974) samples its
    ImageNet teachers in this way (`FlowSDE`, in 250 steps), with the default `h` and
    `terminal_sigma`.

    Args:
      velocity_fn: see `ode_sample`; traced once.
      noise: `[B, *sites, C]`, standard normal.
      steps: steps, at least 1, one evaluation each. Levels are uniform in raw time and then
        stretched until the last step begins at `terminal_sigma`. That step adds no noise.
      warp: raw time to noise level.
      key: PRNG key of the noise of all steps: one for all samples, or typed keys `[B]`.
      h: stochasticity, a number or a function of the noise level; 0 is the ODE by Euler's steps.
        None is `sqrt(1 - t)`, whose noise is finite at `t = 1`.
      terminal_sigma: noise level at which the last step begins, in (0, 1].

    Returns:
      `x_0[B, *sites, C]` in float32 or float64.

    Raises:
      ValueError: if a number is out of range, or velocities differ in shape from their states.
    """
    steps = whole("steps", steps, 1)
    check_number("terminal_sigma", terminal_sigma, 0, 1, open_low=True)
    check_warp(warp)
    key = key if isinstance(key, jax.Array) else as_key(key)
    x = _states(noise)
    levels = np.asarray(warp.warp(np.linspace(1, 0, steps, endpoint=False)), np.float64)
    if steps > 1:
        levels = 1 - (1 - levels) * (1 - terminal_sigma) / (1 - levels[-1])
    levels = np.append(levels, 0)
    begin, length = levels[:-1], levels[:-1] - levels[1:]
    square = 1 - begin if h is None else _stochasticity(h, begin) ** 2
    # h^2 / (1 - t): at t = 1 the limit for the default h, and the release's value for any other.
    drift = np.divide(square, 1 - begin, out=np.ones(steps), where=begin < 1 - 1e-6)
    drift *= square.any()  # without any noise it is the ODE
    spread = np.sqrt(2 * drift * length * begin) * (levels[1:] > 0)
    inputs = (begin, 1 - length * drift, -length * (1 + square), spread)

    def step(x, inputs):
        begin, kept, step, spread, index = inputs
        fresh = folded_noise(key, index, x.shape, x.dtype)
        return kept * x + step * _velocity(velocity_fn, x, begin) + spread * fresh, None

    inputs = (*(jnp.asarray(value, x.dtype) for value in inputs), jnp.arange(steps))
    return jax.lax.scan(step, x, inputs)[0]


def _velocity(
    velocity_fn: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, level: jax.Array
) -> jax.Array:
    u = velocity_fn(x, jnp.full(x.shape[:1], level))
    check_shape("the velocity", u, x.shape, "its state")
    return u.astype(x.dtype)


def _stochasticity(h: float | Callable[[float], float], levels: np.ndarray) -> np.ndarray:
    values = [h(float(level)) if callable(h) else h for level in levels]
    for value in values:
        check_number("h", value, 0)
    return np.asarray(values, np.float64)
