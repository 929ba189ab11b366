"""Rollouts: Euler integration of a policy over substeps uniform in raw time (paper, Alg. 1)."""

from typing import Literal

import jax
import jax.numpy as jnp

from piflow_jax.flow.policies.base import Policy, per_sample, promote
from piflow_jax.flow.schedule import TimeWarp

__all__ = ["average_velocity", "num_substeps", "rollout"]


def num_substeps(delta_tau: jax.Array, total_substeps: int) -> jax.Array:
    """Substeps of an interval of raw time: rounded half to even, at least one. Any shape."""
    return jnp.maximum(jnp.round(delta_tau * total_substeps), 1)


def rollout(
    policy: Policy,
    x: jax.Array,
    tau_start: jax.Array,
    tau_end: jax.Array,
    warp: TimeWarp,
    total_substeps: int = 128,
    *,
    bound: int | Literal["traced"] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Integrates a policy from `tau_start` down to `tau_end`, per sample.

    A policy with a `displacement` is integrated exactly, in one evaluation; others by substeps.
    A sample takes `n = max(round((tau_start - tau_end) total_substeps), 1)` Euler steps, uniform in
    raw time and stepped in the noise level. Substep counts differ within a batch: the loop runs to
    a common bound, and a sample that has arrived takes steps of length zero.

    Args:
      policy: the velocity field.
      x: `[B, *sites, C]`, states at `tau_start`.
      tau_start: `[B]`, raw times in [0, 1].
      tau_end: `[B]`, raw times not above `tau_start`; steps stop at 0.
      warp: raw time to noise level.
      total_substeps: substeps per unit of raw time.
      bound: trip count of the loop. None is `total_substeps`, enough for any interval within
        [0, 1], and differentiable. An integer is a tighter static bound: a sample that would need
        more substeps takes that many longer ones. `"traced"` runs to the largest count in the
        batch, the fastest where no reverse-mode gradient is needed.

    Returns:
      `(x_end[B, *sites, C], sigma_end[B])`.

    Raises:
      ValueError: if `total_substeps` or `bound` is below 1.
    """
    if total_substeps < 1:
        raise ValueError(f"total_substeps must be at least 1, got {total_substeps}")
    x, tau_start, tau_end = promote(x, tau_start, tau_end)
    if hasattr(policy, "displacement"):
        sigma_end = warp.warp(jnp.maximum(tau_end, 0))
        return x + policy.displacement(x, warp.warp(tau_start), sigma_end), sigma_end
    delta = tau_start - tau_end
    count = num_substeps(delta, total_substeps)
    if bound != "traced":
        trips = total_substeps if bound is None else bound
        if trips < 1:
            raise ValueError(f"bound must be at least 1, got {bound}")
        count = jnp.minimum(count, trips)
    step_size = delta / count

    def time_after(steps):
        return jnp.maximum(tau_start - step_size * jnp.minimum(steps, count), 0)

    def substep(index, x):
        # A sample that has arrived is evaluated at its last substep again, with step zero: never
        # beyond its end, where the velocity may be singular and 0 * inf would poison gradients.
        sigma = warp.warp(time_after(jnp.minimum(index, count - 1)))
        step = jnp.where(index < count, warp.warp(time_after(index + 1)) - sigma, 0)
        return x + per_sample(step, x.ndim) * policy.velocity(x, sigma)

    if bound == "traced":
        x = jax.lax.fori_loop(0, jnp.max(count).astype(jnp.int32), substep, x)
    elif trips == 1:
        x = substep(jnp.zeros((), jnp.int32), x)
    else:
        # Recomputing the velocity in the backward pass keeps the memory at one state a substep
        # instead of K components a substep.
        body = jax.checkpoint(lambda x, index: (substep(index, x), None), prevent_cse=False)
        x, _ = jax.lax.scan(body, x, jnp.arange(trips))
    return x, warp.warp(time_after(count))


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
) -> jax.Array:
    """Mean velocity of a policy over an interval (paper, App.: time smoothing).

    `(x - x_end) / max(t_start - t_end, eps)` of a rollout, or the local velocity at `tau_start`
    where the interval is shorter than two substeps and the quotient would be ill-conditioned.

    Args:
      policy: the velocity field; gradients flow into it.
      x: `[B, *sites, C]`, states at `tau_start`.
      tau_start: `[B]`.
      tau_end: `[B]`.
      warp: raw time to noise level.
      total_substeps: substeps per unit of raw time.
      eps: smallest difference of noise levels divided by.
      bound: static bound on the substeps, as for `rollout`; 0 or 1 says that every interval is
        shorter than two substeps, and no rollout is compiled.

    Returns:
      `u[B, *sites, C]`.
    """
    x, tau_start, tau_end = promote(x, tau_start, tau_end)
    sigma_start = warp.warp(tau_start)
    local = policy.velocity(x, sigma_start)
    if bound is not None and bound < 2:
        return local
    x_end, sigma_end = rollout(policy, x, tau_start, tau_end, warp, total_substeps, bound=bound)
    length = per_sample(jnp.maximum(sigma_start - sigma_end, eps), x.ndim)
    is_short = jnp.round((tau_start - tau_end) * total_substeps) < 2
    return jnp.where(per_sample(is_short, x.ndim), local, (x - x_end) / length)
