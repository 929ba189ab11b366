"""Parts shared by the transformers' blocks.

The blocks have adaptive layer norms, after DiT (arXiv 2212.09748) and MM-DiT (arXiv 2403.03206):
the conditioning shifts, scales and gates the tokens around attention and around an MLP.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from piflow_jax.models.layers import Axes, layer_norm
from piflow_jax.models.lora import AdaptedLinear, LoRA

NORM_EPS = 1e-6

REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


Constrain = Callable[[jax.Array, Sequence[str | None]], jax.Array]


def unconstrained(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """Lets the compiler choose the sharding of an activation."""
    return x


def modulated(x: jax.Array, shift: jax.Array, scale: jax.Array, eps: float = NORM_EPS) -> jax.Array:
    """Normalises `x[B, T, D]`, scales by `1 + scale[B, D]` and shifts by `shift[B, D]`."""
    return layer_norm(x, eps) * (1 + scale[:, None]) + shift[:, None]


class Layers(nn.Module):
    """Settings shared by all blocks, and the linear layers made with them.

    Attributes:
        num_heads: Attention heads; must divide the width.
        dtype: Compute dtype.
        param_dtype: Dtype of fresh parameters of the base.
        attention: A name in `ATTENTION`, or None; see `attend`.
        constrain: See `DiT`.
        lora: Adapters; None for none.
        use_bias: Whether linear layers have biases.
    """

    num_heads: int
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    attention: str | None = None
    constrain: Constrain = unconstrained
    lora: LoRA | None = None
    use_bias: ClassVar[bool] = True

    def linear(
        self, features: tuple[int, ...], name: str, axes: Axes, **options: Any
    ) -> AdaptedLinear:
        """A linear layer of this block."""
        return AdaptedLinear(
            features,
            use_bias=self.use_bias,
            axes=axes,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            lora=self.lora,
            name=name,
            parent=self,
            **options,
        )

    def queries_keys_values(
        self, tokens: jax.Array, prefix: str = ""
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values of `tokens[B, T, D]`, each `[B, T, heads, size]`."""
        width = tokens.shape[-1]
        qkv = self.linear((3, width), f"{prefix}qkv", ("embed", None, "heads"))(tokens)
        return self.by_head(self.constrain(qkv, ("batch", None, None, "heads")))

    def by_head(self, qkv: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values `[B, T, heads, size]`, the pieces of `qkv[B, T, 3, D]`."""
        b, t, _, width = qkv.shape
        qkv = qkv.reshape(b, t, 3, self.num_heads, width // self.num_heads)
        return qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]

    def hidden_layer(self, tokens: jax.Array, hidden: int, prefix: str) -> jax.Array:
        """The hidden layer `[B, T, hidden]` of the MLP on `tokens[B, T, D]`."""
        layer = self.linear((hidden,), f"{prefix}mlp_in", ("embed", "mlp"))
        return nn.gelu(layer(tokens), approximate=True)

    def after_attention(
        self,
        tokens: jax.Array,
        attended: jax.Array,
        modulation: jax.Array,
        mlp_hidden: int,
        prefix: str = "",
        eps: float = NORM_EPS,
    ) -> jax.Array:
        """Adds the output of attention, then the output of an MLP on the sum.

        Args:
            tokens: `[B, T, D]`, before attention.
            attended: `[B, T, D]`, the heads' outputs concatenated.
            modulation: `[B, 6, D]`. The third gates attention; the last three shift, scale and gate
                the MLP.
            mlp_hidden: Width of the MLP's hidden layer.
            prefix: Prefix of the layers' names.
            eps: Epsilon of the layer norm in front of the MLP.

        Returns:
            `[B, T, D]`.
        """
        width = tokens.shape[-1]
        attention_out = self.linear((width,), f"{prefix}attention_out", ("heads", "embed"))
        mlp_out = self.linear((width,), f"{prefix}mlp_out", ("mlp", "embed"))
        tokens = tokens + modulation[:, None, 2] * attention_out(attended)
        hidden = modulated(tokens, modulation[:, 3], modulation[:, 4], eps)
        hidden = self.hidden_layer(hidden, mlp_hidden, prefix)
        hidden = self.constrain(hidden, ("batch", None, "mlp"))
        tokens = tokens + modulation[:, None, 5] * mlp_out(hidden)
        return self.constrain(tokens, ("batch", None, "embed"))


def stacked(
    block: type[Layers], depth: int, *, remat: str, unroll: int, settings: Mapping[str, Any]
) -> nn.Module:
    """Blocks under one scan, with parameters stacked on a leading axis.

    Args:
        block: Class of the block. Its first argument is carried from block to block, the others are
            the same for all blocks.
        depth: Number of blocks.
        remat: A name in `REMAT_POLICIES`.
        unroll: Blocks per iteration.
        settings: Fields of the block, with `name` and `parent`.

    Returns:
        A module with the arguments of the block.

    Raises:
        ValueError: The remat policy is unknown.
    """
    if remat not in REMAT_POLICIES:
        raise ValueError(f"remat {remat!r} is not one of {sorted(REMAT_POLICIES)}")
    if remat != "none":
        # Inside a loop the compiler cannot merge the recomputation with the forward pass. Only an
        # unrolled loop needs the (costly) barrier against that.
        block = nn.remat(block, policy=REMAT_POLICIES[remat], prevent_cse=unroll > 1)
    scanned = nn.scan(
        block,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=nn.broadcast,
        length=depth,
        unroll=unroll,
        # The check traces the block a second time.
        check_constancy_invariants=False,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return scanned(**settings)
