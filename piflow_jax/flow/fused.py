"""Prepares the fused rollout of a Gaussian-mixture policy for `kernels` (paper, Alg. 1)."""

import jax
import jax.numpy as jnp

from piflow_jax.flow.policies.base import per_sample
from piflow_jax.flow.policies.gmflow import GMFlowPolicy
from piflow_jax.flow.schedule import TimeWarp
from piflow_jax.flow.substeps import Solver, Substeps, step_weights
from piflow_jax.kernels import Recurrence, mixture_rollout

__all__ = ["fused_rollout"]


def fused_rollout(
    policy: GMFlowPolicy,
    x: jax.Array,
    substeps: Substeps,
    warp: TimeWarp,
    solver: Solver,
    most: int,
) -> jax.Array:
    """Where a rollout ends; see `rollout`.

    The rollout follows the state relative to the mixture's centre, `y = x - (1 - t) r`. A step `h`
    of the velocity `u` in the noise level moves `y` by `h (u + r)`, in which the centre cancels.
    Near the data, `y` therefore loses less to rounding than `x`.

    Args:
      policy: the mixture.
      x: `float32[B, *sites, C]`, states at the start.
      substeps: the substeps of each sample.
      warp: raw time to noise level.
      solver: see `rollout`.
      most: upper bound on the substeps of a sample.

    Returns:
      `float32[B, *sites, C]`.
    """
    begin, end = substeps.levels(jnp.arange(most)[None], warp)
    before = jnp.concatenate([begin[:, :1], begin[:, :-1]], axis=1)
    step, step_previous = step_weights(before, begin, end, solver)
    of = policy.coefficients(begin)
    recurrence = Recurrence(
        pull=of.pull,
        pull_src=of.pull_src,
        pull_center=of.pull * of.lift,
        half_zeta=of.half_zeta,
        gain=of.weight / of.denominator,
        gain_src=of.weight_src / of.denominator,
        gain_center=(of.weight * of.lift + of.weight_center) / of.denominator,
        gain_offset=1 / of.denominator,
        step=step,
        step_previous=step_previous,
    )

    def flat(values, axes):
        """Merges the sites, which come last, into one axis."""
        return values.reshape(*values.shape[:axes], -1)

    center = flat(policy.center, 2)
    sigma_start, sigma_end = (
        warp.warp(substeps.time_after(0)),
        warp.warp(substeps.time_after(substeps.count)),
    )
    residual = flat(jnp.moveaxis(x, -1, 1), 2) - per_sample(1 - sigma_start, 3) * center
    residual = mixture_rollout(
        flat(policy.offsets, 3),
        flat(policy.logweights, 2),
        center,
        flat(policy.residual_src, 2),
        residual,
        recurrence.table(),
        substeps.count.astype(jnp.int32),
    )
    state = residual + per_sample(1 - sigma_end, 3) * center
    return jnp.moveaxis(state, 1, -1).reshape(x.shape)
