"""Devices: the mesh, and the sharding of batches and states over it."""

from piflow_jax.parallel.mesh import (
    batch_sharding,
    config_mesh,
    device_mesh,
    gathered,
    global_batch,
    local_mesh,
    local_rows,
    moved,
    replicated,
    slice_count,
)
from piflow_jax.parallel.sharding import ActivationSharding, parameter_shardings, state_shardings
from piflow_jax.parallel.topology import peak_flops

__all__ = [
    "ActivationSharding",
    "batch_sharding",
    "config_mesh",
    "device_mesh",
    "gathered",
    "global_batch",
    "local_mesh",
    "local_rows",
    "moved",
    "parameter_shardings",
    "peak_flops",
    "replicated",
    "slice_count",
    "state_shardings",
]
