"""Full self-attention, by one of several implementations.

The memory of scores is what limits attention to long sequences: cuDNN's and splash attention (both
after FlashAttention, arXiv 2205.14135) never have more than a tile of them.
"""

import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import AxisType, PartitionSpec

__all__ = ["ATTENTION", "HEADS_AXIS", "attend", "splash"]

# Scores that attention holds at a time for an example, and the multiple of queries that TPUs like.
SCORES = 2**27
LANES = 128
# Queries, and keys, of a tile of splash attention: the first of these that divides the sequence.
TILES = (512, 384, 256, LANES)
HEADS_AXIS = "tensor"
"""The axis of a mesh that splits attention heads."""

Implementation = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array]


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    implementation: str | None = None,
    key_mask: jax.Array | None = None,
) -> jax.Array:
    """Full self-attention, scaled by `1 / sqrt(head size)`, softmax in float32 at least.

    Without cuDNN and splash attention, scores are arrays. At most about `SCORES` of an example are
    held at a time: longer sequences attend in pieces of the queries, one after the other, and the
    backward pass computes the scores of a piece again.

    Args:
        q: `[B, T, heads, head size]` queries.
        k: Keys, like `q`.
        v: Values, like `q`.
        implementation: A name in `ATTENTION`; None lets JAX choose. Where "cudnn" or "splash" is
            not available for these arrays, JAX chooses and the log says why. Neither has
            derivatives in forward mode.
        key_mask: `[B, T]` booleans, False for keys that are hidden from all queries; None hides
            none.

    Returns:
        Array like `q`.
    """
    return ATTENTION[implementation](q, k, v, key_mask)


def _in_pieces(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    key_mask: jax.Array | None,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Attention whose scores are arrays, of as many queries at a time as `SCORES` allows."""
    whole = functools.partial(_whole, key_mask=key_mask, implementation=implementation)
    batch, length, heads, size = q.shape
    fitting = max(SCORES // (heads * k.shape[1]), 1)
    if length <= fitting:
        return whole(q, k, v)
    count = -(-length // max(fitting // LANES * LANES, LANES))
    piece = -(-length // (count * LANES)) * LANES
    # As residuals of the pieces keys and values are float32, so that the pieces' gradients add up
    # in it, as the products of one piece do.
    wide = [x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (k, v)]

    @jax.checkpoint
    def attend_piece(queries):
        return whole(queries, *(x.astype(q.dtype) for x in wide))

    queries = jnp.pad(q, [(0, 0), (0, count * piece - length), (0, 0), (0, 0)])
    queries = queries.reshape(batch, count, piece, heads, size).swapaxes(0, 1)
    attended = jax.lax.map(attend_piece, queries).swapaxes(0, 1)
    return attended.reshape(batch, count * piece, heads, size)[:, :length]


def _whole(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    key_mask: jax.Array | None,
    *,
    implementation: str | None,
) -> jax.Array:
    """Attention of queries `[B, n, heads, head size]` to all keys."""
    mask = None if key_mask is None else key_mask[:, None, None, :]
    if q.dtype == jnp.float64:
        # The library's softmax is float32 for any input, which would hide errors of 1e-7.
        logits = jnp.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.shape[-1])
        logits = logits if mask is None else jnp.where(mask, logits, -jnp.inf)
        return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(logits, axis=-1), v)
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=implementation)


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, key_mask: jax.Array | None) -> jax.Array:
    """Attention by cuDNN, if it has it for these shapes and dtypes on this machine."""
    whole = functools.partial(_whole, key_mask=key_mask, implementation="cudnn")
    if jax.default_backend() != "gpu":
        _say_once(_NO_CUDNN, f"the backend is {jax.default_backend()}")
        return _in_pieces(q, k, v, key_mask)
    try:
        jax.eval_shape(whole, q, k, v)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        _say_once(_NO_CUDNN, f"q {q.dtype}{list(q.shape)}: {error}")
        return _in_pieces(q, k, v, key_mask)
    return whole(q, k, v)


def _splash_on_tpus(
    q: jax.Array, k: jax.Array, v: jax.Array, key_mask: jax.Array | None
) -> jax.Array:
    """Splash attention in programs for TPUs, whichever machine compiles them."""
    if jax.default_backend() != "tpu":
        _say_once("splash attention is for TPUs; JAX's own takes its place in other programs")
    if q.dtype == jnp.float64:
        return _in_pieces(q, k, v, key_mask)
    return jax.lax.platform_dependent(
        q, k, v, key_mask, tpu=functools.partial(_over_mesh, splash), default=_in_pieces
    )


def _over_mesh(
    local: Implementation,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    key_mask: jax.Array | None,
) -> jax.Array:
    """Attention of each device to its examples and heads, since XLA cannot split a kernel.

    The mesh is that of `jax.set_mesh`. What it does not divide is whole on all its devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = [
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Auto
    ]

    def dividing(count, names):
        return names if names and not count % math.prod(mesh.shape[name] for name in names) else ()

    batch = dividing(q.shape[0], tuple(name for name in axes if name != HEADS_AXIS))
    heads = dividing(q.shape[2], tuple(name for name in axes if name == HEADS_AXIS))
    if math.prod(mesh.shape[name] for name in axes) == 1:
        return local(q, k, v, key_mask)
    tokens = PartitionSpec(batch, None, heads)
    split = jax.shard_map(
        local,
        in_specs=(tokens, tokens, tokens, PartitionSpec(batch)),
        out_specs=tokens,
        axis_names=set(axes),
        check_vma=False,
    )
    return split(q, k, v, key_mask)


def splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    key_mask: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """JAX's splash attention, a kernel for TPUs.

    Args:
        q: `[B, T, heads, head size]` queries, no float64.
        k: Keys, like `q`.
        v: Values, like `q`.
        key_mask: `[B, T]` booleans, see `attend`.
        interpret: Runs the kernel's operations one by one, on any platform.

    Returns:
        Array like `q`.
    """
    # It is loaded where it is used: few programs have it.
    from jax.experimental.pallas.ops.tpu import splash_attention

    length, heads, size = q.shape[1:]
    padding = -length % LANES
    tile = next(tile for tile in TILES if not (length + padding) % tile)
    if padding:
        rows = q.shape[:2]
        key_mask = jnp.ones(rows, bool) if key_mask is None else key_mask
        key_mask = jnp.pad(key_mask, [(0, 0), (0, padding)])
    segments = None
    if key_mask is not None:  # all queries are in segment 1, and hidden keys in none
        visible = key_mask.astype(jnp.int32)
        segments = splash_attention.SegmentIds(q=jnp.ones_like(visible), kv=visible)
    by_head = (
        jnp.pad(x, [(0, 0), (0, padding), (0, 0), (0, 0)]).swapaxes(1, 2)
        for x in (q * jnp.asarray(size**-0.5, q.dtype), k, v)
    )
    # Heads that fill no lanes have their tokens there: nothing is padded, and XLA transposes less.
    layouts = splash_attention.QKVLayout
    layout = layouts.SEQ_MINOR if size % LANES else layouts.HEAD_DIM_MINOR
    everything = splash_attention.FullMask((length + padding, length + padding))
    kernel = splash_attention.make_splash_mha_single_device(
        splash_attention.MultiHeadMask([everything] * heads),
        block_sizes=splash_attention.BlockSizes(
            **dict.fromkeys(("block_q", "block_q_dkv", "block_q_dq"), tile),
            **dict.fromkeys(("block_kv", "block_kv_dkv", "block_kv_dq"), tile),
            **dict.fromkeys(("q_layout", "k_layout", "v_layout"), layout),
        ),
        interpret=interpret,
    )
    return jax.vmap(kernel)(*by_head, segments).swapaxes(1, 2)[:, :length]


ATTENTION: Mapping[str | None, Implementation] = {
    None: _in_pieces,
    "xla": functools.partial(_in_pieces, implementation="xla"),
    "cudnn": _cudnn,
    "splash": _splash_on_tpus,
}
"""Implementations by name, `(q, k, v, key_mask) -> attended`; see `attend`."""


_NO_CUDNN = "attention by cuDNN is not available, so JAX's own takes its place: %s"


@functools.cache
def _say_once(message: str, *arguments: str) -> None:
    logging.warning(message, *arguments)
