"""Sizes of a network from the shapes of its weights, and errors for shapes that do not match."""

import re
from collections.abc import Mapping

import numpy as np


def shape_of(state: Mapping[str, np.ndarray], name: str, rank: int) -> tuple[int, ...]:
    """Shape of an array; ValueError if it is missing, empty, or does not have `rank` axes."""
    if name not in state:
        raise ValueError(f"the state does not fit the model: missing {name}, no size can be read")
    shape = np.shape(state[name])
    if len(shape) != rank or 0 in shape:
        raise ValueError(f"{name} has shape {shape}, expected {rank} axes and none of them empty")
    return shape


def divided(name: str, entries: int, by: int) -> int:
    """Entries of an array divided by `by`; ValueError if the quotient is not a whole number."""
    times, rest = divmod(entries, by)
    if rest or not times:
        raise ValueError(f"{name} has {entries} entries, not a multiple of {by}")
    return times


def linear_sizes(
    state: Mapping[str, np.ndarray], name: str, *, bias: bool = True
) -> tuple[int, int]:
    """Output and input features of a linear layer.

    Args:
        state: Arrays by name.
        name: Name of the layer.
        bias: Whether it has a bias.

    Returns:
        The shape of its weight.

    Raises:
        ValueError: Weight or bias is missing, or they do not match.
    """
    shape = shape_of(state, f"{name}.weight", 2)
    if not bias:
        return shape
    (rows,) = shape_of(state, f"{name}.bias", 1)
    if shape[0] != rows:
        turned = " (transposed)" if shape[1] == rows else ""
        raise ValueError(f"{name}.weight has shape {shape}{turned}, its bias {rows} entries")
    return shape


def grid_points(name: str, entries: int, by: int, given: int | None) -> int:
    """Number of points of a grid; ValueError if a single point could also be a velocity."""
    points = divided(name, entries, by)
    if points == 1 and given != 1:
        raise ValueError(
            f"{name} has one output per site and channel: these are weights of a teacher (of a "
            "grid of one point, if num_grid=1 is given)"
        )
    return points


def count_layers(state: Mapping[str, np.ndarray], blocks: str) -> int:
    """Highest block number plus one."""
    found = [re.match(rf"{blocks}\.(\d+)\.", name) for name in state]
    numbers = [int(match[1]) for match in found if match]
    if not numbers:
        raise ValueError(f"the state does not fit the model: it has no {blocks}")
    if max(numbers) >= len(state):
        raise ValueError(f"{blocks}.{max(numbers)}: there are {len(state)} arrays in all")
    return 1 + max(numbers)


def check_given(given: Mapping[str, float], sizes: Mapping[str, float]) -> None:
    """Raises ValueError for given sizes that are unknown or contradict the state."""
    unknown = sorted(set(given) - set(sizes))
    if unknown:
        raise ValueError(f"unknown sizes {unknown}; known are {sorted(sizes)}")
    wrong = [f"{k}: given {v}, the state has {sizes[k]}" for k, v in given.items() if v != sizes[k]]
    if wrong:
        raise ValueError("; ".join(wrong))
