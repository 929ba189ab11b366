"""The rollout in plain XLA, one block of sites at a time: fast on CPUs, correct anywhere.

Five things make it fast. A block's mixture stays in a core's cache over all substeps. Sites are the
minor axis and rows of them are short, so that the K components do not fall into the same set of the
cache. The product over C is spelled out, because XLA's own reductions are scalar. Maxima and sums
over K are separate reductions, which XLA does not recompute for each component. Blocks that have
arrived stop.

Source: the rollout of pi-Flow (arXiv 2510.14974, Alg. 1) with its GMFlow policy.
"""

import functools
import os

import jax
import jax.numpy as jnp

from piflow_jax.kernels.recurrence import COLUMNS, Recurrence

__all__ = ["blocked_rollout", "whole_rollout"]

ROW = 64  # sites per row
CACHE = 400_000  # bytes of a block's mixture; a typical second-level cache has half a megabyte
WORK = 16_384  # most components of a block's sites; they outweigh the start of its few operations
SMALL = 100_000  # a mixture of fewer bytes is not worth a second thread
MOST_LANES = 8  # parallel loops; each is compiled


def blocked_rollout(*arrays: jax.Array) -> jax.Array:
    """All substeps of a mixture's rollout; see `mixture_rollout` for the result.

    Args:
      *arrays: `[B, ...]`, as for `mixture_rollout`.
    """
    offsets, logweights, center, residual_src, residual, table, trips = arrays
    batch, components, channels, sites = offsets.shape
    row = min(ROW, sites)
    rows_per_sample = -(-sites // row)
    rows = batch * rows_per_sample
    row_bytes = components * (channels + 2) * row * offsets.dtype.itemsize
    lanes = 1 if rows * row_bytes < SMALL else min(_cores(), MOST_LANES, rows)
    block_rows = max(min(rows // lanes, WORK // (components * row)), 1)
    block_rows = min(block_rows, max(CACHE // row_bytes, 1))
    blocks = -(-rows // (lanes * block_rows))
    # Samples with similar substep counts share a block: it stops when its last sample has arrived.
    order = jnp.argsort(trips)

    def arrange(values):
        """Arranges `[B, ..., S]` as `[lanes, blocks, block_rows, ..., row]`, padded with zeros."""
        values = _pad(values[order], -1, rows_per_sample * row)
        values = values.reshape(*values.shape[:-1], rows_per_sample, row)
        values = jnp.moveaxis(values, -2, 1)
        return group(values.reshape(rows, *values.shape[2:]))

    def group(values):
        values = _pad(values, 0, lanes * blocks * block_rows)
        values = values.reshape(blocks, lanes, block_rows, *values.shape[1:])
        return jnp.moveaxis(values, 1, 0)  # each lane gets long and short ones

    arrays = [arrange(a) for a in (offsets, logweights, center, residual_src, residual)]
    arrays += [group(jnp.repeat(a[order], rows_per_sample, axis=0)) for a in (table, trips)]
    # Independent loops run on different threads.
    ends = [
        jax.lax.map(lambda block: whole_rollout(*block), [a[lane] for a in arrays])
        for lane in range(lanes)
    ]
    end = jnp.stack(ends, axis=1).reshape(-1, channels, row)[:rows]
    end = jnp.moveaxis(end.reshape(batch, rows_per_sample, channels, row), 1, 2)
    return end.reshape(batch, channels, -1)[jnp.argsort(order), :, :sites]


def _cores() -> int:
    """Cores that this process may use; macOS reports no affinities."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _pad(values: jax.Array, axis: int, size: int) -> jax.Array:
    widths = [(0, 0)] * values.ndim
    widths[axis] = (0, size - values.shape[axis])
    return jnp.pad(values, widths)


def whole_rollout(*arrays: jax.Array) -> jax.Array:
    """The same in one loop, so that the batch may be split over devices; see `mixture_rollout`.

    Args:
      *arrays: `[B, ...]`, as for `mixture_rollout`.
    """
    offsets, logweights, center, residual_src, residual, table, trips = arrays
    table = jnp.moveaxis(table, -1, 0)
    by_channel = jnp.unstack(offsets, axis=2)
    norms = sum(d * d for d in by_channel)

    def substep(index, carry):
        y, previous = carry
        columns = jax.lax.dynamic_index_in_dim(table, index, keepdims=False)
        step = Recurrence(*(columns[:, i, None, None] for i in range(COLUMNS)))
        pull = step.pull * y + step.pull_src * residual_src + step.pull_center * center
        pull = jax.lax.optimization_barrier(pull)
        pairs = zip(by_channel, jnp.unstack(pull, axis=1), strict=True)
        inner = sum(d * p[:, None] for d, p in pairs)
        logits = jax.lax.optimization_barrier(logweights - step.half_zeta * norms + inner)
        weights = jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True))
        total = jnp.sum(weights, axis=1)
        pairs = zip(jnp.unstack(weights, axis=1), jnp.unstack(offsets, axis=1), strict=True)
        mean = functools.reduce(jnp.add, [w[:, None] * d for w, d in pairs]) / total[:, None]
        velocity = (
            step.gain * y
            + step.gain_src * residual_src
            + step.gain_center * center
            - step.gain_offset * mean
        )
        return y + step.step * velocity + step.step_previous * previous, velocity

    # A block that is all padding takes no step.
    start = (residual, jnp.zeros_like(residual))
    return jax.lax.fori_loop(0, jnp.max(trips), substep, start)[0]
