"""Flax leaves that are read, in whole or in part, from their PyTorch arrays."""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import einops
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from piflow_jax.convert.float8 import FLOAT8
from piflow_jax.safetensors_files import LazyArray

__all__ = ["Leaf", "dtype_of", "kept_dtype"]


class Leaf(LazyArray):
    """A Flax leaf as a numpy array, read on request.

    Only the arrays of one layer are in memory at a time; from a bucket, which answers slowly, those
    of several layers. Numbers are checked as they are read. Reading a part checks only the numbers
    of that part.

    Args:
        pattern: See `piflow_jax.convert.rules.Rule`.
        sizes: See `piflow_jax.convert.rules.Rule`.
        names: The names of the arrays of each layer.
        state: Arrays by name.

    Raises:
        ValueError: Layers do not lead on both sides of the pattern; or, in reading, numbers are not
            finite.

    Attributes:
        rows: Axes along which a part needs only some of the arrays, or only some of their rows; the
            outermost in the files comes first. A part along any other axis reads whole rows.
    """

    rows: tuple[int, ...]

    def __init__(
        self,
        pattern: str,
        sizes: Mapping[str, int],
        names: Sequence[Sequence[str]],
        state: Mapping[str, np.ndarray],
    ):
        """Matches the axes of the leaf with those of the arrays; reads nothing."""
        left, right = (
            einops.parsing.ParsedExpression(side).composition for side in pattern.split("->")
        )
        if ["l"] in left and not left[0] == right[0] == ["l"]:
            raise ValueError(f"{pattern!r}: layers must lead on both sides")
        self._names, self._state = names, state
        self._sizes = {**sizes, "l": len(names), "n": len(names[0])}
        self._array, self._leaf = [group for group in left if group not in (["l"], ["n"])], right
        own = {group[0]: i for i, group in enumerate(right) if len(group) == 1}
        self.rows = tuple(own[axis] for axis in ("l", "n", *self._array[0]) if axis in own)
        arrays = [state[name] for layer in names for name in layer]
        super().__init__(
            [math.prod(self._sizes[axis] for axis in group) for group in right],
            _common_dtype(arrays),
            self._part,
            in_parts=True,
            at_once=max(getattr(array, "at_once", 1) for array in arrays),
        )

    def reads(self, index: tuple[slice, ...] = ()) -> list[tuple[str, slice]]:
        """The arrays and rows that reading a part needs; reads nothing itself.

        Args:
            index: Slices of leading axes.

        Returns:
            Names of arrays, and rows of their first axis.
        """
        parts, _ = self._parts(index)
        names = [self._names[layer][i] for layer in parts["l"] for i in parts["n"]]
        return [(name, rows) for name in names for rows in self._runs(parts)]

    def _parts(self, index: tuple[slice, ...]) -> tuple[dict[str, range], list[slice]]:
        """Parts of the arrays' axes, and the slices to cut from the leaf's joined axes."""
        cut = [*index, *[slice(None)] * (self.ndim - len(index))]
        parts = {axis: range(size) for axis, size in self._sizes.items()}
        for i, group in enumerate(self._leaf):
            if len(group) == 1:
                parts[group[0]], cut[i] = parts[group[0]][cut[i]], slice(None)
        return parts, cut

    def _runs(self, parts: Mapping[str, range]) -> list[slice]:
        """Rows of an array that hold the parts, with consecutive rows joined."""
        sizes = [self._sizes[axis] for axis in self._array[0]]
        rows = np.arange(math.prod(sizes)).reshape(sizes)[_slices(parts, self._array[0])].ravel()
        runs = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)
        return [slice(int(run[0]), int(run[-1]) + 1) for run in runs]

    def _part(self, index: tuple[slice, ...] = ()) -> np.ndarray:
        parts, cut = self._parts(index)
        shape = [len(range(n)[part]) for n, part in zip(self.shape, index, strict=False)]
        leaf = np.empty((*shape, *self.shape[len(shape) :]), self.dtype)
        layered = ["l"] in self._leaf
        layers = leaf if layered else leaf[None]

        def read(i: int) -> None:
            piece = self._layer(self._names[parts["l"][i]], parts)
            layers[i] = piece[tuple(cut[layered:])]

        with ThreadPoolExecutor(self.at_once) as pool:
            list(pool.map(read, range(len(layers))))
        return leaf

    def _layer(self, names: Sequence[str], parts: Mapping[str, range]) -> np.ndarray:
        """Parts of a layer's axes, in the order of the leaf."""
        arrays = [self._array_of(names[i], parts) for i in parts["n"]]
        stacked = np.stack(arrays) if len(arrays) > 1 else arrays[0][None]
        del arrays
        left = " ".join(axis for group in self._array for axis in group)
        right = " ".join(f"({' '.join(group)})" for group in self._leaf if group != ["l"])
        if ["n"] in self._leaf:
            return einops.rearrange(stacked, f"n {left} -> {right}")
        return einops.rearrange(stacked, f"n {left} -> n {right}")[0]

    def _array_of(self, name: str, parts: Mapping[str, range]) -> np.ndarray:
        """Parts of an array's axes, with each axis separate."""
        array = self._state[name]
        array = array if isinstance(array, LazyArray) else np.asarray(array)
        read = [_finite(name, array[(rows,)]) for rows in self._runs(parts)]
        read = np.concatenate(read) if len(read) > 1 else read[0]
        first, others = self._array[0], [axis for group in self._array[1:] for axis in group]
        sizes = [len(parts[axis]) for axis in first] + [self._sizes[axis] for axis in others]
        read = read.reshape(sizes)[(..., *_slices(parts, others))]
        return read.astype(self.dtype, copy=False)


def _slices(parts: Mapping[str, range], axes: Sequence[str]) -> tuple[slice, ...]:
    return tuple(slice(parts[axis].start, parts[axis].stop) for axis in axes)


def dtype_of(array: Any) -> np.dtype:
    """The dtype of an array, which may be lazy or a list.

    Args:
        array: The array.

    Returns:
        Its dtype.
    """
    dtype = getattr(array, "dtype", None)
    return dtype if isinstance(dtype, np.dtype) else np.asarray(array).dtype


def kept_dtype(dtype: np.dtype) -> np.dtype:
    """The dtype in which numbers are kept.

    Args:
        dtype: That of a file.

    Returns:
        The same, but bfloat16 instead of float8, whose numbers it can all represent.
    """
    return np.dtype(ml_dtypes.bfloat16) if dtype in FLOAT8 else dtype


def _common_dtype(arrays: Iterable[Any]) -> np.dtype:
    dtypes = {kept_dtype(dtype_of(array)) for array in arrays}
    # numpy has no common type for float16 and bfloat16.
    return dtypes.pop() if len(dtypes) == 1 else functools.reduce(jnp.promote_types, dtypes)


def _finite(name: str, read: np.ndarray) -> np.ndarray:
    """The numbers read; ValueError if they are not finite in JAX, where float64 becomes float32."""
    read = read.astype(kept_dtype(read.dtype), copy=False)
    with np.errstate(over="ignore"):
        seen = read.astype(np.float32) if read.dtype == np.float64 else read
    finite = np.isfinite(seen)
    if not finite.all():
        raise ValueError(
            f"{finite.size - np.count_nonzero(finite)} of the {finite.size} numbers of {name} are "
            "not finite: fetch the weights again, or take those of an earlier step"
        )
    return read
