"""The rollout as a Pallas kernel for TPUs: 1,024 sites of a sample in the chip's vector memory.

Sites fill the vector registers, 8 by 128, so that nothing is reduced inside a register. The kernel
reads the mixture of a block from main memory once, while it computes the previous block. A substep
reads the mixture from vector memory, and its coefficients, which are scalars, from scalar memory.

Source: the rollout of pi-Flow (arXiv 2510.14974, Alg. 1) with its GMFlow policy.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from piflow_jax.kernels.recurrence import COLUMNS, Recurrence
from piflow_jax.kernels.substep import Component, shaped_like, substep

__all__ = ["fits_on_chip", "mosaic_rollout"]

LANES = 128
SUBLANES = 8
# Out of the 16 MiB of vector memory that a kernel has by default.
_MOST_BYTES = 12 * 2**20


def fits_on_chip(components: int, channels: int) -> bool:
    """Whether vector memory holds a block of sites and the next one, which is being read.

    Args:
      components: `K`.
      channels: `C`.

    Returns:
      Whether the kernel's arrays for 1,024 sites in float32 take 12 MiB or less, three quarters of
      its default memory.
    """
    tile = 4 * SUBLANES * LANES
    read = components * channels + components + 4 * channels
    return tile * (2 * read + components) <= _MOST_BYTES


def mosaic_rollout(*arrays: jax.Array, interpret: bool = False) -> jax.Array:
    """All substeps of a mixture's rollout; see `mixture_rollout` for the result.

    Args:
      *arrays: `[B, ...]`, as for `mixture_rollout`.
      interpret: runs the kernel's operations one by one, on any platform.
    """
    *fields, table, trips = arrays
    offsets, *_, residual = fields
    batch, components, channels, sites = offsets.shape
    rows = min(SUBLANES, -(-sites // LANES))
    blocks = -(-sites // (rows * LANES))

    def tiled(values):
        """`[..., S]` as `[..., blocks * rows, 128]`."""
        padding = [(0, 0)] * (values.ndim - 1) + [(0, blocks * rows * LANES - sites)]
        return jnp.pad(values, padding).reshape(*values.shape[:-1], blocks * rows, LANES)

    def spec(*axes):
        return pl.BlockSpec((1, *axes, rows, LANES), lambda b, s: (b, *[0] * len(axes), s, 0))

    end = pl.pallas_call(
        _kernel,
        grid=(batch, blocks),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec((1, *table.shape[1:]), lambda b, s: (b, 0, 0), memory_space=pltpu.SMEM),
            spec(components, channels),
            spec(components),
            spec(channels),
            spec(channels),
            spec(channels),
        ],
        out_specs=spec(channels),
        out_shape=shaped_like(residual, (batch, channels, blocks * rows, LANES)),
        scratch_shapes=[pltpu.VMEM((components, rows, LANES), offsets.dtype)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=pl.CostEstimate(
            flops=batch * sites * components * table.shape[2] * (4 * channels + 4),
            transcendentals=batch * sites * components * table.shape[2],
            bytes_accessed=sum(a.nbytes for a in (*fields, residual)),
        ),
        interpret=interpret,
        name="mixture_rollout",
    )(trips, table, *map(tiled, fields))
    return end.reshape(batch, channels, -1)[..., :sites]


def _kernel(trips, table, offsets, logweights, center, residual_src, residual, end, norms):
    components, channels = offsets.shape[1:3]
    for k in range(components):
        norms[k] = sum(jnp.square(offsets[0, k, c]) for c in range(channels))

    def component(k):
        offset = [offsets[0, k, c] for c in range(channels)]
        return Component(offset, logweights[0, k], norms[k])

    def by_channel(reference):
        return tuple(reference[0, c] for c in range(channels))

    def body(index, carry):
        of = Recurrence(*(table[0, column, index] for column in range(COLUMNS)))
        fixed = (by_channel(residual_src), by_channel(center))
        return substep(of, *carry, *fixed, component, components)

    start = by_channel(residual)
    still = tuple(jnp.zeros_like(y) for y in start)
    y, _ = jax.lax.fori_loop(0, trips[pl.program_id(0)], body, (start, still))
    for c in range(channels):
        end[0, c] = y[c]
