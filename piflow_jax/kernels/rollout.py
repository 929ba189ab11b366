"""One function for all platforms; a batch that is split over devices stays split.

Source: the rollout of pi-Flow (arXiv 2510.14974, Alg. 1) with its GMFlow policy.
"""

import hashlib
import math
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from piflow_jax.kernels.blocked import blocked_rollout, whole_rollout
from piflow_jax.kernels.mosaic import fits_on_chip, mosaic_rollout
from piflow_jax.kernels.triton import triton_rollout

__all__ = ["mixture_rollout"]

_SOURCE = hashlib.sha256(
    b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
).hexdigest()[:12]


def mixture_rollout(
    offsets: jax.Array,
    logweights: jax.Array,
    center: jax.Array,
    residual_src: jax.Array,
    residual: jax.Array,
    table: jax.Array,
    trips: jax.Array,
) -> jax.Array:
    """All substeps of a mixture's rollout, with the mixture read from memory once.

    The program is a Mosaic kernel on TPUs, a Triton kernel on NVIDIA GPUs, and XLA's own loops over
    blocks that stay in the cache elsewhere. It composes with `vmap` and `shard_map`. A batch that
    `jit` splits over several devices stays where it is. On TPUs XLA does not know how to split a
    kernel: there a `shard_map` over the mesh of `jax.set_mesh` splits the batch. Without a mesh, or
    if the mesh does not divide the batch, the program is the plain loop. The function is not
    differentiable: its caller has a reference that is.

    Args:
      offsets: `float32[B, K, C, S]`, components relative to the centre, sites in the minor axis.
      logweights: `float32[B, K, S]`, at least one finite per site.
      center: `float32[B, C, S]`.
      residual_src: `float32[B, C, S]`.
      residual: `float32[B, C, S]`, the state relative to the centre.
      table: `float32[B, 10, N]`, see `Recurrence.table`; steps of zero from `trips` on.
      trips: `int32[B]`, substeps of each sample; at most N.

    Returns:
      `float32[B, C, S]`, the state at the end, relative to the centre.
    """
    return _mappable(offsets, logweights, center, residual_src, residual, table, trips)


@jax.custom_batching.custom_vmap
def _mappable(*arrays: jax.Array) -> jax.Array:
    return jax.lax.platform_dependent(
        *arrays,
        tpu=_split_on_tpus,
        cuda=_partitioned(triton_rollout),
        default=_partitioned(blocked_rollout),
    )


@_mappable.def_vmap
def _join_the_batch(size, batched, *arrays):
    """Merges a mapped axis into the batch."""
    arrays = [
        a if is_batched else jnp.broadcast_to(a, (size, *a.shape))
        for a, is_batched in zip(arrays, batched, strict=True)
    ]
    end = _mappable(*(a.reshape(-1, *a.shape[2:]) for a in arrays))
    return end.reshape(size, -1, *end.shape[1:]), True


def _partitioned(local):
    """A rollout that each device runs for its own samples."""

    def partition(mesh, arguments, result):
        # An array without a place on the current mesh has no spec and is replicated.
        (batch, *_) = getattr(arguments[0].sharding, "spec", None) or (None,)
        shardings = tuple(
            NamedSharding(mesh, PartitionSpec(batch, *[None] * (len(argument.shape) - 1)))
            for argument in arguments
        )
        return mesh, local, shardings[2], shardings

    # An explicit signature: the number of arguments is read off it.
    @custom_partitioning
    def rollout(offsets, logweights, center, residual_src, residual, table, trips):
        return local(offsets, logweights, center, residual_src, residual, table, trips)

    rollout.def_partition(
        partition=partition,
        sharding_rule="b k c s, b k s, b c s, b c s, b c s, b w n, b -> b c s",
        need_replication_factors=("k", "c", "s", "w", "n"),
    )

    # On several devices the program calls `partition` and contains nothing of the rollout. A cache
    # may store the compiled program under its text. There the function's name tells versions of
    # this package apart.
    def named(*arrays):
        explicit = AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types
        # On a mesh with explicit axes the arrays know their sharding, and jax 0.12 does not
        # partition.
        return _mapped(local, *arrays) if explicit else rollout(*arrays)

    named.__name__ = f"mixture_rollout_{_SOURCE}"
    return jax.jit(named)


def _mapped(local, *arrays: jax.Array) -> jax.Array:
    """A rollout over the explicit axes of a mesh along which the batch is split."""
    (batch, *_) = jax.typeof(arrays[0]).sharding.spec or (None,)
    specs = tuple(PartitionSpec(batch, *[None] * (a.ndim - 1)) for a in arrays)
    arrays = (jax.reshard(a, spec) for a, spec in zip(arrays, specs, strict=True))
    return jax.shard_map(local, in_specs=specs, out_specs=specs[2], check_vma=False)(*arrays)


def _split_on_tpus(*arrays: jax.Array) -> jax.Array:
    """Splits the batch over all axes of the current mesh that are not mapped yet, if possible."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = [
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Auto
    ]
    parts = math.prod(mesh.shape[name] for name in axes)
    if parts == 1 or arrays[0].shape[0] % parts:
        return _tpu.bind(*arrays)
    split = PartitionSpec(tuple(axes))
    # JAX cannot infer the replication over an axis for our own primitive.
    local = jax.shard_map(
        _tpu.bind, in_specs=split, out_specs=split, axis_names=set(axes), check_vma=False
    )
    return local(*arrays)


_tpu = Primitive("mixture_rollout")
"""The rollout on TPUs. Its form is chosen once a program's devices are known."""


@_tpu.def_abstract_eval
def _shape_of_the_end(offsets, logweights, center, residual_src, residual, table, trips):
    return residual


def _lower_for_tpu(context, *values):
    axes = context.module_context.axis_context
    if isinstance(axes, mlir.SPMDAxisContext):
        alone = set(axes.manual_axes) == set(axes.mesh.axis_names)
    else:
        alone = getattr(axes, "num_devices", 1) == 1
    _, components, channels, _ = context.avals_in[0].shape
    fused = alone and fits_on_chip(components, channels)
    program = mosaic_rollout if fused else whole_rollout
    return mlir.lower_fun(program, multiple_results=False)(context, *values)


mlir.register_lowering(_tpu, _lower_for_tpu, platform="tpu")
