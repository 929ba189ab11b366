"""FLUX.1, the text-to-image transformer of Black Forest Labs, as pi-Flow distils it.

Source: the released FLUX.1 [dev] network in the form of `diffusers`, and the heads of pi-Flow
(arXiv 2510.14974, section 5). Text enters as embeddings: one per token from T5, and one pooled
vector from CLIP.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from piflow_jax.flow.policies import GMOutput
from piflow_jax.models.attention import attend
from piflow_jax.models.blocks import modulated
from piflow_jax.models.joint import (
    GuidedTransformer,
    JointBlock,
    JointLayers,
    image_positions,
    rotary_angles,
    rotary_table,
    rotate,
    round_time,
)
from piflow_jax.models.layers import time_features

__all__ = ["FLUX_TARGETS", "Flux", "SingleBlock", "flux_angles", "scaled_features"]

# The layers that pi-Flow adapts: the feed-forwards of both streams, the feed-forwards of the single
# blocks, including the output layer that they share with attention, and the time embedder.
FLUX_TARGETS = (
    "image_mlp_in",
    "image_mlp_out",
    "text_mlp_in",
    "text_mlp_out",
    "mlp_in",
    "out",
    "time_in",
    "time_out",
)
# Factor of times and guidance scales in front of their sinusoids.
TIME_SCALE = 1000.0


def scaled_features(value: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Features of times or guidance scales, rounded before and after they are scaled.

    Args:
        value: `[B]`.
        dtype: The dtype to which they are rounded.

    Returns:
        `[B, F]`.
    """
    return time_features(round_time(round_time(value, dtype) * TIME_SCALE, dtype))


def flux_angles(
    axes: tuple[int, ...],
    text_length: int,
    height: int,
    width: int,
    references: Sequence[tuple[int, int]] = (),
) -> np.ndarray:
    """Rotary angles: text at the origin, image tokens at (0, row, column).

    Tokens of reference `i`, counted from 1, are at (i, row, column).

    Args:
        axes: Features of a head for each of the three coordinates.
        text_length: Number of text tokens, which come first.
        height: Rows of image tokens.
        width: Columns of image tokens.
        references: Rows and columns of the tokens of each reference image.

    Returns:
        `[text_length + T, sum(axes) / 2]` float64 radians; of the `T` tokens of images the first
        `height * width` are the image's.
    """
    images = image_positions([(height, width), *references])
    return rotary_angles(np.concatenate([np.zeros((text_length, 3)), images]), axes)


class SingleBlock(JointLayers):
    """Parallel self-attention and MLP, over text and image tokens in one stream."""

    @nn.compact
    def __call__(
        self, tokens: jax.Array, conditioning: jax.Array, table: jax.Array
    ) -> tuple[jax.Array, None]:
        """Runs the block.

        Args:
            tokens: `[B, L + T, D]`, text first.
            conditioning: `[B, D]`, after its activation.
            table: `[2, L + T, head size / 2]` rotary table, see `JointBlock`.

        Returns:
            `[B, L + T, D]`, and None for the scan to collect.
        """
        width = tokens.shape[-1]
        # Shift, scale, gate.
        modulation = self.linear((3, width), "modulation", ("embed", None, None))(conditioning)
        hidden = modulated(tokens, modulation[:, 0], modulation[:, 1])
        # The hidden layer stays in pieces of the token's width, see `after_both`.
        mlp = self.linear((self.mlp_ratio, width), "mlp_in", ("embed", None, "mlp"))(hidden)
        mlp = self.constrain(nn.gelu(mlp, approximate=True), ("batch", None, None, "mlp"))
        q, k, v = self.queries_keys_values(hidden)
        attended = attend(rotate(q, table), rotate(k, table), v, self.attention)
        return self.after_both(tokens, attended, mlp, modulation[:, 2]), None


class Flux(GuidedTransformer):
    """FLUX.1: double blocks of text and image, then single blocks of both together.

    The defaults are FLUX.1 [dev], 11 901 408 320 parameters. Each kind of block runs under a scan,
    with its parameters stacked on a leading `layers` axis.

    Attributes:
        patch_size: Side of a patch, in sites.
        in_channels: Channels `C` of latents, input and output.
        hidden: Width of the tokens.
        num_heads: Attention heads.
        double_depth: Number of double blocks.
        single_depth: Number of single blocks.
        text_features: Width of the text embeddings (T5).
        pooled_features: Width of the pooled text embedding (CLIP).
        guidance_embed: Whether the guidance scale is an input (distilled guidance).
        axes_dims_rope: Features of a head that encode each of the three coordinates; their sum is
            the size of a head.
        head: Output head, see `piflow_jax.models.heads`.
        lora: Adapters, usually `LoRA(FLUX_TARGETS)`; None for none.
        time_dtype: Times and guidance scales are rounded to it, before and after they are scaled.
            The released pipelines and pi-Flow's training round both to bfloat16 (which turns a time
            of 0.9 into 0.8984).
        dtype: Compute dtype of tokens; None is the wider of input and parameters. The conditioning
            embedding, the norms' statistics, rotations, softmax and outputs are at least float32.
        param_dtype: Dtype of fresh parameters of the base; the head and `final_modulation` are at
            least float32.
        remat: What the backward pass recomputes: a name in `REMAT_POLICIES`.
        scan_unroll: Blocks per iteration of either scan.
        attention: A name in `ATTENTION`, or None; see `attend`.
        constrain: See `DiT`.
    """

    pooled_features: int = 768

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        text: jax.Array,
        pooled: jax.Array,
        guidance: jax.Array | None = None,
        references: Sequence[jax.Array] = (),
    ) -> jax.Array | GMOutput:
        """Evaluates the network.

        Args:
            x: `[B, H, W, C]` latents; `H` and `W` are multiples of `patch_size`.
            t: `[B]` times in [0, 1], 1 is noise.
            text: `[B, L, text_features]` embeddings. All of them are attended to, as in the
                release.
            pooled: `[B, pooled_features]` pooled text embeddings.
            guidance: `[B]` distilled guidance scales (usually 3.5); None if and only if
                `guidance_embed` is False.
            references: Reference images, as FLUX.1 Kontext reads them: clean latents
                `[B, h, w, C]`, each of its own size.

        Returns:
            The head's output: `u[B, H, W, C]`, a `GMOutput`, or `[B, H, W, N, C]`. Float32, or
            float64 with float64 parameters.

        Raises:
            ValueError: A shape, a size or the name of the remat policy is not valid.
        """
        self.check_inputs(x, text, references)
        b = x.shape[0]
        if pooled.shape != (b, self.pooled_features):
            raise ValueError(f"pooled must be [{b}, {self.pooled_features}], got {pooled.shape}")
        self.check_guidance(x, t, guidance)
        wide = jnp.promote_types(pooled.dtype, jnp.float32)
        embedding = self.embedder("time", scaled_features(t, self.time_dtype).astype(wide))
        if guidance is not None:
            features = scaled_features(guidance, self.time_dtype).astype(wide)
            embedding += self.embedder("guidance", features)
        embedding += self.embedder("pooled", pooled.astype(wide))
        conditioning = self.conditioning(x, embedding)
        dtype, length = conditioning.dtype, text.shape[1]
        streams, (sites, *others) = self.streams([x, *references], text, dtype)
        table = rotary_table(flux_angles(self.axes_dims_rope, length, *sites, others))
        double = self.blocks(JointBlock, self.double_depth, "double_blocks", dtype)
        single = self.blocks(SingleBlock, self.single_depth, "single_blocks", dtype)
        streams, _ = double(streams, conditioning, table)
        tokens, _ = single(jnp.concatenate(streams, axis=1), conditioning, table)
        return self.predicted(tokens[:, length:], conditioning, embedding, x, t)

    def example(self, batch: int = 1) -> tuple[jax.ShapeDtypeStruct, ...]:
        """As in `TextTransformer`, with pooled text before the guidance.

        Args:
            batch: Number of examples `B`.

        Returns:
            States, times and text; pooled text `[B, pooled_features]`; and with `guidance_embed`
            guidance scales `[B]`.
        """
        x, t, text, *guidance = super().example(batch)
        pooled = jax.ShapeDtypeStruct((batch, self.pooled_features), jnp.float32)
        return (x, t, text, pooled, *guidance)
