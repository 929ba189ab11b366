"""Sharding of arrays: from the names of parameters' axes to the axes of the mesh.

Fully sharded data parallelism (`fsdp`) splits every parameter along the width of the tokens and
gathers one layer at a time. An adapter's factor without that axis is split along the rank. Tensor
parallelism (`tensor`) splits heads and hidden layers, together with their work. Batches are split
over `data` and `fsdp` together. Parameters get their names from
`flax.linen.with_logical_partitioning`, see `piflow_jax.models.layers`. A parameter without names is
split over `fsdp` along its largest divisible axis.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from piflow_jax.models.attention import HEADS_AXIS

BATCH = ("data", "fsdp")
# From an axis's name to the mesh axis that splits it; axes with other names stay whole.
RULES: dict[str, str] = {
    "embed": "fsdp",
    "rank": "fsdp",
    "heads": HEADS_AXIS,
    "mlp": "tensor",
}


def parameter_shardings(mesh: Mesh, params: Any, *, split: bool = True) -> Any:
    """Shardings of a network's parameters.

    Args:
      mesh: with the axes `data`, `fsdp` and `tensor`.
      params: a tree of arrays or their shapes, each with the names of its axes (in a box of
        `flax.linen.Partitioned`) or without.
      split: False keeps all parameters whole on every device.

    Returns:
      A tree of `NamedSharding`, without boxes. Among arrays without names, vectors stay whole, and
      so do arrays without an axis that `fsdp` divides.

    Raises:
      ValueError: A mesh axis does not divide an axis that it splits, or the numbers of a
        parameter's names and axes differ; the message names the parameter.
    """

    def sharding(path, leaf):
        if not split or not nn.unbox(leaf).shape:
            axes = []
        elif _is_box(leaf):
            axes = _by_name(mesh, _path(path), leaf.value.shape, leaf.names)
        else:
            axes = _by_size(mesh, leaf.shape)
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree_util.tree_map_with_path(sharding, params, is_leaf=_is_box)


def _is_box(leaf: Any) -> bool:
    return isinstance(leaf, nn.Partitioned)


def _by_name(
    mesh: Mesh, path: tuple[str, ...], shape: tuple[int, ...], names: Sequence[str | None]
) -> list[str | None]:
    parameter = "/".join(path).removeprefix("params/")
    if len(names) != len(shape):
        raise ValueError(f"{parameter} has the axes {list(shape)}, but the names {list(names)}")
    for size, name in zip(shape, names, strict=True):
        across = mesh.shape[RULES[name]] if name in RULES else 1
        if size % across:
            raise ValueError(
                f"config.mesh.{RULES[name]} ({across}) must divide the axis {name!r} of "
                f"{parameter}, which has the size {size}"
            )
    axes = [RULES.get(name) for name in names]
    # A mesh axis splits one axis of a parameter, the first with a matching name.
    return [None if axis in axes[:i] else axis for i, axis in enumerate(axes)]


def _by_size(mesh: Mesh, shape: tuple[int, ...]) -> list[str | None]:
    dividing = [axis for axis, size in enumerate(shape) if not size % mesh.shape["fsdp"]]
    if len(shape) < 2 or not dividing:
        return []
    largest = max(dividing, key=lambda axis: shape[axis])
    return ["fsdp" if axis == largest else None for axis in range(len(shape))]


def state_shardings(
    mesh: Mesh, state: Any, params: Any, *, split: bool = True, ema: bool = True
) -> Any:
    """Shardings of a train state, with a separate rule for its average.

    An array belongs to the parameter with the same shape whose path is the end of the array's path.
    Averages and optimiser moments therefore have the shardings of their parameters.

    Args:
      mesh: see `parameter_shardings`.
      state: a `TrainState` of arrays or shapes.
      params: the parameters in it, see `parameter_shardings`.
      split: whether parameters and the optimiser's state are split.
      ema: whether the average is split.

    Returns:
      A `TrainState` of `NamedSharding`. Arrays that belong to no parameter (counters) are whole.

    Raises:
      ValueError: see `parameter_shardings`.
    """
    leaves = jax.tree_util.tree_leaves_with_path(nn.unbox(params))
    parameters = [(_path(path), leaf.shape) for path, leaf in leaves]

    def like_parameters(tree: Any, split: bool) -> Any:
        shardings = jax.tree.leaves(parameter_shardings(mesh, params, split=split))
        known = dict(zip(parameters, shardings, strict=True))

        def place(path, leaf):
            path = _path(path)
            ends = ((path[start:], leaf.shape) for start in range(len(path) + 1))
            found = (known[end] for end in ends if end in known)
            return next(found, NamedSharding(mesh, PartitionSpec()))

        return jax.tree_util.tree_map_with_path(place, tree)

    placed = like_parameters(state, split)
    return dataclasses.replace(placed, ema_params=like_parameters(state.ema_params, ema))


def _path(path: Sequence[Any]) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


@dataclasses.dataclass(frozen=True)
class ActivationSharding:
    """Sets the sharding of activations over the mesh, for the field `constrain` of a network.

    Without it the compiler may prefer to move activations to the weights, because they are smaller.

    Attributes:
      mesh: see `parameter_shardings`.
    """

    mesh: Mesh

    def __call__(self, x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
        """The same array; `batch` is split over `data` and `fsdp`, `embed` is whole."""
        spec = [
            BATCH if axis == "batch" else RULES[axis] if axis in ("heads", "mlp") else None
            for axis in axes
        ]
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(*spec)))
