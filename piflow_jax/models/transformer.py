"""What the transformers share around their blocks: fields, embeddings, stacks of blocks, output."""

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from piflow_jax.models.blocks import Constrain, Layers, modulated, stacked, unconstrained
from piflow_jax.models.heads import VelocityHead
from piflow_jax.models.layers import Axes, Network, patchify, xavier_uniform
from piflow_jax.models.lora import AdaptedLinear, LoRA


class Transformer(Network):
    """A transformer on patches of images. See `DiT` for its fields."""

    patch_size: int = 2
    in_channels: int = 4
    hidden: int = 1152
    num_heads: int = 16
    head: nn.Module = VelocityHead()
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    remat: str = "none"
    scan_unroll: int = 1
    attention: str | None = None
    constrain: Constrain = unconstrained
    lora: ClassVar[LoRA | None] = None
    use_bias: ClassVar[bool] = True
    # Inputs that a student may have beyond its teacher's, and their layers. Fresh ones change
    # nothing, so that the student still starts at its teacher.
    addable: ClassVar[Mapping[str, tuple[str, ...]]] = types.MappingProxyType({})

    def linear(
        self, features: tuple[int, ...], name: str, axes: Axes, **options: Any
    ) -> AdaptedLinear:
        """A linear layer of this network, outside its blocks."""
        options = {"param_dtype": self.param_dtype, "lora": self.lora, "parent": self} | options
        return AdaptedLinear(features, use_bias=self.use_bias, axes=axes, name=name, **options)

    def embedder(
        self, name: str, features: jax.Array, last_init: Callable = xavier_uniform
    ) -> jax.Array:
        """Embeds features `[B, F]` of a condition as `[B, D]`, by two layers."""
        hidden = nn.silu(self.linear((self.hidden,), f"{name}_in", (None, "embed"))(features))
        last = self.linear((self.hidden,), f"{name}_out", ("embed", None), kernel_init=last_init)
        return last(hidden)

    def conditioning(self, x: jax.Array, embedding: jax.Array) -> jax.Array:
        """The embedding `[B, D]` as blocks take it, in the dtype in which tokens are computed."""
        dtype = jnp.promote_types(x.dtype, embedding.dtype) if self.dtype is None else self.dtype
        return nn.silu(embedding).astype(dtype)

    def embed_patches(
        self, images: Sequence[jax.Array], dtype: DTypeLike
    ) -> tuple[jax.Array, list[tuple[int, int]]]:
        """Tokens `[B, T, D]` of the patches of images `[B, H, W, C]`, and each one's `(h, w)`."""
        patches = [patchify(image, self.patch_size) for image in images]
        layer = self.linear((self.hidden,), "patch_embed", (None, "embed"), dtype=dtype)
        rows = [p.reshape(p.shape[0], -1, p.shape[-1]) for p in patches]
        tokens = rows[0] if len(rows) == 1 else jnp.concatenate(rows, axis=1)
        return layer(tokens), [p.shape[1:3] for p in patches]

    def blocks(
        self, block: type[Layers], depth: int, name: str, dtype: DTypeLike, **settings: Any
    ) -> nn.Module:
        """Blocks under one scan, see `stacked`."""
        settings |= {
            "num_heads": self.num_heads,
            "dtype": dtype,
            "param_dtype": self.param_dtype,
            "attention": self.attention,
            "constrain": self.constrain,
            "lora": self.lora,
            "name": name,
            "parent": self,
        }
        return stacked(block, depth, remat=self.remat, unroll=self.scan_unroll, settings=settings)

    def last_modulation(self, conditioning: jax.Array, **options: Any) -> tuple[jax.Array, ...]:
        """The two vectors `[B, D]` that modulate the last tokens."""
        axes, options = ("embed", None, None), {"dtype": conditioning.dtype} | options
        modulation = self.linear((2, self.hidden), "final_modulation", axes, **options)(
            conditioning
        )
        return modulation[:, 0], modulation[:, 1]

    def output(
        self,
        tokens: jax.Array,
        shift: jax.Array,
        scale: jax.Array,
        embedding: jax.Array,
        x: jax.Array,
        t: jax.Array,
        param_dtype: DTypeLike,
    ) -> Any:
        """The head's output for the last `tokens[B, h * w, D]`."""
        tokens = modulated(tokens, shift, scale)
        sites = (side // self.patch_size for side in x.shape[1:3])
        return self.head(
            tokens.reshape(x.shape[0], *sites, self.hidden),
            embedding,
            x,
            t,
            patch_size=self.patch_size,
            param_dtype=param_dtype,
            velocity_bias=self.use_bias,
        )

    def check_state(self, x: jax.Array, name: str = "x") -> None:
        """Raises ValueError if `x` is no state that the patches divide."""
        if x.ndim != 4 or x.shape[-1] != self.in_channels or not x.size:
            raise ValueError(f"{name} must be [B, H, W, {self.in_channels}], got {x.shape}")
        if x.shape[1] % self.patch_size or x.shape[2] % self.patch_size:
            raise ValueError(f"{name} {x.shape} is not divisible into patches of {self.patch_size}")
