"""Kernels of a frozen base in few bits.

A `Quantized` takes the place of a kernel in a network's parameters. Layers convert it to the dtype
that they compute in, one block at a time, so the whole base is in memory in few bits only. qwix
rounds and scales the numbers. It comes with the extra `qwix` and is imported when it is needed.
Its own way into a network, `qwix.quantize_model`, is not used: it would quantise adapters as well.
Source: a frozen base in few bits under adapters is that of QLoRA (arXiv 2305.14314).
"""

import importlib.util
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike

__all__ = ["BLOCKS", "Quantized", "check_qwix", "is_quantized", "quantize", "quantized_stacks"]

BLOCKS: dict[str, int] = {"int8": 0, "float8_e4m3fn": 0, "int4": 128}
"""How many weights of one output share a scale, by dtype; 0 stands for all of them."""


@struct.dataclass
class Quantized:
    """A kernel `[L, *ins, *features]` of `L` blocks, in few bits.

    Attributes:
        array: A `qwix.QArray`. As a tree, it consists of the numbers in few bits, in the kernel's
            shape, and of their float32 scales.
    """

    array: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The kernel's shape."""
        return self.array.shape

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the numbers in few bits."""
        return self.array.qvalue.dtype

    def astype(self, dtype: DTypeLike) -> jax.Array:
        """The kernel in a dtype; products with the scales are taken in float32.

        Args:
            dtype: The dtype.

        Returns:
            `[L, *ins, *features]`, or the same without the axis of the blocks.
        """
        import qwix

        return qwix.dequantize(self.array).astype(dtype)


def is_quantized(leaf: Any) -> bool:
    """Whether an entry of a tree of parameters is a kernel in few bits.

    Args:
        leaf: The entry.

    Returns:
        Whether it is a `Quantized`.
    """
    return isinstance(leaf, Quantized)


def check_qwix() -> None:
    """Raises ValueError with the remedy if qwix is not installed."""
    if importlib.util.find_spec("qwix") is None:
        raise ValueError('weights in few bits need qwix: pip install -e ".[qwix]"')


def quantize(kernel: jax.Array, dtype: str) -> Quantized:
    """Rounds a kernel to few bits; each block of weights that lead to one output has a scale.

    Args:
        kernel: `[L, *ins, *features]`. Blocks lie along the largest of its axes, without the first
            and the last. This is an axis of inputs.
        dtype: A key of `BLOCKS`.

    Returns:
        The kernel. The scale of a block is its largest absolute value divided by the largest value
        of `dtype`. An error is at most half the distance of neighbouring values of `dtype`, times
        the scale.

    Raises:
        ValueError: qwix is not installed.
    """
    check_qwix()
    import qwix

    axis = _axis(kernel.shape)
    block = math.gcd(kernel.shape[axis], BLOCKS[dtype])  # gcd(n, 0) is n
    others = [i for i in range(kernel.ndim) if i != axis]
    wide = kernel.astype(jnp.float32)
    tiles = {axis: block}
    return Quantized(qwix.quantize(wide, dtype, channelwise_axes=others, tiled_axes=tiles))


def _axis(shape: tuple[int, ...]) -> int:
    return max(range(1, len(shape) - 1), key=shape.__getitem__)


def quantized_stacks(variables: Any, dtype: str) -> Any:
    """Fresh variables in boxes of names, with the kernels of all blocks in few bits.

    Args:
        variables: `{"params": ...}` as `Module.init` of Flax returns it.
        dtype: A key of `BLOCKS`.

    Returns:
        The variables. Numbers in few bits have the kernel's names, scales those of the axes that
        are not shared.
    """
    leaves = flatten_dict(variables)
    for path, box in leaves.items():
        stacked = isinstance(box, nn.Partitioned) and box.names[0] == "layers"
        if stacked and path[-1] == "kernel":
            array = quantize(box.value, dtype).array
            axis = _axis(box.value.shape)
            names = (*box.names[:axis], None, *box.names[axis + 1 :])
            boxes = box.replace(value=array.qvalue), box.replace(value=array.scale, names=names)
            leaves[path] = Quantized(array.replace(qvalue=boxes[0], scale=boxes[1]))
    return unflatten_dict(leaves)
