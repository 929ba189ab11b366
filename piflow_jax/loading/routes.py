"""Loading of arrays by several processes: each reads a part of the files, and devices exchange it.

The part of an array that a device keeps is seldom a contiguous range of a file: arrays are split
along inner axes, or are whole on several devices. So each process reads rows that no other process
reads, and the devices exchange them, which is faster than any disk or bucket.
"""

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec, Sharding


class Route(NamedTuple):
    """How an array gets from the files to the devices.

    Attributes:
      shardings: its sharding after reading, those of the steps between, and the final one.
      axis: the axis along which it is read in parts.
      runs: the ranges of that axis that this process reads.
    """

    shardings: tuple[Sharding, ...]
    axis: int
    runs: tuple[range, ...]


def route(
    shape: Sequence[int], rows: Sequence[int], sharding: Sharding, devices: Collection[jax.Device]
) -> Route:
    """Chooses the route of an array to the devices.

    Args:
      shape: its shape.
      rows: axes along which it can be read in parts, see `piflow_jax.convert.Leaf`.
      sharding: its final sharding.
      devices: the devices of this process.

    Returns:
      The route on which processes read least. A process reads the whole array if all devices belong
      to it, or if the mesh divides none of `rows`.
    """
    if isinstance(sharding, NamedSharding) and set(devices) != sharding.device_set:
        mesh = sharding.mesh
        entries = [*sharding.spec, *(None,) * (len(shape) - len(sharding.spec))]
        names = [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in entries]
        for many in range(len(mesh.axis_names), 0, -1):
            for axis in rows:
                split = dict.fromkeys((*names[axis], *sum(names, ()), *mesh.axis_names))
                split = tuple(split)[:many]
                if shape[axis] % math.prod(mesh.shape[name] for name in split) == 0:
                    return _route(shape, sharding, names, axis, split, devices)
    return Route((sharding,), 0, (range(shape[0]),))


def _route(
    shape: Sequence[int],
    sharding: NamedSharding,
    names: Sequence[tuple[str, ...]],
    axis: int,
    split: tuple[str, ...],
    devices: Collection[jax.Device],
) -> Route:
    """The way from where axes of the mesh `split` one axis; `names` are those of the last place.

    They come off from behind, one by one: so XLA can exchange parts and makes no array whole.
    """
    shardings: list[Sharding] = [sharding]
    for many in range(len(names[axis]) + 1, len(split) + 1):
        left = split[:many]
        spec = [tuple(name for name in those if name not in left) for those in names]
        spec[axis] = left
        before = NamedSharding(sharding.mesh, PartitionSpec(*spec))
        if not before.is_equivalent_to(shardings[0], len(shape)):
            shardings.insert(0, before)
    indices = shardings[0].devices_indices_map(tuple(shape))
    runs: list[range] = []
    for start, stop, _ in sorted({indices[d][axis].indices(shape[axis]) for d in devices}):
        if runs and runs[-1].stop == start:
            start = runs.pop().start
        runs.append(range(start, stop))
    return Route(tuple(shardings), axis, tuple(runs))
