"""LoRA files of other programs, added to a network's weights as these are read.

A fine-tune or a style often comes as low-rank matrices (LoRA, arXiv 2106.09685), which are added to
the weights that they change: `W + strength alpha / r B A`. Names are those of `peft`, `diffusers`,
kohya's scripts and ComfyUI, for layers under the names of `diffusers` or, for FLUX.1, under its
first ones, in which one layer is several of `diffusers`.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from flax import linen as nn

from piflow_jax.convert.adapters import scales
from piflow_jax.convert.files import Weights
from piflow_jax.convert.leaves import dtype_of, kept_dtype
from piflow_jax.convert.rules import listed
from piflow_jax.convert.table import kind_of, named, network_of
from piflow_jax.models.lora import TRAINED
from piflow_jax.safetensors_files import LazyArray

__all__ = ["with_loras"]

# How programs call the network. Names after the last two have underscores for dots.
_NETWORK = re.compile(
    r"^(?:base_model\.model\.|model\.|diffusion_model\.|transformer\.|unet\.)+"
    r"|^lora_(?:unet|transformer)_"
)
_MATRIX = re.compile(
    r"(?P<layer>.+)\.(?:lora_(?P<peft>[AB])(?:\.\w+)?|lora[_.](?P<kohya>down|up))\.weight"
)
_ALPHA = ".alpha"
_DOWN, _UP = ("A", "down"), ("B", "up")
_LAYER = re.compile(r"\.(\d+)\.")


@dataclasses.dataclass
class _Pair:
    """The matrices `A[r, in]` and `B[out, r]` of a layer, and its alpha if the file has one."""

    down: Any = None
    up: Any = None
    alpha: float | None = None


@dataclasses.dataclass(frozen=True)
class _Change:
    """Rows of a weight, and the rows of `factor B A` that are added to them."""

    rows: slice
    start: int
    pair: _Pair
    factor: float

    def added(self, weight: np.ndarray, first: int) -> None:
        """Adds to `weight`, whose rows begin with the weight's row `first`."""
        low = max(self.rows.start, first)
        high = min(self.rows.stop, first + len(weight))
        if low >= high:
            return
        of_up = slice(self.start + low - self.rows.start, self.start + high - self.rows.start)
        up, down = _matrix(self.pair.up)[of_up], _matrix(self.pair.down)
        weight[low - first : high - first] += self.factor * (up @ down)


def with_loras(
    weights: Mapping[str, Any],
    model: str,
    loras: Sequence[tuple[Mapping[str, Any], float]],
    base: nn.Module | None = None,
) -> Weights:
    """A network's weights with LoRA matrices added to them.

    Nothing is read before the weights are, and no more of it than belongs to the rows that are
    read. Sums are taken in float32 and rounded once, to the type of the weight.

    Args:
        weights: Arrays by official name, from `open_weights`.
        model: The network, a name in `KINDS` or of a student.
        loras: Arrays of each file by name, from `open_weights`, and its strength: a factor in
            addition to the file's own scale, `alpha / r`.
        base: The network, if the weights are the base of a student. A student has an output layer
            and a last modulation of its own, so the log says which matrices have no effect.

    Returns:
        The weights.

    Raises:
        ValueError: Matrices have no place in the network (the message lists them), or other shapes
            than its layers.
    """
    arrays = dict(network_of(weights, model))
    places = _places(arrays, named(model)[0].first_names)
    changes: dict[str, list[_Change]] = {}
    for state, strength in loras:
        for layer, change in _changes(state, strength, arrays, places):
            changes.setdefault(f"{layer}.weight", []).append(change)
    rules = [] if base is None else kind_of(base).rules(base)
    own = {name for rule in rules if rule.path[0] in TRAINED for name in rule.names}
    if idle := sorted(own & changes.keys()):
        logging.warning("LoRA without effect on layers that the student replaces:%s", listed(idle))
    arrays |= {name: _changed(arrays[name], found) for name, found in changes.items()}
    path, metadata = (getattr(weights, key, None) for key in ("path", "metadata"))
    return Weights(path, arrays, metadata or {}, getattr(weights, "selected", ""))


def _places(
    arrays: Mapping[str, Any], first_names: Mapping[str, Sequence[tuple[str, int, int]]]
) -> dict[str, list[tuple[str, slice]]]:
    """Layers and rows of a network by a layer's name in LoRA files, with underscores for dots."""
    rows = {
        name.removesuffix(".weight"): np.shape(array)[0]
        for name, array in arrays.items()
        if name.endswith(".weight") and np.ndim(array) == 2
    }
    places = {_flat(name): [(name, slice(0, count))] for name, count in rows.items()}
    numbers = sorted({int(match[1]) for name in rows for match in [_LAYER.search(name)] if match})
    for first, pieces in first_names.items():
        for number in numbers if "{layer}" in first else [0]:
            found = []
            for name, part, parts in pieces:
                name = name.format(layer=number)
                size = rows.get(name, 0) // parts
                found.append((name, slice(part * size, (part + 1) * size)))
            if all(name in rows for name, _ in found):
                places[_flat(first.format(layer=number))] = found
    return places


def _changes(
    state: Mapping[str, Any],
    strength: float,
    arrays: Mapping[str, Any],
    places: Mapping[str, list[tuple[str, slice]]],
) -> Iterable[tuple[str, _Change]]:
    """Layers that a file changes, and how; ValueError that lists what has no place."""
    pairs, faults = _pairs(state)
    scale, found = scales(state), []
    for layer, pair in pairs.items():
        short = _NETWORK.sub("", layer)
        place = places.get(_flat(short))
        if place is None:
            faults.append(f"{layer}, which is no layer of it")
            continue
        if pair.down is None or pair.up is None:
            faults.append(f"{layer}, without its {'first' if pair.down is None else 'second'} half")
            continue
        (rank, ins), (outs, other) = (_matrix_shape(m) for m in (pair.down, pair.up))
        wanted = sum(rows.stop - rows.start for _, rows in place)
        expected = (wanted, np.shape(arrays[f"{place[0][0]}.weight"])[1])
        if (outs, ins) != expected or rank != other:
            faults.append(f"{layer}, of shapes {(outs, other)} and {(rank, ins)}, for {expected}")
            continue
        own = scale(short, rank) if pair.alpha is None else pair.alpha / rank
        start = 0
        for name, rows in place:
            found.append((name, _Change(rows, start, pair, strength * own)))
            start += rows.stop - rows.start
    of = f"{path}: " if (path := getattr(state, "path", None)) is not None else ""
    if faults:
        raise ValueError(f"{of}what has no place in the network:{listed(sorted(faults))}")
    if not found:
        raise ValueError(f"{of}there are no LoRA matrices in it")
    return found


def _pairs(state: Mapping[str, Any]) -> tuple[dict[str, _Pair], list[str]]:
    """Matrices by layer as the file names it, and names of no matrix, or of a second one."""
    pairs: dict[str, _Pair] = {}
    faults = []
    for name, array in state.items():
        match = _MATRIX.fullmatch(name)
        if match:
            pair = pairs.setdefault(match["layer"], _Pair())
            side = "down" if (match["peft"] or match["kohya"]) in _DOWN else "up"
            if getattr(pair, side) is not None:  # of another adapter in the same file
                faults.append(f"{name}, a second matrix in its place")
            setattr(pair, side, array)
        elif not name.endswith(_ALPHA):
            faults.append(name)
    for name, array in state.items():
        if name.endswith(_ALPHA):
            layer = name.removesuffix(_ALPHA)
            if layer in pairs and np.size(array) == 1 and np.isfinite(alpha := _number(array)):
                pairs[layer].alpha = alpha
            else:
                faults.append(name)
    return pairs, faults


def _changed(array: Any, changes: Sequence[_Change]) -> LazyArray:
    """A weight with rows of it changed."""
    dtype = kept_dtype(dtype_of(array))

    def read(index: tuple[slice, ...] = ()) -> np.ndarray:
        rows, others = (index[0], index[1:]) if index else (slice(None), ())
        first = rows.indices(array.shape[0])[0]
        wide = np.array(array[(rows,)], np.float32)
        for change in changes:
            change.added(wide, first)
        return wide[(slice(None), *others)].astype(dtype)

    at_once = getattr(array, "at_once", 1)
    return LazyArray(np.shape(array), dtype, read, in_parts=True, at_once=at_once)


def _matrix(array: Any) -> np.ndarray:
    return np.asarray(array).astype(np.float32).reshape(_matrix_shape(array))


def _matrix_shape(array: Any) -> tuple[int, int]:
    """Rows and columns; convolutions of 1x1 have two more axes, and one number alone has none."""
    shape = np.shape(array)
    return (*shape[:2],) if len(shape) >= 2 and set(shape[2:]) <= {1} else (0, 0)


def _number(array: Any) -> float:
    return float(np.asarray(array).astype(np.float64).reshape(()))


def _flat(name: str) -> str:
    return name.replace(".", "_")
