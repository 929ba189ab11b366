"""Qwen-Image, the text-to-image transformer of Alibaba (arXiv 2508.02324), as pi-Flow distils it.

Source: the released network in the form of `diffusers`, and the heads of pi-Flow (arXiv 2510.14974,
section 5). Text enters as the hidden states of Qwen2.5-VL.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from piflow_jax.flow.policies import GMOutput
from piflow_jax.models.joint import (
    ROPE_BASE,
    JointBlock,
    RMSNorm,
    TextTransformer,
    image_positions,
    rotary_table,
    round_time,
)
from piflow_jax.models.layers import time_features

__all__ = ["QWEN_TARGETS", "QwenImage", "qwen_angles"]

# The layers that pi-Flow adapts: the feed-forwards of both streams and the time embedder. pi-Flow
# leaves out the text feed-forward of the last block, because nothing reads its text tokens. Here
# that block's text adapters exist as one slice of a stack. They get no gradient and are not
# exported.
QWEN_TARGETS = (
    "image_mlp_in",
    "image_mlp_out",
    "text_mlp_in",
    "text_mlp_out",
    "time_in",
    "time_out",
)
TIME_SCALE = 1000.0


def qwen_angles(
    axes: tuple[int, ...],
    text_length: int,
    height: int,
    width: int,
    references: Sequence[tuple[int, int]] = (),
) -> np.ndarray:
    """Rotary angles: image tokens around the origin, text tokens on the diagonal beyond them.

    Rows run from `-ceil(height / 2)` to `floor(height / 2) - 1`, columns likewise, and the frame is
    0. The same holds for reference `i`, counted from 1, with frame `i`. Text token `i` is at
    `side // 2 + i` in all three coordinates, where `side` is the longest one of all images.

    Args:
        axes: Features of a head for each of the three coordinates.
        text_length: Number of text tokens, which come first.
        height: Rows of image tokens.
        width: Columns of image tokens.
        references: Rows and columns of the tokens of each reference image.

    Returns:
        `[text_length + T, sum(axes) / 2]` float32 radians; of the `T` tokens of images the first
        `height * width` are the image's. The released network computes them in float32, which at
        position 1000 is 3e-5 away from the exact angle.
    """
    sites = [(height, width), *references]
    text = np.arange(text_length) + max(side // 2 for sides in sites for side in sides)
    images = image_positions(sites, centred=True)
    ids = np.concatenate([np.stack([text] * 3, axis=-1), images]).astype(np.float32)
    angles = []
    for i, size in enumerate(axes):
        exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
        powers = (ROPE_BASE ** exponents.astype(np.float64)).astype(np.float32)
        angles.append(ids[:, i, None] * (np.float32(1) / powers)[None])
    return np.concatenate(angles, axis=-1)


class QwenImage(TextTransformer):
    """Qwen-Image: joint blocks of text and image, conditioned on time alone.

    The defaults are the released network, 20 430 401 088 parameters. The blocks run under a scan,
    with their parameters stacked on a leading `layers` axis.

    Padded text is masked: no token attends to it, so an image does not depend on the length to
    which prompts were padded. The pi-Flow release and `diffusers` from 0.37 on do the same. In
    earlier versions a padded token's embedding changed the output.

    Attributes:
        patch_size: Side of a patch, in sites.
        in_channels: Channels `C` of latents, input and output.
        hidden: Width of the tokens.
        num_heads: Attention heads.
        depth: Number of blocks.
        text_features: Width of the text embeddings.
        axes_dims_rope: Features of a head that encode frame, row and column; their sum is the size
            of a head.
        head: Output head, see `piflow_jax.models.heads`.
        lora: Adapters, usually `LoRA(QWEN_TARGETS)`; None for none.
        time_dtype: Times are rounded to it before they are scaled. The released pipelines and
            pi-Flow's training round them to bfloat16 (which turns a time of 0.889 into 0.890625).
        dtype: Compute dtype of tokens; None is the wider of input and parameters. The conditioning
            embedding, the norms' statistics, rotations, softmax and outputs are at least float32.
        param_dtype: Dtype of fresh parameters of the base; the head and `final_modulation` are at
            least float32.
        remat: What the backward pass recomputes: a name in `REMAT_POLICIES`.
        scan_unroll: Blocks per iteration of the scan.
        attention: A name in `ATTENTION`, or None; see `attend`.
        constrain: See `DiT`.
    """

    depth: int = 60
    text_features: int = 3584

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        text: jax.Array,
        mask: jax.Array | None = None,
        references: Sequence[jax.Array] = (),
    ) -> jax.Array | GMOutput:
        """Evaluates the network.

        Args:
            x: `[B, H, W, C]` latents; `H` and `W` are multiples of `patch_size`.
            t: `[B]` times in [0, 1], 1 is noise.
            text: `[B, L, text_features]` text embeddings, from position 0 on. Padding may hold any
                finite numbers.
            mask: `[B, L]`, zero or False where `text` is padding. None hides nothing, as in the
                pi-Flow release with `diffusers` before 0.37.
            references: Reference images, as Qwen-Image-Edit reads them: clean latents
                `[B, h, w, C]`, each of its own size.

        Returns:
            The head's output: `u[B, H, W, C]`, a `GMOutput`, or `[B, H, W, N, C]`. Float32, or
            float64 with float64 parameters.

        Raises:
            ValueError: A shape, a size or the name of the remat policy is not valid.
        """
        self.check_inputs(x, text, references)
        if mask is not None and mask.shape != text.shape[:2]:
            raise ValueError(f"mask {mask.shape} must be [B, L] = {text.shape[:2]}")
        if t.shape != x.shape[:1]:
            raise ValueError(f"t {t.shape} must be [B] with B = {x.shape[0]}")
        features = time_features(round_time(t, self.time_dtype), scale=TIME_SCALE)
        embedding = self.embedder("time", features)
        conditioning = self.conditioning(x, embedding)
        dtype = conditioning.dtype
        text = RMSNorm(self.param_dtype, name="text_norm")(text)
        streams, (sites, *others) = self.streams([x, *references], text, dtype)
        table = rotary_table(qwen_angles(self.axes_dims_rope, text.shape[1], *sites, others))
        key_mask = None
        if mask is not None:
            shown = jnp.ones(streams[1].shape[:2], bool)
            key_mask = jnp.concatenate([mask.astype(bool), shown], axis=1)
        blocks = self.blocks(JointBlock, self.depth, "joint_blocks", dtype)
        (_, tokens), _ = blocks(streams, conditioning, table, key_mask)
        return self.predicted(tokens, conditioning, embedding, x, t)
