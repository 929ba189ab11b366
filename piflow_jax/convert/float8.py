"""Weights stored in float8, and their scales.

Source: the names in ComfyUI's scaled files (`scale_weight`, later `weight_scale`) and in the
quantised checkpoints of `transformers` and `compressed-tensors` (`weight_scale`, for blocks
`weight_scale_inv`). In all of them a weight is the stored number times its scale.
"""

from collections.abc import Mapping

import ml_dtypes
import numpy as np

from piflow_jax.safetensors_files import LazyArray

FLOAT8 = tuple(map(np.dtype, (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)))
_SCALES = ("scale_{}", "{}_scale", "{}_scale_inv")
# Further entries of such files: scales of activations, and marks of the format.
_UNREAD = ("scale_input", "input_scale", "scaled_fp8", "comfy_quant")
# Side of a block with its own scale.
_BLOCK = 128


def with_scales(arrays: Mapping[str, LazyArray]) -> dict[str, LazyArray]:
    """Multiplies float8 arrays by their scales when they are read.

    Args:
        arrays: The arrays of a network by name.

    Returns:
        The arrays without scales. Arrays with a scale become float32; the others are unchanged.

    Raises:
        ValueError: A scale does not fit its array.
    """
    small = [name for name, array in arrays.items() if array.dtype in FLOAT8]
    if not small:
        return dict(arrays)
    scaled = {name: array for name, array in arrays.items() if not _unread(name)}
    for name in small:
        path, _, leaf = name.rpartition(".")
        start = path and f"{path}."
        for pattern in _SCALES:
            scale = scaled.pop(f"{start}{pattern.format(leaf)}", None)
            if scale is not None:
                scaled[name] = _product(name, scaled[name], scale)
    return scaled


def _unread(name: str) -> bool:
    return name.rpartition(".")[2] in _UNREAD


def _product(name: str, array: LazyArray, scale: LazyArray) -> LazyArray:
    shape = array.shape
    blocks = tuple(-(-side // _BLOCK) for side in shape)
    whole, by_row = scale.shape in ((), (1,)), scale.shape in (shape[:1], (*shape[:1], 1))
    if not whole and not by_row and (len(shape) != 2 or scale.shape != blocks):
        raise ValueError(f"the scale of {name} has shape {scale.shape}, which {shape} does not fit")

    def read(index: tuple[slice, ...] = ()) -> np.ndarray:
        factor = np.asarray(scale).astype(np.float32)
        if whole or by_row:
            factor = factor.reshape(() if whole else (-1, *(1,) * (len(shape) - 1)))
            factor = np.broadcast_to(factor, shape)[index]
        else:
            for axis, side in enumerate(shape):
                part = range(side)[index[axis] if axis < len(index) else slice(None)]
                factor = factor.take(np.array(part, int) // _BLOCK, axis)
        return array[index].astype(np.float32) * factor

    return LazyArray(shape, np.float32, read, in_parts=True, at_once=array.at_once)
