"""Coefficients of the substeps of a mixture's rollout, as numbers per sample and substep.

Source: the GMFlow policy of pi-Flow (arXiv 2510.14974, Sec. 3.2), as `GMFlowPolicy` computes it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

__all__ = ["COLUMNS", "Recurrence"]


class Recurrence(NamedTuple):
    """Coefficients of a rollout's substeps, each float32 `[B, N]` or broadcastable to it.

    With offsets `d_k`, log-weights `a_k`, the centre `r`, the residual at the source `y_s`, and the
    state relative to the centre `y`, a substep is

        e  = pull y + pull_src y_s + pull_center r
        w  = softmax_k(a_k + <d_k, e> - half_zeta |d_k|^2)
        g  = gain y + gain_src y_s + gain_center r - gain_offset sum_k w_k d_k
        y' = y + step g + step_previous (g of the substep before)

    A sample that has arrived has steps of zero.
    """

    pull: jax.Array
    pull_src: jax.Array
    pull_center: jax.Array
    half_zeta: jax.Array
    gain: jax.Array
    gain_src: jax.Array
    gain_center: jax.Array
    gain_offset: jax.Array
    step: jax.Array
    step_previous: jax.Array

    def table(self) -> jax.Array:
        """All coefficients as `[B, 10, N]`, in the order of the fields, for `mixture_rollout`."""
        return jnp.stack(jnp.broadcast_arrays(*self), axis=1)


COLUMNS = len(Recurrence._fields)
