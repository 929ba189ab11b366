"""The mesh of all devices, and how batches lie on it."""

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

__all__ = ["AXES", "batch_sharding", "device_mesh", "global_batch", "local_mesh", "replicated"]

AXES = ("data", "fsdp", "tensor")


def device_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """Devices on three axes: batches are split over the first two, see `sharding`.

    Args:
      data: size of the axis `data`; -1 takes the devices that are left.
      fsdp: size of the axis `fsdp`.
      tensor: size of the axis `tensor`.
      devices: by default all of all processes.

    Returns:
      The mesh. Neighbours are on the last axis, which talks most. Of several TPU slices, whose
      network between them is slow, each has its own part of `data`.

    Raises:
      ValueError: The sizes do not multiply to the number of devices, or the slices do not divide
        `data`.
    """
    devices = jax.devices() if devices is None else devices
    data = len(devices) // (fsdp * tensor) if data == -1 else data
    if data * fsdp * tensor != len(devices):
        raise ValueError(
            f"a mesh of {data} x {fsdp} x {tensor} does not fit {len(devices)} devices"
        )
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if data % slices:
        raise ValueError(f"config.mesh.data ({data}) must be divisible by the {slices} slices")
    shape, split = (data // slices, fsdp, tensor), {"allow_split_physical_axes": True}
    if slices > 1:
        grid = mesh_utils.create_hybrid_device_mesh(shape, (slices, 1, 1), devices, **split)
    else:
        grid = mesh_utils.create_device_mesh(shape, devices, **split)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def local_mesh() -> Mesh:
    """The devices of this process, data-parallel; for work that processes share by turns."""
    return device_mesh(devices=jax.local_devices())


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis is split over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def global_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts this process's rows of a batch on its devices.

    Args:
      batch: arrays with the per-process batch in front.
      mesh: from `device_mesh`.

    Returns:
      Global arrays, see `batch_sharding`.
    """
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, value)
        for name, value in batch.items()
    }
