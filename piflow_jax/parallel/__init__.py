"""Devices: the mesh, and how batches and states lie on it."""

from piflow_jax.parallel.mesh import (
    batch_sharding,
    device_mesh,
    global_batch,
    local_mesh,
    local_rows,
    replicated,
)
from piflow_jax.parallel.sharding import ActivationSharding, parameter_shardings, state_shardings
from piflow_jax.parallel.topology import peak_flops

__all__ = [
    "ActivationSharding",
    "batch_sharding",
    "device_mesh",
    "global_batch",
    "local_mesh",
    "local_rows",
    "parameter_shardings",
    "peak_flops",
    "replicated",
    "state_shardings",
]
