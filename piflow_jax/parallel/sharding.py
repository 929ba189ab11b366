"""Where arrays lie: from logical axis names to the axes of the mesh.

Fully sharded data parallelism (`fsdp`) splits every parameter along the width of the tokens, or an
adapter's factor that lacks it along the rank, and gathers one layer at a time; tensor parallelism
(`tensor`) splits heads and hidden layers, and the work with them. Batches are split over `data` and
`fsdp` together.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from piflow_jax.models.axes import parameter_axes

__all__ = ["RULES", "ActivationSharding", "parameter_shardings", "state_shardings"]

BATCH = ("data", "fsdp")
# From an axis's name to the axis of the mesh that splits it; names that are not here stay whole.
RULES: dict[str, str] = {
    "embed": "fsdp",
    "rank": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
}


def parameter_shardings(mesh: Mesh, tree: Any, *, split: bool = True) -> Any:
    """Shardings of a network's parameters, or of anything that holds such trees.

    An array belongs to the parameter that its path names behind `params`, wherever that stands: so
    averages and the optimiser's moments lie as their parameters do.

    Args:
      mesh: with the axes `data`, `fsdp` and `tensor`.
      tree: arrays or their shapes.
      split: False keeps all of it whole on every device.

    Returns:
      A tree of `NamedSharding`. Arrays that are not a parameter's (counters) are whole.

    Raises:
      ValueError: A parameter is not in the table of axes, or an axis of the mesh does not divide
        one of its axes; the message names both.
    """

    def sharding(path, leaf):
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        if not split or not leaf.ndim or "params" not in names:
            return NamedSharding(mesh, PartitionSpec())
        names = names[names.index("params") + 1 :]
        axes = parameter_axes(names, leaf.ndim)
        for size, axis in zip(leaf.shape, axes, strict=True):
            across = mesh.shape[RULES[axis]] if axis in RULES else 1
            if size % across:
                raise ValueError(
                    f"config.mesh.{RULES[axis]} ({across}) must divide the axis {axis!r} of "
                    f"{'/'.join(names)}, which has the size {size}"
                )
        return NamedSharding(mesh, PartitionSpec(*(RULES.get(axis) for axis in axes)))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def state_shardings(mesh: Mesh, state: Any, *, split: bool = True, ema: bool = True) -> Any:
    """Shardings of a train state, its average by a rule of its own.

    Args:
      mesh: see `parameter_shardings`.
      state: a `TrainState` of arrays or shapes.
      split: whether parameters and the optimiser's state are split.
      ema: whether the average is.

    Returns:
      A `TrainState` of `NamedSharding`.
    """
    shardings = parameter_shardings(mesh, state, split=split)
    return dataclasses.replace(
        shardings, ema_params=parameter_shardings(mesh, state.ema_params, split=ema)
    )


@dataclasses.dataclass(frozen=True)
class ActivationSharding:
    """Pins activations to the mesh, for the field `constrain` of a network.

    Without it the compiler may prefer to move activations where weights lie, which are smaller.

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
