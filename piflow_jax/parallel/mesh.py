"""The mesh of all devices, and the sharding of batches over it."""

import functools
from collections.abc import Collection
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from piflow_jax.config import Config, check_devices

AXES = ("data", "fsdp", "tensor")


def device_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """Arranges devices on three axes; batches are split over the first two, see `sharding`.

    Args:
      data: size of the axis `data`; -1 takes the remaining devices.
      fsdp: size of the axis `fsdp`.
      tensor: size of the axis `tensor`.
      devices: by default all devices of all processes.

    Returns:
      The mesh. Neighbouring devices share the last axis, which communicates most. Several TPU
      slices have a slow network between them, so each slice has its own part of `data`.

    Raises:
      ValueError: The sizes do not multiply to the number of devices, or TPU slices do not divide
        `data`.
    """
    devices = jax.devices() if devices is None else devices
    data = len(devices) // (fsdp * tensor) if data == -1 else data
    if data * fsdp * tensor != len(devices):
        raise ValueError(
            f"a mesh of {data} x {fsdp} x {tensor} does not fit {len(devices)} devices"
        )
    slices = slice_count(devices)
    if data % slices:
        raise ValueError(f"data ({data}) must be divisible by the {slices} slices")
    shape, split = (data // slices, fsdp, tensor), {"allow_split_physical_axes": True}
    if slices > 1:
        grid = mesh_utils.create_hybrid_device_mesh(shape, (slices, 1, 1), devices, **split)
    else:
        grid = mesh_utils.create_device_mesh(shape, devices, **split)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def slice_count(devices=None) -> int:
    """Number of TPU slices among devices; devices other than TPUs count as one slice.

    JAX also numbers the hosts of GPUs as slices. But a mesh may cross them in any way, and must
    where a network needs more than one host.

    Args:
      devices: by default all devices of all processes.

    Returns:
      Their number, at least 1.
    """
    devices = jax.devices() if devices is None else devices
    return len({getattr(d, "slice_index", 0) if d.platform == "tpu" else 0 for d in devices})


def config_mesh(config: Config, devices=None, groups: Collection[str] = ()) -> Mesh:
    """The mesh of `config.mesh`.

    Args:
      config: the run's settings.
      devices: by default all devices of all processes.
      groups: settings with batches that all devices share, see `check_devices`.

    Returns:
      See `device_mesh`.

    Raises:
      ConfigError: The sizes do not fit the devices or their slices, or a batch cannot be divided;
        the message names the key.
    """
    devices = jax.devices() if devices is None else devices
    slices = slice_count(devices)
    sizes = check_devices(config, len(devices), num_slices=slices, groups=groups)
    return device_mesh(**sizes, devices=devices)


def local_mesh() -> Mesh:
    """This process's devices, data-parallel, for work that processes divide among themselves."""
    return device_mesh(devices=jax.local_devices())


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def gathered(tree: Any, mesh: Mesh) -> Any:
    """Copies arrays on a mesh to one device of this process; all processes must call it.

    Args:
      tree: arrays on the mesh with any sharding.
      mesh: from `device_mesh`.

    Returns:
      Whole arrays, all on the same device.
    """
    whole = moved(tree, replicated(mesh))
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), whole)


def moved(tree: Any, shardings: Any) -> Any:
    """Changes the sharding of arrays over the same devices; all processes must call it.

    Args:
      tree: arrays on a mesh.
      shardings: new shardings, a tree or one for all arrays, over the same devices.

    Returns:
      The arrays with the new shardings.
    """
    return jax.jit(_identity, out_shardings=shardings)(tree)


def _identity(tree):
    return tree


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis is split over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


@functools.lru_cache
def _local_parts(mesh: Mesh, process: int) -> tuple[int, ...]:
    """Indices of the batch's equal parts, in order, on the devices of a process."""
    count = mesh.shape["data"] * mesh.shape["fsdp"]
    parts = batch_sharding(mesh).devices_indices_map((count,))
    here = [part for device, part in parts.items() if device.process_index == process]
    return tuple(sorted({part.start or 0 for (part,) in here}))


def local_rows(mesh: Mesh, batch_size: int, process: int | None = None) -> np.ndarray:
    """Rows of a batch on the devices of a process.

    Processes that differ only in their place on `tensor` have the same rows. Neighbours in a slice
    need not be neighbours in the batch, so the rows need not be contiguous.

    Args:
      mesh: from `device_mesh`.
      batch_size: size of the global batch, divisible by `data` times `fsdp`.
      process: index of the process; by default this one.

    Returns:
      `int64[rows]`, ascending.
    """
    process = jax.process_index() if process is None else process
    size = batch_size // (mesh.shape["data"] * mesh.shape["fsdp"])
    parts = np.array(_local_parts(mesh, process))
    return (parts[:, None] * size + np.arange(size)).reshape(-1)


def global_batch(batch: Any, mesh: Mesh) -> Any:
    """Puts this process's rows of a batch on its devices.

    Args:
      batch: arrays in any structure, with the rows of `local_rows` on the leading axis.
      mesh: from `device_mesh`.

    Returns:
      Global arrays, see `batch_sharding`.
    """
    parts = _local_parts(mesh, jax.process_index())

    def put(value):
        size = len(value) // len(parts)
        whole = (size * mesh.shape["data"] * mesh.shape["fsdp"], *value.shape[1:])

        def of_device(index):
            start = parts.index((index[0].start or 0) // size) * size
            return value[start : start + size]

        # `make_array_from_process_local_data` requires that two processes have the same rows or
        # none in common.
        return jax.make_array_from_callback(whole, batch_sharding(mesh), of_device)

    return jax.tree.map(put, batch)
