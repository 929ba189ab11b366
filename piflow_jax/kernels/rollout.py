"""One function for all platforms; batches that are split over devices stay so."""

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from piflow_jax.kernels.blocked import blocked_rollout

__all__ = ["mixture_rollout"]


def mixture_rollout(
    offsets: jax.Array,
    logweights: jax.Array,
    center: jax.Array,
    residual_src: jax.Array,
    residual: jax.Array,
    table: jax.Array,
    trips: jax.Array,
) -> jax.Array:
    """All substeps of a mixture's rollout, the mixture read from memory once.

    Composes with `vmap`, `shard_map` and batches that are split over a mesh, which stay where they
    are. It is not differentiable: its caller has a reference that is.

    Args:
      offsets: `float32[B, K, C, S]`, components relative to the centre, sites in the minor axis.
      logweights: `float32[B, K, S]`, at least one of each site finite.
      center: `float32[B, C, S]`.
      residual_src: `float32[B, C, S]`.
      residual: `float32[B, C, S]`, the state relative to the centre.
      table: `float32[B, 10, N]`, see `Recurrence.table`.
      trips: `int32[B]`, substeps of each sample; at most N.

    Returns:
      `float32[B, C, S]`, the state at the end, relative to the centre.
    """
    return _vmappable(offsets, logweights, center, residual_src, residual, table, trips)


def _local(*arrays: jax.Array) -> jax.Array:
    """The rollout of the samples that a device has."""
    return blocked_rollout(*arrays)


@custom_partitioning
def _partitioned(offsets, logweights, center, residual_src, residual, table, trips):
    return _local(offsets, logweights, center, residual_src, residual, table, trips)


def _partition(mesh, arguments, result):
    del result
    (batch, *_) = arguments[0].sharding.spec or (None,)
    shardings = tuple(
        NamedSharding(mesh, PartitionSpec(batch, *[None] * (len(argument.shape) - 1)))
        for argument in arguments
    )
    return mesh, _local, shardings[2], shardings


_partitioned.def_partition(
    partition=_partition,
    sharding_rule="b k c s, b k s, b c s, b c s, b c s, b w n, b -> b c s",
    need_replication_factors=("k", "c", "s", "w", "n"),
)


@jax.custom_batching.custom_vmap
def _vmappable(offsets, logweights, center, residual_src, residual, table, trips):
    return _partitioned(offsets, logweights, center, residual_src, residual, table, trips)


@_vmappable.def_vmap
def _vmap_rule(size, batched, *arrays):
    """A mapped axis in front joins the batch."""
    arrays = [
        a if is_batched else jnp.broadcast_to(a, (size, *a.shape))
        for a, is_batched in zip(arrays, batched, strict=True)
    ]
    end = _vmappable(*(a.reshape(-1, *a.shape[2:]) for a in arrays))
    return end.reshape(size, -1, *end.shape[1:]), True
