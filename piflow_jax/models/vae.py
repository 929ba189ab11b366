"""The autoencoder of Stable Diffusion (arXiv 2112.10752, section 3.1) and its descendants.

It serves the latent spaces of DiT teachers (`sd-vae-ft-ema` and `sd-vae-ft-mse`, which set the
default sizes, and VA-VAE, with 32 channels, stride 16 and attention at its last level), of FLUX.1
(16 channels, no convolutions around the latents) and of Qwen-Image.
Qwen-Image has an autoencoder of videos, causal in time (arXiv 2508.02324, section 2.3). A picture
is its first frame, with zeros before it, so only the last slice in time of each kernel matters. The
result is this network with other norms and with upsampling that halves widths.

Channels last. Parameters come from `piflow_jax.convert`, as models `"vae"` and `"qwen_vae"`.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from piflow_jax.arguments import check_no_pixels
from piflow_jax.models.attention import attend

__all__ = [
    "AutoencoderKL",
    "decode_in_chunks",
    "picture_decoder",
    "picture_encoder",
    "sample_posterior",
]

NORM_EPSILON = 1e-6
# Range to which the logarithm of the posterior's variance is clipped.
LOGVAR_RANGE = (-30.0, 20.0)

_conv3 = functools.partial(nn.Conv, kernel_size=(3, 3), padding=1)
_conv1 = functools.partial(nn.Conv, kernel_size=(1, 1))


class ChannelNorm(nn.Module):
    """Divides the channels of each site by their root mean square and scales them."""

    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x[..., C] to the same shape; statistics are float32 at least."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        # Norms are bounded below by 1e-12, as in the release, so that sites of zeros stay zeros.
        square = jnp.maximum(jnp.sum(wide * wide, axis=-1, keepdims=True), 1e-24)
        wide = wide * jax.lax.rsqrt(square) * x.shape[-1] ** 0.5 * jnp.expand_dims(scale, (0, 1, 2))
        return wide.astype(self.dtype or jnp.promote_types(x.dtype, scale.dtype))


def _norm(groups: int | None, dtype, name: str | None = None) -> nn.Module:
    if groups is None:
        return ChannelNorm(dtype, name=name)
    # The fast variance loses digits where a channel's mean is large, as in decoders.
    return nn.GroupNorm(
        groups, epsilon=NORM_EPSILON, dtype=dtype, use_fast_variance=False, name=name
    )


class _Block(nn.Module):
    features: int
    norm_groups: int | None
    dtype: DTypeLike | None = None


class ResnetBlock(_Block):
    """Two normalised convolutions and a skip, which is a 1x1 convolution if widths differ."""

    def setup(self):
        self.norm1 = _norm(self.norm_groups, self.dtype)
        self.conv1 = _conv3(self.features, dtype=self.dtype)
        self.norm2 = _norm(self.norm_groups, self.dtype)
        self.conv2 = _conv3(self.features, dtype=self.dtype)
        self.conv_shortcut = _conv1(self.features, dtype=self.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x[B, H, W, C] to [B, H, W, features]."""
        h = self.conv1(nn.silu(self.norm1(x)))
        h = self.conv2(nn.silu(self.norm2(h)))
        return h + (x if x.shape[-1] == self.features else self.conv_shortcut(x))


class AttentionBlock(_Block):
    """Self-attention of one head over all sites, and a skip."""

    def setup(self):
        self.group_norm = _norm(self.norm_groups, self.dtype)
        self.to_q = nn.Dense(self.features, dtype=self.dtype)
        self.to_k = nn.Dense(self.features, dtype=self.dtype)
        self.to_v = nn.Dense(self.features, dtype=self.dtype)
        self.to_out = nn.Dense(self.features, dtype=self.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x[B, H, W, C] to the same shape."""
        tokens = self.group_norm(x).reshape(x.shape[0], -1, 1, self.features)
        attended = attend(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return x + self.to_out(attended).reshape(x.shape)


class _Half(nn.Module):
    """What encoder and decoder share."""

    channels: tuple[int, ...]
    layers_per_block: int
    norm_groups: int | None
    attention_levels: tuple[int, ...] = ()
    dtype: DTypeLike | None = None

    def resnet(self, features: int, name: str) -> ResnetBlock:
        return ResnetBlock(features, self.norm_groups, self.dtype, name=name)

    def attention(self, features: int, name: str) -> AttentionBlock:
        return AttentionBlock(features, self.norm_groups, self.dtype, name=name)

    def level(self, x: jax.Array, place: str, level: int, layers: int) -> jax.Array:
        features = self.channels[level]
        for layer in range(layers):
            x = self.resnet(features, f"{place}_resnet_{layer}")(x)
            if level in self.attention_levels:
                x = self.attention(features, f"{place}_attention_{layer}")(x)
        return x

    def middle(self, x: jax.Array) -> jax.Array:
        features = self.channels[-1]
        x = self.resnet(features, "mid_resnet_0")(x)
        x = self.attention(features, "mid_attention")(x)
        return self.resnet(features, "mid_resnet_1")(x)

    def out(self, x: jax.Array, features: int) -> jax.Array:
        x = nn.silu(_norm(self.norm_groups, self.dtype, "conv_norm_out")(x))
        return _conv3(features, dtype=self.dtype, name="conv_out")(x)


class Encoder(_Half, kw_only=True):
    """Maps an image to the posterior's mean and log-variance, before `quant_conv`."""

    latent_channels: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x[B, H, W, 3] to [B, H / f, W / f, 2 latent_channels]."""
        x = _conv3(self.channels[0], dtype=self.dtype, name="conv_in")(x)
        for level, features in enumerate(self.channels):
            x = self.level(x, f"down_{level}", level, self.layers_per_block)
            if level + 1 < len(self.channels):
                x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
                x = nn.Conv(
                    features,
                    (3, 3),
                    strides=2,
                    padding="VALID",
                    dtype=self.dtype,
                    name=f"down_{level}_downsample",
                )(x)
        x = self.middle(x)
        return self.out(x, 2 * self.latent_channels)


class Decoder(_Half, kw_only=True):
    """Maps latents, after `post_quant_conv`, to an image."""

    out_channels: int
    halving_upsample: bool

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        """Maps z[B, h, w, latent_channels] to [B, f h, f w, out_channels]."""
        x = _conv3(self.channels[-1], dtype=self.dtype, name="conv_in")(z)
        x = self.middle(x)
        for level, features in enumerate(reversed(self.channels)):
            last = len(self.channels) - 1
            x = self.level(x, f"up_{level}", last - level, self.layers_per_block + 1)
            if level < last:
                x = x.repeat(2, axis=1).repeat(2, axis=2)
                width = features // 2 if self.halving_upsample else features
                x = _conv3(width, dtype=self.dtype, name=f"up_{level}_upsample")(x)
        return self.out(x, self.out_channels)


class AutoencoderKL(nn.Module):
    """The whole autoencoder.

    Attributes:
        channels: Width of each level; every level but the last halves the resolution.
        layers_per_block: Residual blocks per level of the encoder (the decoder has one more).
        latent_channels: `C` of the latents.
        in_channels: `C` of the images.
        norm_groups: Groups of every normalisation; divides all widths. None normalises the channels
            of each site (Qwen-Image).
        attention_levels: Levels, by their place in `channels`, whose residual blocks are each
            followed by attention.
        quant_convs: Whether a 1x1 convolution follows the encoder and precedes the decoder.
        halving_upsample: Whether the decoder's upsampling convolutions halve the width.
        latent_scale: Diffusion models use `(latents - latent_shift) * latent_scale`; a number, one
            per channel, or rows of one per place and channel of a patch, `[p, p, C]` (FLUX.2).
        latent_shift: See `latent_scale`.
        dtype: Compute dtype; None is the wider of input and parameters.
    """

    channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    in_channels: int = 3
    norm_groups: int | None = 32
    attention_levels: tuple[int, ...] = ()
    quant_convs: bool = True
    halving_upsample: bool = False
    latent_scale: float | tuple = 0.18215
    latent_shift: float | tuple = 0.0
    dtype: DTypeLike | None = None

    def setup(self):  # noqa: D102
        common = {
            "channels": self.channels,
            "layers_per_block": self.layers_per_block,
            "norm_groups": self.norm_groups,
            "attention_levels": self.attention_levels,
            "dtype": self.dtype,
        }
        self.encoder = Encoder(**common, latent_channels=self.latent_channels)
        self.decoder = Decoder(
            **common, out_channels=self.in_channels, halving_upsample=self.halving_upsample
        )
        if self.quant_convs:
            self.quant_conv = _conv1(2 * self.latent_channels, dtype=self.dtype)
            self.post_quant_conv = _conv1(self.latent_channels, dtype=self.dtype)

    def _scale_and_shift(self, latents: jax.Array) -> tuple[np.ndarray, np.ndarray]:
        sites = latents.shape[-3:-1]

        def spread(value):
            value = np.asarray(value, latents.dtype)
            if value.ndim < 3:
                return value.reshape((1,) * (latents.ndim - 1) + (-1,))
            repeats = (side // places for side, places in zip(sites, value.shape, strict=False))
            return np.tile(value, (*(1,) * (latents.ndim - 3), *repeats, 1))

        return spread(self.latent_scale), spread(self.latent_shift)

    @property
    def downsampling(self) -> int:
        """Number of image sites per latent site, along one side."""
        return 2 ** (len(self.channels) - 1)

    def encode(self, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Posterior over an image's raw latents.

        Args:
            image: `[B, H, W, in_channels]` in [-1, 1]; `H` and `W` divisible by `downsampling`.

        Returns:
            Mean and logarithm of the variance, each `[B, H / f, W / f, latent_channels]`.

        Raises:
            ValueError: The image's sides are not divisible by `downsampling`.
        """
        if image.shape[1] % self.downsampling or image.shape[2] % self.downsampling:
            raise ValueError(
                f"the sides of images must be divisible by {self.downsampling}, got "
                f"{image.shape[1]}x{image.shape[2]}"
            )
        moments = self.encoder(image)
        if self.quant_convs:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(logvar, *LOGVAR_RANGE)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Decodes raw latents to an image.

        Args:
            latents: `[B, h, w, latent_channels]`, not scaled.

        Returns:
            `[B, f h, f w, in_channels]`, roughly in [-1, 1], not clipped.
        """
        return self.decoder(self.post_quant_conv(latents) if self.quant_convs else latents)

    def scaled(self, latents: jax.Array) -> jax.Array:
        """Scales raw latents as diffusion models use them.

        Args:
            latents: `[..., latent_channels]`; with a scale for each place of a patch
                `[..., h, w, latent_channels]`.

        Returns:
            Array of the same shape.
        """
        scale, shift = self._scale_and_shift(latents)
        return (latents - shift) * scale

    def raw(self, latents: jax.Array) -> jax.Array:
        """Raw latents from scaled `latents[..., latent_channels]`; same shape."""
        scale, shift = self._scale_and_shift(latents)
        return latents / scale + shift

    def __call__(self, image: jax.Array) -> jax.Array:
        """Reconstructs an image from the posterior's mean; initialises all parameters.

        Args:
            image: See `encode`; `[B, H, W, in_channels]` in [-1, 1].

        Returns:
            `[B, H, W, in_channels]`, not clipped.
        """
        return self.decode(self.encode(image)[0])


def sample_posterior(key: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
    """Draws raw latents from the posterior.

    Args:
        key: Random key.
        mean: `[B, h, w, C]`.
        std: Standard deviation, `exp(logvar / 2)`, of the same shape.

    Returns:
        Raw latents of the same shape.
    """
    return mean + std * jax.random.normal(key, mean.shape, mean.dtype)


def decode_in_chunks(
    module: AutoencoderKL, params: dict, latents: jax.Array, chunk: int
) -> jax.Array:
    """Decodes a batch a few latents at a time, in the memory of those few; jittable.

    Part `i` of `n` takes the latents `i, i + n, ...`. A batch that is split over devices therefore
    keeps all of them busy, and no latent moves between devices.

    Args:
        module: The autoencoder.
        params: Its variables.
        latents: Raw latents `[B, h, w, C]`.
        chunk: Upper bound on the latents decoded at once; fewer if their number divides the batch.

    Returns:
        Images `[B, f h, f w, in_channels]`.
    """
    decode = functools.partial(module.apply, params, method="decode")
    size = len(latents)
    count = next(n for n in range(1, size + 1) if n * chunk >= size and size % n == 0)
    parts = jnp.swapaxes(latents.reshape(-1, count, *latents.shape[1:]), 0, 1)
    images = jnp.swapaxes(jax.lax.map(decode, parts), 0, 1)
    return images.reshape(-1, *images.shape[2:])


def picture_encoder(module: AutoencoderKL, params: dict) -> Callable[[ArrayLike], jax.Array]:
    """A function that encodes pictures as editing networks read them, compiled once per shape.

    Args:
        module: The autoencoder.
        params: Its variables.

    Returns:
        A function from images `[B, f h, f w, in_channels]` in [-1, 1] to the means of their
        posteriors, latents `[B, h, w, C]` scaled as diffusion models use them.

    Raises:
        ValueError: The function gets pixels of 8 bits, another shape, or sides that `f` does not
            divide.
    """

    @jax.jit
    def encode(params, image):
        return module.scaled(module.apply(params, image, method="encode")[0])

    def latents(image):
        image = image if isinstance(image, jax.Array) else np.asarray(image)
        check_no_pixels("images", image)
        if image.ndim != 4 or image.shape[-1] != module.in_channels:
            raise ValueError(
                f"images must be [B, H, W, {module.in_channels}] in [-1, 1], got "
                f"{list(image.shape)}"
            )
        return encode(params, image)

    return latents


def picture_decoder(
    module: AutoencoderKL, params: dict, devices: Sequence[jax.Device] | None = None
) -> Callable[[ArrayLike], jax.Array]:
    """A function that decodes samples to pictures, compiled once per shape.

    Args:
        module: The autoencoder.
        params: Its variables.
        devices: Devices of this process, each decoding one image at a time (images of 1024x1024
            take gigabytes each); the first device by default.

    Returns:
        A function from `latents [B, h, w, C]`, scaled as diffusion models use them, to images `[B,
        f h, f w, in_channels]`. It pads a batch to a multiple of the number of devices.
    """
    devices = jax.local_devices()[:1] if devices is None else devices
    mesh = Mesh(np.asarray(devices), ("data",), axis_types=(AxisType.Auto,))
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    decode = jax.jit(
        lambda params, z: decode_in_chunks(module, params, module.raw(z), len(devices)),
        out_shardings=split,
    )
    params = jax.device_put(params, whole)

    def pictures(latents):
        latents, size = np.asarray(latents), len(latents)
        filled = latents[np.arange(size + -size % len(devices)) % size]
        return decode(params, jax.device_put(filled, split))[:size]

    return pictures
