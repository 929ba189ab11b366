"""The table of output heads in official weights: each network's prediction and how to read it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax import linen as nn

from piflow_jax.convert.kinds import Kind
from piflow_jax.convert.rules import Rule, linear
from piflow_jax.convert.sizes import divided, grid_points, shape_of
from piflow_jax.models.heads import DXHead, GMHead, VelocityHead

__all__ = ["HEADS", "Head", "check_exportable", "read_head"]

Read = Callable[[Mapping[str, np.ndarray], Kind, int, int, dict[str, Any]], tuple[nn.Module, dict]]
"""`(state, kind, patch^2, channels, given) -> (head, sizes read from the weights)`."""


@dataclasses.dataclass(frozen=True)
class Head:
    """A row of `HEADS`.

    Attributes:
        read: Reads the head; removes from `given` the sizes that only it uses.
        mark: An array that only this head has, in all of its networks; empty if there is none.
        first: An array that reading needs, if there is a mark.
    """

    read: Read
    mark: str = ""
    first: str = ""


def _rows_of(kind: Kind) -> tuple[str, int]:
    """An array with the rows of a network's output layer, and the number of its axes."""
    return (f"{kind.output}.bias", 1) if kind.module.use_bias else (f"{kind.output}.weight", 2)


def _velocity(state, kind, pixels, channels, given):
    name, rank = _rows_of(kind)
    rows = np.shape(state.get(name, ()))
    points, rest = divmod(rows[0], pixels * channels) if len(rows) == rank else (1, 0)
    if points > 1 and not rest:
        raise ValueError(
            f"{name} has {points} outputs per site and channel: these are weights of a "
            f"student that predicts a grid, dx_{kind.name}"
        )
    return VelocityHead(), {}


def _mixture(state, kind, pixels, channels, given):
    (rows,) = shape_of(state, "proj_out_logweights.bias", 1)
    sizes = {"num_components": divided("proj_out_logweights.bias", rows, pixels)}
    constant = given.pop("constant_logstd", None)
    has_head = any(name.startswith("proj_out_logstds.") for name in state)
    if has_head and constant is not None:
        raise ValueError("constant_logstd was given but the state has a logstd head")
    if has_head:
        (sizes["logstd_hidden"],) = shape_of(state, "proj_out_logstds.1.bias", 1)
    elif constant is None:
        raise ValueError("the state has no logstd head: constant_logstd must be given")
    return GMHead(**sizes, constant_logstd=constant), sizes


def _grid(state, kind, pixels, channels, given):
    (name, rank), by = _rows_of(kind), pixels * channels
    rows, *_ = shape_of(state, name, rank)
    sizes = {"num_grid": grid_points(name, rows, by, given.get("num_grid"))}
    return DXHead(**sizes), sizes


# By the prefix of a network's name: none for a teacher, a policy for its student.
HEADS = {
    "": Head(_velocity),
    "gm": Head(_mixture, mark="proj_out_means.weight", first="proj_out_logweights.bias"),
    "dx": Head(_grid),
}


def read_head(
    state: Mapping[str, np.ndarray], head: str, kind: Kind, sizes: Mapping[str, Any], given: dict
) -> tuple[nn.Module, dict]:
    """The head that the output layers belong to, and its sizes.

    Args:
        state: Arrays by official name.
        head: A name in `HEADS`.
        kind: The kind of the network.
        sizes: `patch_size` and `in_channels` of the network.
        given: Known sizes. `constant_logstd` is removed from them; it is needed if and only if a
            mixture has no logstd head.

    Returns:
        A head of `piflow_jax.models.heads`, and the sizes read from its weights.

    Raises:
        ValueError: An output layer is missing or belongs to another head, or `constant_logstd` does
            not fit the state.
    """
    return HEADS[head].read(state, kind, sizes["patch_size"] ** 2, sizes["in_channels"], given)


def head_rules(
    module: nn.Module, output: str, layer: Callable[[str, str, int, int], list[Rule]]
) -> list[Rule]:
    """Rules for the output head of a network.

    Args:
        module: The network.
        output: Official name of the layer of velocities.
        layer: `(official name, ours, k, c) -> rules` for a layer with `k` times `c` outputs per
            site.

    Returns:
        Rules that cover every parameter of the head once.

    Raises:
        ValueError: The head has no official counterpart.
    """
    head, channels, hidden = module.head, module.in_channels, module.hidden
    if isinstance(head, VelocityHead | DXHead):
        return layer(output, "output", getattr(head, "num_grid", 1), channels)
    if not isinstance(head, GMHead):
        raise ValueError(f"no official names for a head of type {type(head).__name__}")
    rules = layer("proj_out_means", "means", head.num_components, channels)
    rules += layer("proj_out_logweights", "logweights", head.num_components, 1)
    if head.constant_logstd is None:
        rules += linear("proj_out_logstds.1", ("head", "logstd_in"), head.logstd_hidden, hidden)
        rules += linear("proj_out_logstds.3", ("head", "logstd_out"), 1, head.logstd_hidden)
    return rules


def check_exportable(module: nn.Module) -> None:
    """Refuses modules for which official networks have no layout.

    Args:
        module: The network.

    Raises:
        ValueError: It has adapters, or a head with a skip.
    """
    head = getattr(module, "head", None)
    if isinstance(head, DXHead) and head.input_skip:
        raise ValueError("DXHead.input_skip: official networks have no such skip")
    if getattr(module, "lora", None) is not None:
        raise ValueError("the network has adapters: fuse them, or export them on their own")
