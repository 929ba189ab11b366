"""The rollout as a Pallas kernel for NVIDIA GPUs: one thread per site, its mixture in registers.

The kernel reads a site's mixture from main memory once if it fits into the registers of a thread. A
larger mixture stays in the cache, from which each substep reads it. Coefficients are the same for
all threads of a block and come from the cache too.

Source: the rollout of pi-Flow (arXiv 2510.14974, Alg. 1) with its GMFlow policy.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from piflow_jax.kernels.recurrence import COLUMNS, Recurrence
from piflow_jax.kernels.substep import Component, shaped_like, substep

__all__ = ["triton_rollout"]

THREADS = 128
REGISTERS = 200  # out of a thread's 255, for the mixture


def triton_rollout(*arrays: jax.Array, interpret: bool = False) -> jax.Array:
    """All substeps of a mixture's rollout; see `mixture_rollout` for the result.

    Args:
      *arrays: `[B, ...]`, as for `mixture_rollout`.
      interpret: runs the kernel's operations one by one, on any platform.
    """
    *fields, table, trips = arrays
    offsets, *_, residual = fields
    batch, components, channels, sites = offsets.shape
    blocks = -(-sites // THREADS)

    def padded(values):
        padding = [(0, 0)] * (values.ndim - 1) + [(0, blocks * THREADS - sites)]
        return jnp.pad(values, padding)

    def spec(*axes):
        return pl.BlockSpec((None, *axes, THREADS), lambda b, s: (b, *[0] * len(axes), s))

    end = pl.pallas_call(
        _kernel,
        grid=(batch, blocks),
        in_specs=[
            pl.BlockSpec((None,), lambda b, s: (b,)),
            pl.BlockSpec((None, *table.shape[1:]), lambda b, s: (b, 0, 0)),
            spec(components, channels),
            spec(components),
            spec(channels),
            spec(channels),
            spec(channels),
        ],
        out_specs=spec(channels),
        out_shape=shaped_like(residual, (batch, channels, blocks * THREADS)),
        compiler_params=plgpu.CompilerParams(num_warps=THREADS // 32, num_stages=1),
        interpret=interpret,
        name="mixture_rollout",
    )(trips, table, *map(padded, fields))
    return end[..., :sites]


def _kernel(trips, table, offsets, logweights, center, residual_src, residual, end):
    components, channels = offsets.shape[:2]

    def read(k):
        offset = [offsets[k, c] for c in range(channels)]
        return Component(offset, logweights[k], sum(jnp.square(d) for d in offset))

    component = read
    if components * (channels + 2) <= REGISTERS:
        component = [read(k) for k in range(components)].__getitem__

    def by_channel(reference):
        return tuple(reference[c] for c in range(channels))

    fixed = (by_channel(residual_src), by_channel(center))

    def body(index, carry):
        of = Recurrence(*(table[column, index] for column in range(COLUMNS)))
        return substep(of, *carry, *fixed, component, components)

    start = by_channel(residual)
    still = tuple(jnp.zeros_like(y) for y in start)
    y, _ = jax.lax.fori_loop(0, trips[...], body, (start, still))
    for c in range(channels):
        end[c] = y[c]
