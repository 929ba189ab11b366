"""Devices that are not here: TPU slices to compile for ahead of time."""

import dataclasses
import os
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

__all__ = ["CHIPS", "Chip", "fully_sharded", "topology_mesh"]


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a chip can do at most, as its maker says.

    Attributes:
      memory: bytes of high-bandwidth memory.
      flops: bfloat16 operations per second.
    """

    memory: int
    flops: float


# By the part of a topology's name before the colon. A v5p and a v6e device is one chip.
CHIPS = {
    "v5e": Chip(16 * 2**30, 197e12),
    "v5p": Chip(95 * 2**30, 459e12),
    "v6e": Chip(32 * 2**30, 918e12),
}


def topology_mesh(topology: str) -> Mesh:
    """A data-parallel mesh over the devices of a slice that need not be attached.

    Args:
      topology: such as `v5e:4x4`, `v5p:2x2x1` or `v6e:2x4`.

    Returns:
      The mesh, of one axis `data`; programs can be lowered and compiled for it, not run.

    Raises:
      ValueError: the name is not one that `libtpu` knows, or `libtpu` is not installed.
    """
    from jax.experimental import topologies  # loads libtpu

    if topology.split(":")[0] not in CHIPS:
        raise ValueError(
            f"unknown topology {topology!r}; it is a chip ({', '.join(CHIPS)}), a colon and the "
            "slice's shape, such as v5e:4x4"
        )
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # not on a TPU VM: there is no metadata
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:  # jax raises its own runtime errors here, of no common class
        raise ValueError(
            f"cannot make the topology {topology!r}: {error}. "
            'Compiling for TPUs needs libtpu: pip install -e ".[tpu]"'
        ) from error
    devices = np.asarray(description.devices)
    return Mesh(devices, ("data",), axis_types=(AxisType.Auto,))


def fully_sharded(mesh: Mesh, tree: Any) -> Any:
    """Shardings that split every array over all devices, where an axis divides.

    The last axis that divides is split: it is never the leading axis of stacked layers, so a scan
    over layers gathers one layer at a time.

    Args:
      mesh: a mesh of one axis.
      tree: arrays or their shapes.

    Returns:
      A tree of `NamedSharding`; arrays without such an axis are replicated.
    """
    (axis,) = mesh.axis_names

    def sharding(leaf):
        spec = [None] * len(leaf.shape)
        for position in reversed(range(len(leaf.shape))):
            if leaf.shape[position] % mesh.size == 0 and leaf.shape[position] > 0:
                spec[position] = axis
                break
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(sharding, tree)
