"""What a substep of a mixture's rollout computes, as numbers per sample and substep."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

__all__ = ["COLUMNS", "Recurrence"]


class Recurrence(NamedTuple):
    """Coefficients of a rollout's substeps, `[B, N]` each.

    With offsets `d_k`, log-weights `a_k`, the centre `r`, the residual at the source `y_s`, and the
    state relative to the centre `y`, a substep is

        e  = pull y + pull_src y_s + pull_center r
        w  = softmax_k(a_k + <d_k, e> - half_precision |d_k|^2)
        g  = gain y + gain_src y_s + gain_center r - gain_offset sum_k w_k d_k
        y' = y + step g + step_previous (g of the substep before)

    A sample that has arrived has steps of zero.
    """

    pull: jax.Array
    pull_src: jax.Array
    pull_center: jax.Array
    half_precision: jax.Array
    gain: jax.Array
    gain_src: jax.Array
    gain_center: jax.Array
    gain_offset: jax.Array
    step: jax.Array
    step_previous: jax.Array

    def table(self) -> jax.Array:
        """All of them as `[B, 10, N]`, in the order of the fields."""
        return jnp.stack(jnp.broadcast_arrays(*self), axis=1)


COLUMNS = len(Recurrence._fields)
