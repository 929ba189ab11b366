"""Layers shared by the networks: linear, layer norm, time features, patches.

Axes of parameters have names, by which `piflow_jax.parallel` splits them over devices. `embed` is
the width of the tokens, `heads` all attention heads together, `mlp` the hidden layer of an MLP,
`layers` the blocks of a scan, and `rank` the inner size of an adapter where its factor has no
`embed`. An axis with the name None is never split.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import dtypes
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike

TIME_FEATURES = 256

Axes = tuple[str | None, ...]


def named(init: Callable, axes: Axes | None) -> Callable:
    """An initializer with axis names attached to its array; None attaches none."""
    return init if axes is None else nn.with_logical_partitioning(init, axes)


class Network(nn.Module):
    """A module with named parameter axes that returns fresh variables as plain arrays."""

    @nn.nowrap
    def init(self, *args: Any, **options: Any) -> Any:
        """Fresh variables by name, see `flax.linen.Module.init`.

        Args:
            *args: Random key or keys, and inputs.
            **options: Options of Flax.

        Returns:
            The variables, arrays without the names of their axes.
        """
        return nn.unbox(super().init(*args, **options))


def xavier_uniform(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """Draws a Xavier-uniform kernel `[in, *pieces, out]`.

    Middle axes count as separate matrices: queries, keys and values of a fused layer each get the
    bound of their own `[in, out]`.

    Args:
        key: Random key.
        shape: Kernel shape, input axis first, output axis last.
        dtype: Parameter dtype.

    Returns:
        Array of `shape`, uniform in `+-sqrt(6 / (in + out))`.
    """
    pieces = tuple(range(1, len(shape) - 1))
    initializer = jax.nn.initializers.variance_scaling(
        1.0, "fan_avg", "uniform", in_axis=0, out_axis=-1, batch_axis=pieces
    )
    return initializer(key, shape, dtype)


class Linear(nn.Module):
    """Affine map of the last axis, with a kernel `[in, *features]` and a bias `[*features]`.

    Attributes:
        features: Output axes that replace the last axis of the input.
        in_axes: Number of trailing input axes that are mapped together; the kernel leads with them.
        dtype: Dtype of the operands of the product; None promotes input and kernel.
        output_dtype: Dtype of the accumulated product, the bias sum and the result; None is the
            operands' dtype. Policy outputs use it to leave a bfloat16 network in float32.
        param_dtype: Dtype of fresh parameters.
        kernel_init: Initializer of the kernel.
        bias_init: Initializer of the bias.
        use_bias: Whether there is a bias.
        axes: Names of the kernel's axes. The bias takes the names of the last ones except `embed`,
            because values that are added to tokens are whole on every device. None names no axes.
    """

    features: tuple[int, ...]
    in_axes: int = 1
    dtype: DTypeLike | None = None
    output_dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    kernel_init: Callable = xavier_uniform
    bias_init: Callable = nn.initializers.zeros
    use_bias: bool = True
    axes: Axes | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `x[..., in]` to `[..., *features]`."""
        features, ins = tuple(self.features), x.shape[-self.in_axes :]
        whole = self.axes and tuple(
            None if axis == "embed" else axis for axis in self.axes[self.in_axes :]
        )
        kernel_init, bias_init = named(self.kernel_init, self.axes), named(self.bias_init, whole)
        kernel = self.param("kernel", kernel_init, (*ins, *features), self.param_dtype)
        dtype = jnp.result_type(x, kernel) if self.dtype is None else self.dtype
        output_dtype = dtype if self.output_dtype is None else self.output_dtype

        def product(x: jax.Array, kernel: Any) -> jax.Array:
            return contract(x, in_place(kernel, dtype, self.in_axes), self.in_axes, output_dtype)

        # The backward pass takes the kernel in its order anew. Otherwise a loop over blocks would
        # keep a second copy of every block's kernel for it.
        y = jax.checkpoint(product, prevent_cse=False)(x.astype(dtype), kernel)
        if not self.use_bias:
            return y
        bias = self.param("bias", bias_init, features, self.param_dtype)
        lead = (1,) * (y.ndim - len(features))
        return y + bias.astype(output_dtype).reshape(lead + features)


def in_place(kernel: Any, dtype: DTypeLike, in_axes: int = 1) -> jax.Array:
    """A kernel in a dtype, with its axes in the order in which a TPU has them in memory.

    For a product, the compiler may prefer another order. Without a word about it, it copies the
    kernels of all blocks into that order before the loop over the blocks, which takes as much
    memory again. With the order fixed, the kernel of one block is copied at a time. Arguments of a
    program are in an order that wastes no memory: in `[in, pieces, out]`, the pieces are tiled with
    the outputs if they fill a tile, and come first if they do not.

    Kernels that are wider than the dtype are left alone. They are trained, and the conversion
    copies them in any case. With the order fixed, a compiler (libtpu 0.0.42.1) gathered a split
    DiT's modulation kernels once more for every part of the batch.

    Args:
        kernel: `[*ins, *features]`, an array or a `Quantized`.
        dtype: The dtype.
        in_axes: Length of `ins`.

    Returns:
        `[*ins, *features]`.
    """
    array = kernel.astype(dtype)
    wider = dtypes.itemsize_bits(kernel.dtype) > dtypes.itemsize_bits(array.dtype)
    if array.ndim != 3 or in_axes != 1 or wider:
        return array
    pieces = array.shape[1]
    tiled = pieces in (2, 4, 8) and pieces * dtypes.itemsize_bits(kernel.dtype) >= 32
    order = Layout(major_to_minor=(0, 1, 2) if tiled else (1, 0, 2))
    keep = functools.partial(with_layout_constraint, layouts=order)
    return jax.lax.platform_dependent(array, tpu=keep, default=lambda array: array)


def contract(
    x: jax.Array, kernel: jax.Array, in_axes: int = 1, output_dtype: DTypeLike | None = None
) -> jax.Array:
    """Matrix product over the trailing axes of `x` and the leading axes of a kernel.

    Args:
        x: `[..., *ins]`.
        kernel: `[*ins, *features]`.
        in_axes: Length of `ins`.
        output_dtype: Dtype of the accumulation and the result; None is the dtype of the operands.

    Returns:
        `[..., *features]`.
    """
    ins = x.shape[-in_axes:]
    # With one contracted row axis, the kernel's gradient is a plain matrix product. A training step
    # of a small DiT is then a fifth faster on a CPU than with separate axes.
    axes = (tuple(range(1, in_axes + 1)), tuple(range(in_axes)))
    y = jax.lax.dot_general(
        x.reshape(-1, *ins), kernel, (axes, ((), ())), preferred_element_type=output_dtype
    )
    return y.reshape(x.shape[:-in_axes] + kernel.shape[in_axes:])


def layer_norm(x: jax.Array, eps: float) -> jax.Array:
    """Normalises the last axis to zero mean and unit variance, without learned scale or shift.

    Args:
        x: `[..., D]`.
        eps: Number added to the (biased) variance.

    Returns:
        Array like `x`. Statistics are taken in at least float32, in any dtype of `x`.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = wide - wide.mean(-1, keepdims=True)
    variance = (centred * centred).mean(-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + eps)).astype(x.dtype)


def time_features(t: jax.Array, *, scale: float = 1.0) -> jax.Array:
    """Sinusoidal features of a time, always computed in float32.

    Released weights were trained on float32 sinusoids. At `t = 1000` radians, rounding one
    frequency moves a feature by 6e-5, so higher precision here would be a different network.
    Frequencies are `10000^(-i / half)` for `i < half` (a shift of 0, as in the original DiT; the
    `diffusers` DiT divides by `half - 1`).

    Args:
        t: `[B]`, in the network's own units (radians of the fastest feature).
        scale: Factor of the angles, applied after the frequencies. In float32 this differs from
            scaling `t`.

    Returns:
        `[B, TIME_FEATURES]` float32: cosines, then sines.
    """
    half = TIME_FEATURES // 2
    # Rounded to float32 at the same two places as in the released networks, but on the host, so
    # that every backend uses the same numbers.
    exponents = np.float32(-math.log(10000.0)) * np.arange(half, dtype=np.float32)
    exponents = exponents / np.float32(half)
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = t.astype(jnp.float32)[:, None] * jnp.asarray(frequencies)[None, :]
    angles = angles if scale == 1.0 else angles * np.float32(scale)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def position_table(hidden: int, height: int, width: int, base: int) -> np.ndarray:
    """Fixed two-dimensional sine-cosine position embedding.

    Coordinates are stretched so that any grid spans the `base x base` grid of training. The first
    half of the features encodes the column and the second half the row, as in released weights.

    Args:
        hidden: Number of features, divisible by 4.
        height: Rows of the token grid.
        width: Columns of the token grid.
        base: Side of the square token grid of training.

    Returns:
        `[height, width, hidden]` float32.
    """
    quarter = hidden // 4
    frequencies = 1.0 / 10000.0 ** (np.arange(quarter, dtype=np.float64) / quarter)

    def encode(count: int) -> np.ndarray:
        # Released networks build the coordinates in float32 and the angles in float64.
        position = np.arange(count, dtype=np.float32) / np.float32(count / base)
        angles = position.astype(np.float64)[:, None] * frequencies[None, :]
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1).astype(np.float32)

    shape = (height, width, 2 * quarter)
    columns = np.broadcast_to(encode(width)[None], shape)
    rows = np.broadcast_to(encode(height)[:, None], shape)
    return np.concatenate([columns, rows], axis=-1)


def patchify(x: jax.Array, patch_size: int) -> jax.Array:
    """Cuts `x[B, H, W, C]` into `[B, H/p, W/p, p*p*C]`, a patch as (row, column, channel)."""
    b, height, width, channels = x.shape
    p = patch_size
    x = x.reshape(b, height // p, p, width // p, p, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, height // p, width // p, p * p * channels)


def unpatchify(y: jax.Array, patch_size: int, features: tuple[int, ...]) -> jax.Array:
    """Puts the pixels of patches back in place.

    Args:
        y: `[B, h, w, p * p * prod(features)]`, features in the order (row, column, *features).
        patch_size: `p`.
        features: Axes of every pixel, for example `(K, C)`.

    Returns:
        `[B, h * p, w * p, *features]`.
    """
    b, h, w, _ = y.shape
    p = patch_size
    size = math.prod(features)
    y = y.reshape(b, h, w, p, p, size).transpose(0, 1, 3, 2, 4, 5)
    return y.reshape(b, h * p, w * p, *features)
