"""Substeps of a rollout (paper, Alg. 1): where each begins and ends, and its solver's weights."""

from typing import Literal, get_args

import flax.struct
import jax
import jax.numpy as jnp

from piflow_jax.flow.policies.base import per_sample
from piflow_jax.flow.schedule import TimeWarp

__all__ = ["Substeps", "num_substeps", "step_weights"]

Solver = Literal["euler", "multistep"]
"""First order, or second order by the velocity of the substep before."""


def check_solver(solver: str) -> None:
    """Refuses a solver that there is not.

    Args:
      solver: its name.

    Raises:
      ValueError: it is not a `Solver`.
    """
    if solver not in get_args(Solver):
        raise ValueError(f"unknown solver {solver!r}; it is 'euler' or 'multistep'")


def num_substeps(delta_tau: jax.Array, total_substeps: int) -> jax.Array:
    """Substeps of an interval of raw time: rounded half to even, at least one.

    Args:
      delta_tau: length of the interval in raw time, of any shape.
      total_substeps: substeps per unit of raw time.

    Returns:
      Whole numbers of the shape and the type of `delta_tau`.
    """
    return jnp.maximum(jnp.round(delta_tau * total_substeps), 1)


@flax.struct.dataclass
class Substeps:
    """The substeps of each sample, uniform in raw time.

    Attributes:
      tau_start: `[B]`, raw time at which the first begins.
      length: `[B]`, raw-time length of each.
      count: `[B]`, how many there are, as a floating-point number.
    """

    tau_start: jax.Array
    length: jax.Array
    count: jax.Array

    @classmethod
    def between(
        cls, tau_start: jax.Array, tau_end: jax.Array, total_substeps: int, most: int
    ) -> "Substeps":
        """The substeps of intervals of raw time.

        Args:
          tau_start: `[B]`, raw times at which they begin.
          tau_end: `[B]`, raw times at which they end.
          total_substeps: substeps per unit of raw time.
          most: substeps that a sample takes at most; more would be longer ones.

        Returns:
          The substeps.
        """
        delta = tau_start - tau_end
        count = jnp.minimum(num_substeps(delta, total_substeps), most)
        return cls(tau_start=tau_start, length=delta / count, count=count)

    def time_after(self, steps: jax.Array) -> jax.Array:
        """Raw time after a number of substeps, at least 0.

        Args:
          steps: a scalar, `[B]`, or `[1, N]` for several of each sample.

        Returns:
          `[B]` or `[B, N]`.
        """
        columns = (self.tau_start, self.length, self.count)
        start, length, count = (per_sample(a, max(jnp.ndim(steps), 1)) for a in columns)
        return jnp.maximum(start - length * jnp.minimum(steps, count), 0)

    def levels(self, index: jax.Array, warp: TimeWarp) -> tuple[jax.Array, jax.Array]:
        """Noise levels at which a substep begins and ends.

        A sample that has arrived is at its last substep again, with length zero: never beyond its
        end, where the velocity may be singular and 0 * inf would poison gradients.

        Args:
          index: of the substep, a scalar or `[1, N]`.
          warp: raw time to noise level.

        Returns:
          `(begin, end)`, `[B]` or `[B, N]`.
        """
        count = per_sample(self.count, max(jnp.ndim(index), 1))
        begin = warp.warp(self.time_after(jnp.minimum(index, count - 1)))
        return begin, jnp.where(index < count, warp.warp(self.time_after(index + 1)), begin)


def step_weights(
    before: jax.Array, begin: jax.Array, end: jax.Array, solver: Solver
) -> tuple[jax.Array, jax.Array]:
    """Factors of a substep's velocity and of the one before in the step from `begin` to `end`.

    The velocity of `multistep` is a line in the noise level through the two (Adams-Bashforth); the
    first substep, before which there is none, is one of Euler.

    Args:
      before: `[B]` or `[B, N]`, noise levels at which the substep before began; `begin` if there
        was none.
      begin: `[B]` or `[B, N]`, noise levels at which this one begins.
      end: `[B]` or `[B, N]`, noise levels at which it ends.
      solver: `euler` or `multistep`.

    Returns:
      `(step, step_previous)`, shaped like the levels.
    """
    step = end - begin
    if solver == "euler":
        return step, jnp.zeros_like(step)
    gap = begin - before
    ratio = jnp.where(gap == 0, 0, step / jnp.where(gap == 0, 1, gap)) / 2
    return step * (1 + ratio), -step * ratio
