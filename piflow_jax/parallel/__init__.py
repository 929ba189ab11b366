"""Devices: the mesh, and how batches and states lie on it."""

from piflow_jax.parallel.mesh import batch_sharding, data_mesh, global_batch, replicated

__all__ = ["batch_sharding", "data_mesh", "global_batch", "replicated"]
