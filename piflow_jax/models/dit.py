"""Diffusion transformer with adaptive layer norm (DiT), the ImageNet network.

Source: DiT, arXiv 2212.09748, in the form of the pi-Flow release (arXiv 2510.14974): all blocks
share one embedder of time and class.
"""

import types

import jax
import jax.numpy as jnp
from flax import linen as nn

from piflow_jax.arguments import check_between, whole
from piflow_jax.flow.policies import ArcOutput, GMOutput
from piflow_jax.models.attention import attend
from piflow_jax.models.blocks import Layers, modulated
from piflow_jax.models.layers import named, position_table, time_features
from piflow_jax.models.transformer import Transformer

# Epsilon of the released weights before an MLP; that of the other norms is `NORM_EPS`.
MLP_NORM_EPS = 1e-5


class DiTBlock(Layers, kw_only=True):
    """Self-attention and an MLP, both shifted, scaled and gated by the conditioning.

    Attributes:
        mlp_hidden: Width of the MLP's hidden layer.
    """

    mlp_hidden: int

    @nn.compact
    def __call__(self, tokens: jax.Array, conditioning: jax.Array) -> tuple[jax.Array, None]:
        """Runs the block.

        Args:
            tokens: `[B, T, D]`.
            conditioning: `[B, D]`, after its activation.

        Returns:
            `[B, T, D]`, and None for the scan to collect.
        """
        axes, zeros = ("embed", None, None), nn.initializers.zeros
        layer = self.linear((6, tokens.shape[-1]), "modulation", axes, kernel_init=zeros)
        # Shift, scale and gate of each half.
        modulation = layer(conditioning)
        hidden = modulated(tokens, modulation[:, 0], modulation[:, 1])
        attended = attend(*self.queries_keys_values(hidden), self.attention)
        tokens = self.after_attention(
            tokens, attended.reshape(tokens.shape), modulation, self.mlp_hidden, eps=MLP_NORM_EPS
        )
        self.sow("intermediates", "tokens", tokens)
        return tokens, None


class DiT(Transformer):
    """Class-conditional diffusion transformer.

    The defaults are DiT-XL/2 for ImageNet 256x256 latents. The blocks run under a scan, with their
    parameters stacked on a leading `layers` axis.

    Attributes:
        patch_size: Side of a patch, in sites.
        in_channels: Channels `C` of input and output.
        hidden: Width of the tokens; divisible by 4 and by `num_heads`.
        num_heads: Attention heads.
        depth: Number of blocks.
        mlp_ratio: Width of an MLP's hidden layer, divided by `hidden`.
        num_classes: Number of classes; label `num_classes` is the null label.
        sample_size: Side, in sites, of the square inputs in training. It anchors the positions.
        time_scale: The network takes `t * time_scale` (1000 for ImageNet FM, 1 for REPA weights).
        guidance_embed: Whether the guidance scale is an input (arXiv 2210.03142, Sec. 3). A fresh
            network does not depend on it.
        head: Output head, see `piflow_jax.models.heads`.
        dtype: Compute dtype of the blocks; None is the wider of input and parameters. The
            embedding, layer-norm statistics, softmax and outputs are at least float32 with any
            dtype.
        param_dtype: Dtype of fresh parameters.
        remat: What the backward pass recomputes: a name in `REMAT_POLICIES`.
        scan_unroll: Blocks per iteration of the scan; `depth` unrolls the loop completely.
        attention: A name in `ATTENTION`, or None; see `attend`.
        constrain: `(x, names of axes) -> x`, which sets the sharding of activations. The names are
            `batch`, `embed`, `heads`, `mlp` or None. By default it changes nothing.
    """

    depth: int = 28
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    sample_size: int = 32
    time_scale: float = 1.0
    guidance_embed: bool = False
    addable = types.MappingProxyType({"guidance_embed": ("guidance_in", "guidance_out")})

    @nn.compact
    def __call__(
        self, x: jax.Array, t: jax.Array, labels: jax.Array, guidance: jax.Array | None = None
    ) -> jax.Array | GMOutput | ArcOutput:
        """Evaluates the network.

        Args:
            x: `[B, H, W, C]` states; `H` and `W` are multiples of `patch_size` and may differ from
                `sample_size` and from each other.
            t: `[B]` times in [0, 1], 1 is noise.
            labels: `[B]` integers in `[0, num_classes]`. Traced labels out of range give NaN.
            guidance: `[B]` guidance scales; None if and only if `guidance_embed` is False.

        Returns:
            The head's output: `u[B, H, W, C]`, a `GMOutput`, an `ArcOutput`, or `[B, H, W, N, C]`.
            Float32, or float64 with float64 parameters.

        Raises:
            ValueError: A shape, a size, a known label or the name of the remat policy is not valid.
        """
        time = self.embed_time(t)
        if (guidance is not None) != self.guidance_embed:
            raise ValueError(f"guidance_embed is {self.guidance_embed}, guidance is {guidance}")
        if guidance is not None:
            if guidance.shape != t.shape:
                raise ValueError(f"guidance {guidance.shape} must be [B], like t {t.shape}")
            zeros = nn.initializers.zeros
            time += self.embedder("guidance", time_features(guidance), last_init=zeros)
        return self.predict(x, t, labels, time)

    def predict(
        self, x: jax.Array, t: jax.Array, labels: jax.Array, time: jax.Array
    ) -> jax.Array | GMOutput | ArcOutput:
        """Evaluates the network on an embedding of its time, for networks that take several times.

        Args:
            x: `[B, H, W, C]` states, see `__call__`.
            t: `[B]` times in [0, 1], for the head.
            labels: `[B]` integers in `[0, num_classes]`.
            time: `[B, D]`, the output of `embed_time`, or a sum of such embeddings.

        Returns:
            The head's output: `u[B, H, W, C]` or another shape, see `__call__`.

        Raises:
            ValueError: A shape, a size or the name of the remat policy is not valid.
        """
        self._check(x, t, labels)
        embedding = time + self._embed_class(labels).astype(time.dtype)
        conditioning = self.conditioning(x, embedding)
        dtype = conditioning.dtype
        tokens, [(h, w)] = self.embed_patches([x], dtype)
        positions = position_table(self.hidden, h, w, self.sample_size // self.patch_size)
        tokens = tokens + jnp.asarray(positions, dtype).reshape(1, h * w, self.hidden)
        tokens = self.constrain(tokens, ("batch", None, "embed"))
        self.sow("intermediates", "embedded", tokens)
        self.sow("intermediates", "embedding", embedding)

        blocks = self.blocks(
            DiTBlock, self.depth, "blocks", dtype, mlp_hidden=int(self.hidden * self.mlp_ratio)
        )
        tokens, _ = blocks(tokens, conditioning)
        last = self.last_modulation(conditioning, kernel_init=nn.initializers.zeros)
        return self.output(tokens, *last, embedding, x, t, self.param_dtype)

    def example(self, batch: int = 1) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes of the inputs in training, for `init`.

        Args:
            batch: Number of examples.

        Returns:
            States, times and labels, and with `guidance_embed` guidance scales.
        """
        size = self.sample_size
        times = jax.ShapeDtypeStruct((batch,), jnp.float32)
        return (
            jax.ShapeDtypeStruct((batch, size, size, self.in_channels), jnp.float32),
            times,
            jax.ShapeDtypeStruct((batch,), jnp.int32),
            *([times] if self.guidance_embed else []),
        )

    def embed_time(self, t: jax.Array, name: str = "time") -> jax.Array:
        """Embeds times in at least float32, and in float64 with float64 parameters.

        Args:
            t: `[B]` times in [0, 1].
            name: Name of the embedder's two layers; a second time has an embedder of its own.

        Returns:
            `[B, D]`.
        """
        t = t.astype(jnp.promote_types(t.dtype, jnp.float32))
        return self.embedder(name, time_features(t * self.time_scale))

    def _embed_class(self, labels: jax.Array) -> jax.Array:
        """Embeddings `[B, D]` of the labels."""
        table = self.param(
            "class_embed",
            named(nn.initializers.normal(0.02), (None, "embed")),
            (self.num_classes + 1, self.hidden),
            self.param_dtype,
        )
        # JAX counts negative indices from the end.
        labels = jnp.where(labels < 0, self.num_classes + 1, labels)
        return jnp.take(table, labels, axis=0, mode="fill")

    def _check(self, x: jax.Array, t: jax.Array, labels: jax.Array) -> None:
        for name in ("patch_size", "hidden", "num_heads"):
            whole(name, getattr(self, name), 1)
        if self.dtype is not None and not jnp.issubdtype(self.dtype, jnp.floating):
            raise ValueError(f"dtype must be one of floating-point numbers, got {self.dtype}")
        if self.hidden % 4 or self.hidden % self.num_heads:
            raise ValueError(
                f"hidden {self.hidden} must be divisible by 4 and by num_heads {self.num_heads}"
            )
        self.check_state(x)
        if t.shape != x.shape[:1] or labels.shape != x.shape[:1]:
            raise ValueError(
                f"t {t.shape} and labels {labels.shape} must be [B] with B = {x.shape[0]}"
            )
        if not jnp.issubdtype(labels.dtype, jnp.integer):
            raise ValueError(f"labels must be integers, got {labels.dtype}")
        check_between("labels", labels, 0, self.num_classes)
