"""A data-parallel mesh over all devices."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

__all__ = ["batch_sharding", "data_mesh", "global_batch", "replicated"]


def data_mesh() -> Mesh:
    """All devices of all processes on one axis, `data`."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis is split over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def global_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts this process's rows of a batch on its devices.

    Args:
      batch: arrays with the per-process batch in front.
      mesh: from `data_mesh`.

    Returns:
      Global arrays, split over `data`.
    """
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, value)
        for name, value in batch.items()
    }
