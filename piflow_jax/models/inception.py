"""Inception-v3 as released with TensorFlow in 2015, whose features define FID.

The architecture is that of C. Szegedy et al., "Rethinking the Inception architecture for computer
vision" (arXiv 1512.00567), in the version of the file `inception-2015-12-05`. It differs from later
versions: average pooling leaves the padding out of its mean, the last block uses max pooling, and
there are 1008 classes. Names follow its PyTorch port, `pt_inception-2015-12-05`. Arrays have
channels last. The network is for inference only, so the normalisations' moments are parameters like
the others. Parameters come from `piflow_jax.convert`, as model `"inception"`.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

__all__ = [
    "IMAGE_SIZE",
    "POOL_FEATURES",
    "SPATIAL_CHANNELS",
    "Convolution",
    "InceptionOutput",
    "InceptionV3",
    "class_logits",
    "convolutions",
    "resize_bilinear",
]

IMAGE_SIZE = 299
POOL_FEATURES = 2048
# sFID's features are the first channels of `mixed_6/conv` in TensorFlow's graph. `mixed_6` there is
# the fourth of the blocks with 17x17 sites, `Mixed_6d` here.
SPATIAL_BLOCK, SPATIAL_BRANCH = "Mixed_6d", "branch1x1"
SPATIAL_CHANNELS = 7
NORM_EPSILON = 1e-3
# Convolutions in full float32, so that features do not depend on the machine's matrix units.
_PRECISION = jax.lax.Precision.HIGHEST


class Convolution(NamedTuple):
    """A convolution without bias, followed by a normalisation with fixed moments and a ReLU.

    Attributes:
        name: Name of its module in the PyTorch port.
        features: Output channels.
        kernel: Height and width of the kernel.
        stride: Stride of the output's sites along both axes.
        padding: "SAME" or "VALID", see `jax.lax.conv_general_dilated`.
    """

    name: str
    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"


# A branch is a chain of steps: a convolution, a pool by its name, or a tuple of convolutions, which
# read the same input and are concatenated.
Step = Convolution | str | tuple[Convolution, ...]
Branch = tuple[Step, ...]
_C = Convolution


def _chain(name: str, *layers: tuple) -> Branch:
    """Convolutions called `name_1`, `name_2`, ..."""
    return tuple(_C(f"{name}_{i}", *layer) for i, layer in enumerate(layers, 1))


def _block_a(pool: int) -> tuple[Branch, ...]:
    return (
        (_C("branch1x1", 64),),
        _chain("branch5x5", (48,), (64, (5, 5))),
        _chain("branch3x3dbl", (64,), (96, (3, 3)), (96, (3, 3))),
        ("average", _C("branch_pool", pool)),
    )


def _block_b() -> tuple[Branch, ...]:
    return (
        (_C("branch3x3", 384, (3, 3), 2, "VALID"),),
        _chain("branch3x3dbl", (64,), (96, (3, 3)), (96, (3, 3), 2, "VALID")),
        ("halve",),
    )


def _block_c(width: int) -> tuple[Branch, ...]:
    row, column = (1, 7), (7, 1)
    return (
        (_C("branch1x1", 192),),
        _chain("branch7x7", (width,), (width, row), (192, column)),
        _chain(
            "branch7x7dbl", (width,), (width, column), (width, row), (width, column), (192, row)
        ),
        ("average", _C("branch_pool", 192)),
    )


def _block_d() -> tuple[Branch, ...]:
    last = ((3, 3), 2, "VALID")
    return (
        _chain("branch3x3", (192,), (320, *last)),
        _chain("branch7x7x3", (192,), (192, (1, 7)), (192, (7, 1)), (192, *last)),
        ("halve",),
    )


def _block_e(pool: str) -> tuple[Branch, ...]:
    def fork(name):
        return _C(f"{name}a", 384, (1, 3)), _C(f"{name}b", 384, (3, 1))

    return (
        (_C("branch1x1", 320),),
        (*_chain("branch3x3", (384,)), fork("branch3x3_2")),
        (*_chain("branch3x3dbl", (448,), (384, (3, 3))), fork("branch3x3dbl_3")),
        (pool, _C("branch_pool", 192)),
    )


STEM: Branch = (
    _C("Conv2d_1a_3x3", 32, (3, 3), 2, "VALID"),
    _C("Conv2d_2a_3x3", 32, (3, 3), 1, "VALID"),
    _C("Conv2d_2b_3x3", 64, (3, 3)),
    "halve",
    _C("Conv2d_3b_1x1", 80, (1, 1), 1, "VALID"),
    _C("Conv2d_4a_3x3", 192, (3, 3), 1, "VALID"),
    "halve",
)
BLOCKS: dict[str, tuple[Branch, ...]] = {
    "Mixed_5b": _block_a(32),
    "Mixed_5c": _block_a(64),
    "Mixed_5d": _block_a(64),
    "Mixed_6a": _block_b(),
    "Mixed_6b": _block_c(128),
    "Mixed_6c": _block_c(160),
    "Mixed_6d": _block_c(160),
    "Mixed_6e": _block_c(192),
    "Mixed_7a": _block_d(),
    "Mixed_7b": _block_e("average"),
    "Mixed_7c": _block_e("maximum"),
}


def convolutions() -> Iterator[tuple[tuple[str, ...], int, Convolution]]:
    """All convolutions as `(module path, input channels, convolution)`."""
    width = 3

    def walk(branch, path, width):
        for step in branch:
            fork = (
                step if isinstance(step, tuple) and not isinstance(step, Convolution) else (step,)
            )
            members = [member for member in fork if isinstance(member, Convolution)]
            for member in members:
                yield (*path, member.name), width, member
            width = sum(member.features for member in members) or width
        return width

    width = yield from walk(STEM, (), width)
    for block, branches in BLOCKS.items():
        widths = []
        for branch in branches:
            widths.append((yield from walk(branch, (block,), width)))
        width = sum(widths)


class ConvNorm(nn.Module):
    """A `Convolution` with its parameters."""

    spec: Convolution

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x[B, H, W, C] to [B, H', W', features]."""
        spec, vector = self.spec, (self.spec.features,)
        shape = (*spec.kernel, x.shape[-1], spec.features)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        scale = self.param("scale", nn.initializers.ones, vector)
        bias = self.param("bias", nn.initializers.zeros, vector)
        mean = self.param("mean", nn.initializers.zeros, vector)
        variance = self.param("variance", nn.initializers.ones, vector)
        x = jax.lax.conv_general_dilated(
            x,
            kernel.astype(x.dtype),
            (spec.stride, spec.stride),
            spec.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=_PRECISION,
        )
        factor = scale * jax.lax.rsqrt(variance + NORM_EPSILON)
        x = (x - mean.reshape(1, 1, 1, -1)) * factor.reshape(1, 1, 1, -1)
        return nn.relu(x + bias.reshape(1, 1, 1, -1))


def _pool(name: str, x: jax.Array) -> jax.Array:
    if name == "halve":
        return nn.max_pool(x, (3, 3), (2, 2), "VALID")
    if name == "maximum":
        return nn.max_pool(x, (3, 3), (1, 1), "SAME")
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def _run(branch: Branch, x: jax.Array) -> jax.Array:
    """Applies a branch. Call it in a compact module, which owns the convolutions."""
    for step in branch:
        if isinstance(step, str):
            x = _pool(step, x)
        elif isinstance(step, Convolution):
            x = ConvNorm(step, name=step.name)(x)
        else:
            x = jnp.concatenate([ConvNorm(conv, name=conv.name)(x) for conv in step], axis=-1)
    return x


class Block(nn.Module):
    """Parallel branches."""

    branches: tuple[Branch, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps x[B, H, W, C] to all outputs concatenated, and the first branch's output alone."""
        outputs = [_run(branch, x) for branch in self.branches]
        return jnp.concatenate(outputs, axis=-1), outputs[0]


class InceptionOutput(NamedTuple):
    """Features and logits of images.

    Attributes:
        pool: `[B, 2048]`, the mean over sites of the last block, which is FID's feature.
        spatial: `[B, h, w, 7]` of a middle layer with 17x17 sites, which are sFID's features.
        logits: `[B, 1008]`, bias included. (The Inception Score leaves the bias out:
            `class_logits`.)
    """

    pool: jax.Array
    spatial: jax.Array
    logits: jax.Array


class InceptionV3(nn.Module):
    """The network.

    Attributes:
        num_classes: Number of logits.
    """

    num_classes: int = 1008

    @nn.compact
    def __call__(self, images: jax.Array, *, resize: bool = True) -> InceptionOutput:
        """Features of images.

        Args:
            images: `[B, H, W, 3]` with values in [0, 255], integers or floats.
            resize: Whether to resize images to 299x299 first, as all published figures do. Without
                resizing, sides must be at least 75.

        Returns:
            The features, float32 (float64 for float64 images and parameters).

        Raises:
            ValueError: Images have another shape, or are too small.
        """
        if images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"`images` must be [B, H, W, 3], got {list(images.shape)}")
        if not resize and min(images.shape[1:3]) < 75:
            raise ValueError(f"unresized images need sides of 75, got {list(images.shape)}")
        x = images if jnp.issubdtype(images.dtype, jnp.floating) else images.astype(jnp.float32)
        if resize:
            x = resize_bilinear(x, IMAGE_SIZE, IMAGE_SIZE)
        x = _run(STEM, (x - 128) / 128)
        for name, branches in BLOCKS.items():
            x, first = Block(branches, name=name)(x)
            if name == SPATIAL_BLOCK:
                spatial = first[..., :SPATIAL_CHANNELS]
        pool = x.mean(axis=(1, 2))
        shape = (POOL_FEATURES, self.num_classes)
        kernel = self.param("fc_kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("fc_bias", nn.initializers.zeros, shape[1:])
        logits = jnp.matmul(pool, kernel, precision=_PRECISION) + bias[None, :]
        return InceptionOutput(pool, spatial, logits)


def class_logits(params: dict, pool: jax.Array) -> jax.Array:
    """Logits of pooled features *without* the layer's bias, as in the Inception Score.

    Args:
        params: Variables of `InceptionV3`.
        pool: `[B, 2048]`.

    Returns:
        `[B, 1008]`.
    """
    return jnp.matmul(pool, params["params"]["fc_kernel"], precision=_PRECISION)


def resize_bilinear(images: jax.Array, height: int, width: int) -> jax.Array:
    """Bilinear resize with the pixel positions and arithmetic of TensorFlow 1's `ResizeBilinear`.

    Output pixel `i` reads the input at `i * in / out` (in float32). Neither pixel centres nor
    corners are aligned, nothing is averaged when an image shrinks, and the last pixel is repeated
    beyond the border. With another library's resize an FID changes by more than the difference
    between models.

    Args:
        images: Floats `[B, H, W, C]`.
        height: Height of the output.
        width: Width of the output.

    Returns:
        `[B, height, width, C]`, with the dtype of `images`.
    """

    def taps(size, out):
        at = np.arange(out, dtype=np.float32) * (np.float32(size) / np.float32(out))
        low = np.floor(at)
        lower = low.astype(np.int32)
        upper = np.minimum(lower + 1, size - 1)
        return lower, upper, jnp.asarray(at - low, images.dtype)

    top, bottom, y = taps(images.shape[1], height)
    left, right, x = taps(images.shape[2], width)
    x, y = x[None, None, :, None], y[None, :, None, None]
    columns_left, columns_right = images[:, :, left], images[:, :, right]
    rows = columns_left + (columns_right - columns_left) * x
    upper = rows[:, top]
    return upper + (rows[:, bottom] - upper) * y
