"""Blocks in which text and image tokens attend to each other, with separate weights for each.

The double block of FLUX.1 and the block of Qwen-Image (arXiv 2508.02324, section 2), after MM-DiT
(arXiv 2403.03206, section 4). The two differ only in their rotary tables and in the masking of
text. FLUX.2's double block joins the streams in the same way, with its own modulation and MLP.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from piflow_jax.models.attention import attend
from piflow_jax.models.blocks import NORM_EPS, Layers, modulated
from piflow_jax.models.layers import named
from piflow_jax.models.lora import LoRA
from piflow_jax.models.transformer import Transformer

ROPE_BASE = 10000.0
# Prefixes of the names of layers.
STREAMS = ("text_", "image_")


class RMSNorm(nn.Module):
    """Divides the last axis by its root mean square and scales it.

    Attributes:
        param_dtype: Dtype of a fresh scale.
    """

    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `x[..., D]` to the same shape and dtype; computes in float32 at least."""
        init = named(nn.initializers.ones, (None,))
        scale = self.param("scale", init, x.shape[-1:], self.param_dtype)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        wide = wide * jax.lax.rsqrt((wide * wide).mean(-1, keepdims=True) + NORM_EPS)
        return (wide * scale.astype(wide.dtype).reshape((1,) * (x.ndim - 1) + (-1,))).astype(
            x.dtype
        )


def rotary_table(angles: np.ndarray) -> jax.Array:
    """Cosines and sines `[2, T, D / 2]` of `angles[T, D / 2]`, rounded to float32.

    They are computed on the host, so that every backend uses the same numbers. The released
    networks have them in float32 too, in any precision.
    """
    wide = angles.astype(np.float64)
    return jnp.asarray(np.stack([np.cos(wide), np.sin(wide)]).astype(np.float32))


def rotary_angles(
    positions: np.ndarray, axes: Sequence[int], base: float = ROPE_BASE
) -> np.ndarray:
    """Rotary angles of tokens.

    Args:
        positions: `[T, len(axes)]` coordinates.
        axes: Features of a head for each coordinate.
        base: The frequencies of a coordinate fall from 1 towards `1 / base`.

    Returns:
        `[T, sum(axes) / 2]` float64 radians.
    """
    frequencies = [base ** -(np.arange(0, size, 2) / size) for size in axes]
    wide = positions.astype(np.float64)
    return np.concatenate([wide[:, i, None] * f[None] for i, f in enumerate(frequencies)], axis=-1)


def image_positions(sites: Sequence[tuple[int, int]], *, centred: bool = False) -> np.ndarray:
    """Frame, row and column of the tokens of an image and its references.

    The image is frame 0, and its references are the frames 1, 2 and so on. Source: FLUX.1 Kontext,
    arXiv 2506.15742, section 3; Qwen-Image-Edit, arXiv 2508.02324.

    Args:
        sites: Rows and columns `(h, w)` of tokens of each, the image first.
        centred: Rows run from `-ceil(h / 2)` to `floor(h / 2) - 1`, and columns likewise; otherwise
            both start at 0.

    Returns:
        Integers `[T, 3]`, images one after the other.
    """
    positions = []
    for frame, sides in enumerate(sites):
        before = [side - side // 2 if centred else 0 for side in sides]
        sides_of_frame = [np.arange(n) - b for n, b in zip(sides, before, strict=True)]
        axes = np.meshgrid([frame], *sides_of_frame, indexing="ij")
        positions.append(np.stack(axes, axis=-1).reshape(-1, 3))
    return np.concatenate(positions)


def rotate(x: jax.Array, table: jax.Array) -> jax.Array:
    """Rotary embedding: rotates pairs of neighbouring features, in at least float32.

    Args:
        x: `[B, T, heads, D]`.
        table: `[2, T, D / 2]`, see `rotary_table`.

    Returns:
        Array like `x`.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    pairs = wide.reshape(*x.shape[:-1], -1, 2)
    cos, sin = table.astype(wide.dtype)[:, None, :, None]
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


class JointLayers(Layers):
    """Layers with normalised queries and keys.

    Attributes:
        mlp_ratio: Width of an MLP's hidden layer, divided by that of the tokens.
    """

    mlp_ratio: ClassVar[int] = 4

    def queries_keys_values(
        self, tokens: jax.Array, prefix: str = ""
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries and keys, normalised, and values of `tokens[B, T, D]`: `[B, T, heads, size]`."""
        return self.normalised(*super().queries_keys_values(tokens, prefix), prefix)

    def normalised(
        self, query: jax.Array, key: jax.Array, value: jax.Array, prefix: str = ""
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries and keys with norms of their own, and the values; shapes stay."""
        query = RMSNorm(self.param_dtype, name=f"{prefix}query_norm", parent=self)(query)
        key = RMSNorm(self.param_dtype, name=f"{prefix}key_norm", parent=self)(key)
        return query, key, value

    def joined(
        self,
        streams: tuple[jax.Array, jax.Array],
        modulations: Sequence[jax.Array],
        table: jax.Array,
        key_mask: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Joint attention of text and image, then an MLP on each.

        Args:
            streams: Text `[B, L, D]` and image tokens `[B, T, D]`.
            modulations: Shift, scale and gate of each half, `[B, 6, D]` for each stream.
            table: `[2, L + T, head size / 2]` rotary table, text first.
            key_mask: `[B, L + T]`, see `attend`.

        Returns:
            The two streams.
        """
        text_length, pieces = streams[0].shape[1], []
        for tokens, modulation, prefix in zip(streams, modulations, STREAMS, strict=True):
            hidden = modulated(tokens, modulation[:, 0], modulation[:, 1])
            pieces.append(self.queries_keys_values(hidden, prefix))
        q, k, v = (jnp.concatenate(both, axis=1) for both in zip(*pieces, strict=True))
        q, k = rotate(q, table), rotate(k, table)
        attended = attend(q, k, v, self.attention, key_mask)
        attended = attended.reshape(*attended.shape[:2], -1)
        halves = attended[:, :text_length], attended[:, text_length:]
        hidden = self.mlp_ratio * streams[0].shape[-1]
        streams = tuple(
            self.after_attention(tokens, half, modulation, hidden, prefix)
            for tokens, half, modulation, prefix in zip(
                streams, halves, modulations, STREAMS, strict=True
            )
        )
        self.sow("intermediates", "text", streams[0])
        self.sow("intermediates", "image", streams[1])
        return streams

    def after_both(
        self, tokens: jax.Array, attended: jax.Array, mlp: jax.Array, gate: jax.Array
    ) -> jax.Array:
        """Adds what attention and an MLP side by side put out, through a layer of both.

        Args:
            tokens: `[B, T, D]`.
            attended: `[B, T, heads, size]`.
            mlp: The hidden layer, in pieces of the token's width: `[B, T, ratio, D]`.
            gate: `[B, D]`.

        Returns:
            `[B, T, D]`.
        """
        width = tokens.shape[-1]
        attended = attended.reshape(*tokens.shape[:2], 1, width)
        # With the attention's output as one more piece it is one contraction, which tensor
        # parallelism splits along every piece.
        pieces = jnp.concatenate([attended, mlp.astype(attended.dtype)], axis=2)
        init = nn.initializers.variance_scaling(
            1.0, "fan_avg", "uniform", in_axis=(0, 1), out_axis=-1
        )
        # Heads and hidden units have the same sharding.
        axes = (None, "mlp", "embed")
        out = self.linear((width,), "out", axes, in_axes=2, kernel_init=init)(pieces)
        tokens = self.constrain(tokens + gate[:, None] * out, ("batch", None, "embed"))
        self.sow("intermediates", "tokens", tokens)
        return tokens


class JointBlock(JointLayers):
    """Joint attention and two MLPs; each stream has a shift, scale and gate of its own."""

    @nn.compact
    def __call__(
        self,
        streams: tuple[jax.Array, jax.Array],
        conditioning: jax.Array,
        table: jax.Array,
        key_mask: jax.Array | None = None,
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        """Runs the block.

        Args:
            streams: Text `[B, L, D]` and image tokens `[B, T, D]`.
            conditioning: `[B, D]`, after its activation.
            table: `[2, L + T, head size / 2]` rotary table, text first.
            key_mask: `[B, L + T]`, see `attend`.

        Returns:
            The two streams, and None for the scan to collect.
        """
        shape, axes = (6, streams[0].shape[-1]), ("embed", None, None)
        layers = (self.linear(shape, f"{prefix}modulation", axes) for prefix in STREAMS)
        modulations = [layer(conditioning) for layer in layers]
        return self.joined(streams, modulations, table, key_mask), None


def round_time(t: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Rounds times to a dtype and returns them in float32 (or in float64, if they are float64)."""
    dtype = jnp.dtype(dtype)
    t = t.astype(jnp.promote_types(t.dtype, jnp.float32))
    if dtype == jnp.float32:
        return t
    info = jnp.finfo(dtype)
    # The compiler may remove a cast to the dtype and back.
    return jax.lax.reduce_precision(t, info.nexp, info.nmant)


class TextTransformer(Transformer):
    """A transformer that reads text. See `Flux` and `QwenImage` for its fields."""

    in_channels: int = 16
    hidden: int = 3072
    num_heads: int = 24
    text_features: int = 4096
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)
    lora: LoRA | None = None
    time_dtype: DTypeLike = jnp.float32

    def streams(
        self, images: Sequence[jax.Array], text: jax.Array, dtype: DTypeLike
    ) -> tuple[tuple[jax.Array, jax.Array], list[tuple[int, int]]]:
        """Tokens of text and images `[B, T, D]`, and each image's sites `(h, w)`."""
        image, sites = self.embed_patches(images, dtype)
        text = self.linear((self.hidden,), "text_embed", (None, "embed"), dtype=dtype)(text)
        streams = (self.constrain(tokens, ("batch", None, "embed")) for tokens in (text, image))
        return tuple(streams), sites

    def predicted(
        self,
        tokens: jax.Array,
        conditioning: jax.Array,
        embedding: jax.Array,
        x: jax.Array,
        t: jax.Array,
    ) -> Any:
        """The head's output for the image, of which `tokens[B, T, D]` are the first `h * w`."""
        tokens = tokens[:, : math.prod(x.shape[1:3]) // self.patch_size**2]
        # The head and this layer are trained without adapters, so they are at least float32.
        trained = jnp.promote_types(self.param_dtype, jnp.float32)
        # Here the scale comes first.
        scale, shift = self.last_modulation(conditioning, param_dtype=trained)
        return self.output(tokens, shift, scale, embedding, x, t, trained)

    def example(self, batch: int = 1) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes of the smallest inputs, for `init` under `jax.eval_shape`.

        Args:
            batch: Number of examples `B`.

        Returns:
            float32 states `[B, p, p, C]`, times `[B]`, one token of text `[B, 1, text_features]`,
            and what else the network takes.
        """
        p = self.patch_size
        shapes = (batch, p, p, self.in_channels), (batch,), (batch, 1, self.text_features)
        return tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)

    def check_inputs(self, x: jax.Array, text: jax.Array, references: Sequence[jax.Array]) -> None:
        """Raises ValueError if a size, the states, the text or the references are not valid."""
        axes, hidden, num_heads = self.axes_dims_rope, self.hidden, self.num_heads
        # Rotary axes fill a head with pairs.
        if hidden % num_heads or sum(axes) * num_heads != hidden or any(a % 2 for a in axes):
            raise ValueError(
                f"axes_dims_rope {tuple(axes)} must be even and add up to the size of a head, "
                f"{hidden} / {num_heads}"
            )
        self.check_state(x)
        batch, width = x.shape[0], self.text_features
        for number, reference in enumerate(references):
            self.check_state(reference, f"references[{number}]")
            if reference.shape[0] != batch:
                raise ValueError(
                    f"references[{number}] must be [{batch}, H, W, {self.in_channels}], got "
                    f"{reference.shape}"
                )
        if text.ndim != 3 or (text.shape[0], text.shape[2]) != (batch, width):
            raise ValueError(f"text must be [{batch}, L, {width}], got {text.shape}")


class GuidedTransformer(TextTransformer):
    """A transformer that reads text and may take the guidance scale. See `Flux` for its fields."""

    double_depth: int = 19
    single_depth: int = 38
    guidance_embed: bool = True

    def example(self, batch: int = 1) -> tuple[jax.ShapeDtypeStruct, ...]:
        """As in `TextTransformer`; with `guidance_embed` also guidance scales `[B]`."""
        x, t, text = super().example(batch)
        return (x, t, text, t) if self.guidance_embed else (x, t, text)

    def check_guidance(self, x: jax.Array, t: jax.Array, guidance: jax.Array | None) -> None:
        """Raises ValueError if times or guidance scales are not valid for the states."""
        if (guidance is not None) != self.guidance_embed:
            raise ValueError(f"guidance_embed is {self.guidance_embed}, guidance is {guidance}")
        if t.shape != x.shape[:1] or (guidance is not None and guidance.shape != t.shape):
            raise ValueError(f"t {t.shape} and guidance must be [B] with B = {x.shape[0]}")
