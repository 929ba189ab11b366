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
"""First order, or second order with the velocity of the previous substep."""

Rounding = Literal["round", "ceil"]
"""Rounding of an interval's number of substeps to an integer: half to even, or up.

The reference uses `round` in training. Its sampler used `round` too before version 0.2.0, and uses
`ceil` since.
"""

_MOST = 2**24  # largest count that float32 holds exactly
# Rounding errors may lengthen an interval by this much raw time without adding a substep.
_CEIL_SLACK = 1e-6


def check_substeps(
    total_substeps: int, solver: Solver = "euler", rounding: Rounding = "round"
) -> int:
    """Refuses invalid settings of substeps.

    Args:
      total_substeps: substeps per unit of raw time.
      solver: solver of the rollout.
      rounding: how their number is rounded to an integer.

    Returns:
      `total_substeps` as an integer.

    Raises:
      ValueError: the number is not an integer from 1 to 2^24, or a name is unknown.
    """
    check_choice("solver", solver, get_args(Solver))
    check_choice("rounding", rounding, get_args(Rounding))
    return whole("total_substeps", total_substeps, 1, _MOST)


def num_substeps(
    delta_tau: jax.Array | np.ndarray, total_substeps: int, rounding: Rounding = "round"
) -> jax.Array | np.ndarray:
    """Number of substeps in an interval of raw time, at least one.

    Args:
      delta_tau: length of the interval in raw time, of any shape.
      total_substeps: substeps per unit of raw time.
      rounding: `round` or `ceil`, see `Rounding`. `ceil` ignores a millionth of raw time: an
        interval of 32.0001 of 128 substeps has 32.

    Returns:
      Whole numbers with the shape and type of `delta_tau`, in NumPy if `delta_tau` is.
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
      tau_start: `[B]`, raw time at which the first substep begins.
      length: `[B]`, raw-time length of a substep.
      count: `[B]`, number of substeps, as a floating-point number.
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
        """Divides intervals of raw time into substeps.

        Args:
          tau_start: `[B]`, raw times at which the intervals begin.
          tau_end: `[B]`, raw times at which the intervals end.
          total_substeps: substeps per unit of raw time.
          most: upper bound on a sample's substeps; a sample that needs more takes longer ones.
          rounding: how their number is rounded to an integer.

        Returns:
          The substeps.
        """
        delta = tau_start - tau_end
        count = jnp.minimum(num_substeps(delta, total_substeps, rounding), most)
        return cls(tau_start=tau_start, length=delta / count, count=count)

    def time_after(self, steps: jax.Array) -> jax.Array:
        """Raw time after a number of substeps, at least 0.

        Args:
          steps: a scalar, `[B]`, or `[1, N]` for several per sample.

        Returns:
          `[B]` or `[B, N]`.
        """
        columns = (self.tau_start, self.length, self.count)
        start, length, count = (per_sample(a, max(jnp.ndim(steps), 1)) for a in columns)
        return jnp.maximum(start - length * jnp.minimum(steps, count), 0)

    def levels(self, index: jax.Array, warp: TimeWarp) -> tuple[jax.Array, jax.Array]:
        """Noise levels at which a substep begins and ends.

        A sample that has arrived stays at its last substep, with length zero. It never goes beyond
        its end, where the velocity may be singular and 0 * inf would poison gradients.

        Args:
          index: index of the substep, a scalar or `[1, N]`.
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
    """Factors of the current and the previous velocity in the substep from `begin` to `end`.

    `multistep` takes the velocity to be linear in the noise level through the two
    (Adams-Bashforth). The first substep has no previous velocity and is an Euler step.

    Args:
      before: `[B]` or `[B, N]`, noise levels at which the previous substep began; `begin` if there
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
