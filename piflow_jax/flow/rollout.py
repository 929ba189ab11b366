"""Rollouts of a policy over substeps uniform in raw time (paper, Alg. 1), or in closed form."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from piflow_jax.arguments import ROUNDING, check_between, check_choice, check_number, known, whole
from piflow_jax.flow.fused import fused_rollout
from piflow_jax.flow.policies.base import Policy, per_batch, per_sample, promote
from piflow_jax.flow.policies.gmflow import GMFlowPolicy
from piflow_jax.flow.schedule import TimeWarp, check_warp
from piflow_jax.flow.substeps import (
    Rounding,
    Solver,
    Substeps,
    check_substeps,
    step_weights,
)

__all__ = ["Implementation", "average_velocity", "rollout"]

Implementation = Literal["auto", "scan", "fused"]
"""How a rollout is computed, see `rollout`."""


def rollout(
    policy: Policy,
    x: jax.Array,
    tau_start: jax.Array,
    tau_end: jax.Array,
    warp: TimeWarp,
    total_substeps: int = 128,
    *,
    bound: int | Literal["traced"] | None = None,
    solver: Solver = "euler",
    rounding: Rounding = "round",
    implementation: Implementation = "auto",
) -> tuple[jax.Array, jax.Array]:
    """Integrates a policy from `tau_start` down to `tau_end`, per sample.

    A policy with a `displacement` is integrated exactly, in one evaluation. Any other policy is
    integrated by substeps: a sample takes `n = max(round((tau_start - tau_end) total_substeps), 1)`
    steps, uniform in raw time and stepped in the noise level. Substep counts differ within a batch.
    The loop runs to a common bound, and a sample that has arrived takes steps of length zero.

    Times are checked where their values are known. Where they are traced, a sample whose `tau_end`
    is above its `tau_start` takes one step up to it, and NaN gives NaN.

    Args:
      policy: the velocity field.
      x: `[B, *sites, C]`, states at `tau_start`; at least one.
      tau_start: `[B]`, raw times in [0, 1].
      tau_end: `[B]`, raw times not above `tau_start`; steps stop at 0.
      warp: raw time to noise level.
      total_substeps: substeps per unit of raw time, at most 2^24.
      bound: trip count of the loop. None is `total_substeps`, which suffices for any interval
        within [0, 1] and is differentiable. An integer is a tighter static bound: a sample that
        needs more substeps takes that many, longer ones. `"traced"` runs to the largest count in
        the batch, which is fastest where no reverse-mode gradient is needed.
      solver: `euler`, or `multistep`, of second order: two-step Adams-Bashforth, which reuses the
        velocity of the previous substep.
      rounding: how `n` becomes a whole number: `round`, half to even, as in training, or `ceil`, as
        in pi-Flow's sampler since its version 0.2.0.
      implementation: `scan` is the reference, a loop over substeps of the whole batch. `fused`
        takes a block of sites through all its substeps at once (`piflow_jax.kernels`); it exists
        for Gaussian mixtures in float32, and its derivatives are the reference's. `auto` is `fused`
        where possible.

    Returns:
      `(x_end[B, *sites, C], sigma_end[B])`.

    Raises:
      ValueError: if `total_substeps` or `bound` is out of range, the solver, the rounding or the
        implementation is unknown, `fused` is asked for but does not exist for the policy, shapes do
        not match, the batch is empty, or known times are out of range.
    """
    total_substeps = check_substeps(total_substeps, solver, rounding)
    if bound not in ("traced", None):
        bound = whole("bound", bound, 1)
    check_choice("implementation", implementation, get_args(Implementation))
    if not hasattr(policy, "velocity"):
        raise ValueError(f"policy must be a policy, with a velocity, got a {type(policy).__name__}")
    check_warp(warp)
    x, tau_start, tau_end = _interval(x, tau_start, tau_end)
    fusible = isinstance(policy, GMFlowPolicy) and policy.states == x.shape
    fusible = fusible and promote(x, policy.center)[0].dtype == jnp.float32
    if implementation == "fused" and not fusible:
        raise ValueError(
            "implementation='fused' is for a GMFlowPolicy in float32, not for a "
            f"{type(policy).__name__} at states {x.shape} in {x.dtype}; 'auto' takes the scan"
        )
    if hasattr(policy, "displacement"):
        sigma_end = warp.warp(jnp.maximum(tau_end, 0))
        return x + policy.displacement(x, warp.warp(tau_start), sigma_end), sigma_end
    trips = total_substeps if bound in ("traced", None) else bound
    substeps = Substeps.between(tau_start, tau_end, total_substeps, trips, rounding)

    def reference(policy, x, substeps):
        return _scan(policy, x, substeps, warp, solver, trips, bound == "traced")

    if implementation == "scan" or not fusible or trips == 1:
        x_end = reference(policy, x, substeps)
    else:
        fused = jax.custom_jvp(lambda *state: fused_rollout(*state, warp, solver, trips))
        # Covers both modes of differentiation. A program that differentiates nothing does not reach
        # it.
        fused.defjvp(lambda primals, tangents: jax.jvp(reference, primals, tangents))
        x_end = fused(policy, x, substeps)
    return x_end, warp.warp(substeps.time_after(substeps.count))


def _interval(
    x: jax.Array, tau_start: jax.Array, tau_end: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Checked states, and the raw times `[B]` at which the rollout starts and ends."""
    if np.ndim(x) < 2 or not np.size(x):
        raise ValueError(f"x must hold at least one state [B, *sites, C], got shape {np.shape(x)}")
    check_between("tau_start", tau_start, 0, 1, slack=ROUNDING)
    check_between("tau_end", tau_end, high=1, slack=ROUNDING)
    begin, end = known(tau_start), known(tau_end)
    x, tau_start, tau_end = promote(x, tau_start, tau_end)
    tau_start, tau_end = per_batch("tau_start", tau_start, x), per_batch("tau_end", tau_end, x)
    if begin is not None and end is not None and (end > begin + ROUNDING).any():
        raise ValueError("tau_end must not be above tau_start: policies are followed towards 0")
    return x, tau_start, tau_end


def _scan(
    policy: Policy,
    x: jax.Array,
    substeps: Substeps,
    warp: TimeWarp,
    solver: Solver,
    trips: int,
    traced: bool,
) -> jax.Array:
    """The reference: a loop over substeps of the whole batch."""

    def substep(index, carry):
        x, previous = carry
        begin, end = substeps.levels(index, warp)
        before, _ = substeps.levels(jnp.maximum(index - 1, 0), warp)
        velocity = policy.velocity(x, begin)
        weights = step_weights(before, begin, end, solver)
        step, step_previous = (per_sample(weight, x.ndim) for weight in weights)
        x = x + step * velocity
        return (x, ()) if solver == "euler" else (x + step_previous * previous, velocity)

    carry = (x, () if solver == "euler" else jnp.zeros_like(x))
    if traced:
        last = jnp.max(substeps.count).astype(jnp.int32)
        return jax.lax.fori_loop(0, last, substep, carry)[0]
    if trips == 1:
        return substep(jnp.zeros((), jnp.int32), carry)[0]
    # Recomputing the velocity in the backward pass stores one state per substep instead of K
    # components per substep.
    body = jax.checkpoint(lambda carry, index: (substep(index, carry), None), prevent_cse=False)
    return jax.lax.scan(body, carry, jnp.arange(trips))[0][0]


def average_velocity(
    policy: Policy,
    x: jax.Array,
    tau_start: jax.Array,
    tau_end: jax.Array,
    warp: TimeWarp,
    total_substeps: int = 128,
    eps: float = 1e-4,
    *,
    bound: int | None = None,
    solver: Solver = "euler",
) -> jax.Array:
    """Mean velocity of a policy over an interval (paper, App.: time smoothing).

    This is `(x - x_end) / max(t_start - t_end, eps)` of a rollout. Where the interval is shorter
    than two substeps, the quotient would be ill-conditioned, and the local velocity at `tau_start`
    takes its place.

    Args:
      policy: the velocity field; gradients flow into it.
      x: `[B, *sites, C]`, states at `tau_start`.
      tau_start: `[B]`, see `rollout`.
      tau_end: `[B]`.
      warp: raw time to noise level.
      total_substeps: substeps per unit of raw time.
      eps: lower bound on the difference of noise levels in the divisor.
      bound: static bound on the substeps, as for `rollout`. 0 or 1 declares that every interval
        rounds to fewer than two substeps, so that no rollout is compiled.
      solver: see `rollout`.

    Returns:
      `u[B, *sites, C]`.

    Raises:
      ValueError: see `rollout`.
    """
    check_number("eps", eps, 0, open_low=True)
    x, tau_start, tau_end = _interval(x, tau_start, tau_end)
    sigma_start = warp.warp(tau_start)
    local = policy.velocity(x, sigma_start)
    if bound is not None and bound < 2:
        return local
    x_end, sigma_end = rollout(
        policy, x, tau_start, tau_end, warp, total_substeps, bound=bound, solver=solver
    )
    length = per_sample(jnp.maximum(sigma_start - sigma_end, eps), x.ndim)
    is_short = jnp.round((tau_start - tau_end) * total_substeps) < 2
    return jnp.where(per_sample(is_short, x.ndim), local, (x - x_end) / length)
