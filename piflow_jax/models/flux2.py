"""FLUX.2, the text-to-image and editing transformer of Black Forest Labs, as pi-Flow distils it.

Source: the released FLUX.2 [dev] and [klein] networks in the form of `diffusers`, and the heads of
pi-Flow (arXiv 2510.14974, section 5). Text enters as hidden states of three layers of a language
model, concatenated. In contrast to FLUX.1, all blocks of a kind share one modulation, MLPs are
gated, and no layer but those of the head has a bias.
"""

from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from piflow_jax.flow.policies import GMOutput
from piflow_jax.models.attention import attend
from piflow_jax.models.blocks import modulated
from piflow_jax.models.flux import scaled_features
from piflow_jax.models.joint import (
    STREAMS,
    GuidedTransformer,
    JointLayers,
    image_positions,
    rotary_angles,
    rotary_table,
    rotate,
)

__all__ = ["FLUX2_TARGETS", "Flux2", "flux2_angles"]

# The layers with adapters: the MLPs of both streams, the output layer that attention and MLP share
# in single blocks, and the time embedder. pi-Flow's settings for FLUX.2 are not published; this is
# its authors' list in another training of the same network (AsymFLUX.2, arXiv 2605.12964).
FLUX2_TARGETS = (
    "image_mlp_in",
    "image_mlp_out",
    "text_mlp_in",
    "text_mlp_out",
    "out",
    "time_in",
    "time_out",
)
ROPE_BASE = 2000.0
# Distance in time between the positions of the image and its references.
REFERENCE_STEP = 10


def flux2_angles(
    axes: tuple[int, ...],
    text_length: int,
    height: int,
    width: int,
    references: Sequence[tuple[int, int]] = (),
) -> np.ndarray:
    """Rotary angles of four coordinates: time, row, column, and place in the text.

    Text token `i` is at (0, 0, 0, i), an image token at (0, row, column, 0), and a token of
    reference `i`, counted from 1, at (10 i, row, column, 0).

    Args:
        axes: Features of a head for each of the four coordinates.
        text_length: Number of text tokens, which come first.
        height: Rows of image tokens.
        width: Columns of image tokens.
        references: Rows and columns of the tokens of each reference image.

    Returns:
        `[text_length + T, sum(axes) / 2]` float64 radians; of the `T` tokens of images the first
        `height * width` are the image's.
    """
    images = image_positions([(height, width), *references]) * [REFERENCE_STEP, 1, 1]
    text = np.pad(np.arange(text_length)[:, None], [(0, 0), (3, 0)])
    return rotary_angles(np.concatenate([text, np.pad(images, [(0, 0), (0, 1)])]), axes, ROPE_BASE)


def gated(pieces: jax.Array) -> jax.Array:
    """`silu(a) * b` of pieces `[B, T, 2, ...]`, which are `a` and `b`."""
    return nn.silu(pieces[:, :, 0]) * pieces[:, :, 1]


class Flux2Layers(JointLayers):
    """Layers without biases, and gated MLPs."""

    use_bias: ClassVar[bool] = False
    mlp_ratio: ClassVar[int] = 3

    def hidden_layer(self, tokens: jax.Array, hidden: int, prefix: str) -> jax.Array:
        """See `Layers`."""
        layer = self.linear((2, hidden), f"{prefix}mlp_in", ("embed", None, "mlp"))
        return gated(layer(tokens))


class DoubleBlock(Flux2Layers):
    """Joint attention and two MLPs, modulated from outside."""

    @nn.compact
    def __call__(
        self,
        streams: tuple[jax.Array, jax.Array],
        modulations: tuple[jax.Array, jax.Array],
        table: jax.Array,
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        """Runs the block; see `JointLayers.joined`. None is for the scan to collect."""
        return self.joined(streams, modulations, table), None


class SingleBlock(Flux2Layers):
    """Self-attention and an MLP side by side, with one layer in front of both and one behind."""

    @nn.compact
    def __call__(
        self, tokens: jax.Array, modulation: jax.Array, table: jax.Array
    ) -> tuple[jax.Array, None]:
        """Runs the block.

        Args:
            tokens: `[B, L + T, D]`, text first.
            modulation: Shift, scale and gate `[B, 3, D]`.
            table: `[2, L + T, head size / 2]` rotary table.

        Returns:
            `[B, L + T, D]`, and None for the scan to collect.
        """
        width = tokens.shape[-1]
        hidden = modulated(tokens, modulation[:, 0], modulation[:, 1])
        # Queries, keys and values, and the two halves of the hidden layer, all in pieces of the
        # token's width, see `after_both`.
        layer = self.linear((3 + 2 * self.mlp_ratio, width), "qkv_mlp", ("embed", None, "mlp"))
        pieces = self.constrain(layer(hidden), ("batch", None, None, "mlp"))
        q, k, v = self.normalised(*self.by_head(pieces[:, :, :3]))
        mlp = gated(pieces[:, :, 3:].reshape(*tokens.shape[:2], 2, self.mlp_ratio, width))
        attended = attend(rotate(q, table), rotate(k, table), v, self.attention)
        return self.after_both(tokens, attended, mlp, modulation[:, 2]), None


class Flux2(GuidedTransformer):
    """FLUX.2: double blocks of text and image, then single blocks of both together.

    The defaults are FLUX.2 [dev], 32 223 281 152 parameters. Each kind of block runs under a scan,
    with its parameters stacked on a leading `layers` axis.

    Attributes:
        patch_size: Side of a patch, in sites.
        in_channels: Channels `C` of latents, input and output.
        hidden: Width of the tokens.
        num_heads: Attention heads.
        double_depth: Number of double blocks.
        single_depth: Number of single blocks.
        text_features: Width of the text embeddings.
        guidance_embed: Whether the guidance scale is an input (distilled guidance).
        axes_dims_rope: Features of a head that encode each of the four coordinates; their sum is
            the size of a head.
        head: Output head, see `piflow_jax.models.heads`.
        lora: Adapters, usually `LoRA(FLUX2_TARGETS)`; None for none.
        time_dtype: Times and guidance scales are rounded to it, before and after they are scaled,
            as in the released pipelines.
        dtype: Compute dtype of tokens; None is the wider of input and parameters. The conditioning
            embedding, the norms' statistics, rotations, softmax and outputs are at least float32.
        param_dtype: Dtype of fresh parameters of the base; the head and `final_modulation` are at
            least float32.
        remat: What the backward pass recomputes: a name in `REMAT_POLICIES`.
        scan_unroll: Blocks per iteration of the scans.
        attention: A name in `ATTENTION`, or None; see `attend`.
        constrain: See `DiT`.
    """

    use_bias: ClassVar[bool] = False
    in_channels: int = 32
    hidden: int = 6144
    num_heads: int = 48
    double_depth: int = 8
    single_depth: int = 48
    text_features: int = 15360
    axes_dims_rope: tuple[int, ...] = (32, 32, 32, 32)

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        text: jax.Array,
        guidance: jax.Array | None = None,
        references: Sequence[jax.Array] = (),
    ) -> jax.Array | GMOutput:
        """Evaluates the network.

        Args:
            x: `[B, H, W, C]` latents; `H` and `W` are multiples of `patch_size`.
            t: `[B]` times in [0, 1], 1 is noise.
            text: `[B, L, text_features]` embeddings. All of them are attended to, as in the
                release.
            guidance: `[B]` distilled guidance scales (usually 4); None if and only if
                `guidance_embed` is False.
            references: Reference images: clean latents `[B, h, w, C]`, each of its own size.

        Returns:
            The head's output: `u[B, H, W, C]`, a `GMOutput`, or `[B, H, W, N, C]`. Float32, or
            float64 with float64 parameters.

        Raises:
            ValueError: A shape, a size or the name of the remat policy is not valid.
        """
        self.check_inputs(x, text, references)
        if len(self.axes_dims_rope) != 4:
            raise ValueError(f"axes_dims_rope must have four entries, got {self.axes_dims_rope}")
        self.check_guidance(x, t, guidance)
        embedding = self.embedder("time", scaled_features(t, self.time_dtype))
        if guidance is not None:
            embedding += self.embedder("guidance", scaled_features(guidance, self.time_dtype))
        conditioning = self.conditioning(x, embedding)
        dtype, length = conditioning.dtype, text.shape[1]
        streams, (sites, *others) = self.streams([x, *references], text, dtype)
        table = rotary_table(flux2_angles(self.axes_dims_rope, length, *sites, others))
        modulations = tuple(
            self._modulation(f"{name}modulation", 6, conditioning) for name in STREAMS
        )
        double = self.blocks(DoubleBlock, self.double_depth, "double_blocks", dtype)
        streams, _ = double(streams, modulations, table)
        modulation = self._modulation("single_modulation", 3, conditioning)
        single = self.blocks(SingleBlock, self.single_depth, "single_blocks", dtype)
        tokens, _ = single(jnp.concatenate(streams, axis=1), modulation, table)
        return self.predicted(tokens[:, length:], conditioning, embedding, x, t)

    def _modulation(self, name: str, pieces: int, conditioning: jax.Array) -> jax.Array:
        """Shifts, scales and gates `[B, pieces, D]` of all blocks of a kind."""
        axes = ("embed", None, None)
        layer = self.linear((pieces, self.hidden), name, axes, dtype=conditioning.dtype)
        return layer(conditioning)
