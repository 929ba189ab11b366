"""How leaves of files come to the devices of several processes, each of which reads a part.

The part of a leaf on a device is seldom a range of a file: leaves are split along axes that are
inner ones of the files, or are whole on several devices. So each process reads rows of the files
that no other one reads, and the devices exchange them, which is faster than any disk or bucket.
"""

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

__all__ = ["Route", "route"]


class Route(NamedTuple):
    """The way of a leaf.

    Attributes:
      shardings: how it lies on the devices when it has been read, what it goes through after that,
        and where it goes.
      axis: the axis along which it is read in parts.
      runs: what this process reads of that axis.
    """

    shardings: tuple[Sharding, ...]
    axis: int
    runs: tuple[range, ...]


def route(
    shape: Sequence[int], rows: Sequence[int], sharding: Sharding, devices: Collection[jax.Device]
) -> Route:
    """The way of a leaf to devices.

    Args:
      shape: its shape.
      rows: axes along which parts of it are parts of the files, see `piflow_jax.convert.Leaf`.
      sharding: where it goes.
      devices: those of the process.

    Returns:
      The way on which processes read least. A process reads all where all devices are its own, or
      where the mesh divides none of `rows`.
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
