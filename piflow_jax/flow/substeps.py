"""Substeps of a rollout (paper, Alg. 1): where each begins and ends, and its solver's weights."""

from typing import Literal, get_args

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from piflow_jax.arguments import check_choice, whole
from piflow_jax.flow.policies.base import per_sample
from piflow_jax.flow.schedule import TimeWarp

__all__ = ["Rounding", "Solver", "Substeps", "num_substeps", "step_weights"]

Solver = Literal["euler", "multistep"]
"""First order, or second order by the velocity of the substep before."""

Rounding = Literal["round", "ceil"]
"""How an interval's substeps become a whole number: half to even, or up.

The reference rounds in training, and in its sampler too before version 0.2.0, which rounds up.
"""

_MOST = 2**24  # float32 counts no further
# Raw time by which rounding errors may make an interval longer without another substep.
_CEIL_SLACK = 1e-6


def check_substeps(
    total_substeps: int, solver: Solver = "euler", rounding: Rounding = "round"
) -> int:
    """Refuses substeps that cannot be taken.

    Args:
      total_substeps: substeps per unit of raw time.
      solver: how they are taken.
      rounding: how their number becomes a whole one.

    Returns:
      `total_substeps` as an integer.

    Raises:
      ValueError: the number is not a whole one from 1 to 2^24, or a name is unknown.
    """
    check_choice("solver", solver, get_args(Solver))
    check_choice("rounding", rounding, get_args(Rounding))
    return whole("total_substeps", total_substeps, 1, _MOST)


def num_substeps(
    delta_tau: jax.Array | np.ndarray, total_substeps: int, rounding: Rounding = "round"
) -> jax.Array | np.ndarray:
    """Substeps of an interval of raw time, at least one.

    Args:
      delta_tau: length of the interval in raw time, of any shape.
      total_substeps: substeps per unit of raw time.
      rounding: `round` or `ceil`, see `Rounding`. A millionth of raw time does not count in
        `ceil`: an interval of 32.00002 substeps has 32.

    Returns:
      Whole numbers of the shape and the type of `delta_tau`, in NumPy if it is there.
    """
    xp = np if isinstance(delta_tau, np.ndarray) else jnp
    if rounding == "ceil":
        count = xp.ceil((delta_tau - _CEIL_SLACK) * total_substeps)
    else:
        count = xp.round(delta_tau * total_substeps)
    return xp.maximum(count, 1)


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
        cls,
        tau_start: jax.Array,
        tau_end: jax.Array,
        total_substeps: int,
        most: int,
        rounding: Rounding = "round",
    ) -> "Substeps":
        """The substeps of intervals of raw time.

        Args:
          tau_start: `[B]`, raw times at which they begin.
          tau_end: `[B]`, raw times at which they end.
          total_substeps: substeps per unit of raw time.
          most: substeps that a sample takes at most; more would be longer ones.
          rounding: how their number becomes a whole one.

        Returns:
          The substeps.
        """
        delta = tau_start - tau_end
        count = jnp.minimum(num_substeps(delta, total_substeps, rounding), most)
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
        index = jnp.asarray(index, self.count.dtype)
        count = per_sample(self.count, max(index.ndim, 1))
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
