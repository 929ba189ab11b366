"""Weights of FLUX.1 and of its pi-Flow students with their official names.

Source: parameter names and layouts of `diffusers` (`FluxTransformer2DModel`) and of the pi-Flow
release (arXiv 2510.14974). The release orders the entries of a patch as (channel, row, column) and
the rows of an output layer as (K, channel, row, column). Here channels are last, so both are
permuted.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from piflow_jax.convert.heads import head_rules, read_head
from piflow_jax.convert.kinds import Kind
from piflow_jax.convert.rules import Place, Rule, embedder_rules, import_state, linear
from piflow_jax.convert.sizes import check_given, count_layers, divided, linear_sizes, shape_of
from piflow_jax.models.flux import Flux
from piflow_jax.models.joint import TextTransformer
from piflow_jax.models.layers import TIME_FEATURES

# The released networks have latents in patches of 2 x 2, which their weights do not show.
PATCH_SIZE = 2
OUTPUT = "proj_out"
TIME = "time_text_embed.timestep_embedder.linear_{}"
GUIDANCE = "time_text_embed.guidance_embedder.linear_{}"
POOLED = "time_text_embed.text_embedder.linear_{}"
DOUBLE, SINGLE = "transformer_blocks.{layer}.", "single_transformer_blocks.{layer}."


def flux_rules(module: Flux) -> list[Rule]:
    """The table for a FLUX.1 without adapters.

    Args:
        module: A `Flux` with any of the heads of `piflow_jax.models.heads`.

    Returns:
        Rules that cover every parameter once.

    Raises:
        ValueError: The head has no official counterpart.
    """
    d, head_size = module.hidden, module.hidden // module.num_heads
    rules = [
        *patch_rules("x_embedder", module),
        *linear("context_embedder", ("text_embed",), d, module.text_features),
        *embedder_rules(TIME, "time", d, TIME_FEATURES),
        *embedder_rules(POOLED, "pooled", d, module.pooled_features),
        *stream_rules("double_blocks", "image_", d, head_size, module.double_depth, STREAMS[0]),
        *stream_rules("double_blocks", "text_", d, head_size, module.double_depth, STREAMS[1]),
        *linear("norm_out.linear", ("final_modulation",), d, d, pieces=2),
        *patch_head_rules(module),
    ]
    if module.guidance_embed:
        rules += embedder_rules(GUIDANCE, "guidance", d, TIME_FEATURES)
    depth, path = module.single_depth, ("single_blocks",)
    out = f"{SINGLE}proj_out"
    rules += linear(f"{SINGLE}norm.linear", (*path, "modulation"), d, d, pieces=3, depth=depth)
    rules += attention_rules(path, "", f"{SINGLE}attn.", ATTENTION[0], d, head_size, depth)
    rules += linear(f"{SINGLE}proj_mlp", (*path, "mlp_in"), d, d, pieces=4, depth=depth)
    sizes = {"o": d, "s": 5, "i": d}
    rules += [
        Rule((f"{out}.weight",), (*path, "out", "kernel"), "l o (s i) -> l s i o", sizes, depth),
        Rule((f"{out}.bias",), (*path, "out", "bias"), "l o -> l o", {"o": d}, depth),
    ]
    return rules


# Names in one stream's attention: queries, keys and values; norms of queries and keys.
ATTENTION = (
    (("to_q", "to_k", "to_v"), ("norm_q", "norm_k")),
    (("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k")),
)
# Names of the stream's other layers: attention, output, modulation, MLP.
STREAMS = (
    (ATTENTION[0], "to_out.0", "norm1.linear", "ff"),
    (ATTENTION[1], "to_add_out", "norm1_context.linear", "ff_context"),
)


def attention_rules(path, prefix, module, names, d, head_size, depth, bias=True) -> list[Rule]:
    """Rules for fused queries, keys and values `{prefix}qkv`, and norms of the first two."""
    layers, norms = names
    official, ours = tuple(f"{module}{n}" for n in layers), (*path, f"{prefix}qkv")
    rules = linear(official, ours, d, d, depth=depth, bias=bias)
    return rules + norm_rules(path, prefix, module, norms, head_size, depth)


def norm_rules(path, prefix, module, norms, head_size, depth) -> list[Rule]:
    """Rules for the norms of queries and keys."""
    rules = []
    for norm, ours in zip(norms, ("query_norm", "key_norm"), strict=True):
        leaf = (*path, f"{prefix}{ours}", "scale")
        rules += [Rule((f"{module}{norm}.weight",), leaf, "l o -> l o", {"o": head_size}, depth)]
    return rules


def stream_rules(blocks, prefix, d, head_size, depth, names) -> list[Rule]:
    """Rules for one stream of the joint blocks `blocks`."""
    attention, out, modulation, mlp = names
    path, mlp = (blocks,), f"{DOUBLE}{mlp}.net"
    return [
        *linear(
            f"{DOUBLE}{modulation}", (*path, f"{prefix}modulation"), d, d, pieces=6, depth=depth
        ),
        *attention_rules(path, prefix, f"{DOUBLE}attn.", attention, d, head_size, depth),
        *linear(f"{DOUBLE}attn.{out}", (*path, f"{prefix}attention_out"), d, d, depth=depth),
        *linear(f"{mlp}.0.proj", (*path, f"{prefix}mlp_in"), 4 * d, d, depth=depth),
        *linear(f"{mlp}.2", (*path, f"{prefix}mlp_out"), d, 4 * d, depth=depth),
    ]


def patch_rules(name: str, module) -> list[Rule]:
    """Rules for the layer `patch_embed`."""
    p = module.patch_size
    sizes = {"o": module.hidden, "c": module.in_channels, "p": p, "q": p}
    kernel, bias = ("patch_embed", "kernel"), ("patch_embed", "bias")
    rules = [Rule((f"{name}.weight",), kernel, "o (c p q) -> (p q c) o", sizes)]
    if module.use_bias:
        rules += [Rule((f"{name}.bias",), bias, "o -> o", {"o": module.hidden})]
    return rules


def patch_head_rules(module) -> list[Rule]:
    """Rules for an output head on patches of channels, see `head_rules`."""
    p = module.patch_size

    def layer(name, ours, k, c):
        rows = {"k": k, "c": c, "p": p, "q": p}
        kernel, bias = ("head", ours, "kernel"), ("head", ours, "bias")
        sizes = rows | {"i": module.hidden}
        rules = [Rule((f"{name}.weight",), kernel, "(k c p q) i -> i (p q k c)", sizes)]
        if module.use_bias or name != OUTPUT:
            rules += [Rule((f"{name}.bias",), bias, "(k c p q) -> (p q k c)", rows)]
        return rules

    return head_rules(module, OUTPUT, layer)


def load_text_network(
    kind: Kind,
    state: Mapping[str, np.ndarray],
    head: str,
    *,
    axes_dims_rope: tuple[int, ...] | None = None,
    place: Place | None = None,
    **given: float,
) -> tuple[TextTransformer, dict]:
    """Loads a network that reads text, or a student of it with adapters merged into its weights.

    Args:
        kind: The network's row.
        state: Arrays by official name.
        head: A name in `HEADS`.
        axes_dims_rope: See the network; small ones need it. None is that of the release.
        place: Puts each leaf on its devices as soon as it is built, see `import_state`; None keeps
            leaves on the default device.
        **given: Sizes that shapes show, as a check: what `kind.read` finds, `num_components`,
            `logstd_hidden`, `num_grid`. A mixture without a logstd head needs `constant_logstd`.

    Returns:
        The module, and `{"params": ...}` as JAX arrays with the dtypes of `state`.

    Raises:
        ValueError: Names, shapes or dtypes do not match (the message lists the faults), numbers are
            not finite, or a given size contradicts the weights.
    """
    sizes = kind.read(state)
    predicts, head_sizes = read_head(state, head, kind, sizes, given)
    check_given(given, sizes | head_sizes)
    rope = tuple(axes_dims_rope or kind.module.axes_dims_rope)
    module = kind.module(**sizes, axes_dims_rope=rope, head=predicts)
    return module, {"params": import_state(state, kind.rules(module), place)}


def _read(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return read_width(state, "x_embedder") | {
        "double_depth": count_layers(state, "transformer_blocks"),
        "single_depth": count_layers(state, "single_transformer_blocks"),
        "text_features": linear_sizes(state, "context_embedder")[1],
        "pooled_features": linear_sizes(state, POOLED.format(1))[1],
        "guidance_embed": f"{GUIDANCE.format(1)}.weight" in state,
    }


def read_width(
    state: Mapping[str, np.ndarray], patch_embed: str, *, bias: bool = True
) -> dict[str, int]:
    """Sizes of patches and of tokens, as fields of the network."""
    hidden, ins = linear_sizes(state, patch_embed, bias=bias)
    (head_size,) = shape_of(state, "transformer_blocks.0.attn.norm_q.weight", 1)
    return {
        "patch_size": PATCH_SIZE,
        "in_channels": divided(f"a row of {patch_embed}.weight", ins, PATCH_SIZE**2),
        "hidden": hidden,
        "num_heads": divided(f"a column of {patch_embed}.weight", hidden, head_size),
    }


def _release(module: Flux) -> dict[str, Any]:
    return {
        "_class_name": "FluxTransformer2DModel",
        "num_layers": module.double_depth,
        "num_single_layers": module.single_depth,
        "pooled_projection_dim": module.pooled_features,
        "guidance_embeds": module.guidance_embed,
    }


def whole(*names: str) -> tuple[tuple[str, int, int], ...]:
    """Layers that one of the first release consists of; see `Kind.first_names`."""
    return tuple((name, 0, 1) for name in names)


def _first_stream(first: str, names: tuple) -> dict[str, tuple]:
    attention, out, modulation, mlp = names
    block = f"double_blocks.{{layer}}.{first}"
    return {
        f"{block}_attn.qkv": whole(*(f"{DOUBLE}attn.{name}" for name in attention[0])),
        f"{block}_attn.proj": whole(f"{DOUBLE}attn.{out}"),
        f"{block}_mod.lin": whole(f"{DOUBLE}{modulation}"),
        f"{block}_mlp.0": whole(f"{DOUBLE}{mlp}.net.0.proj"),
        f"{block}_mlp.2": whole(f"{DOUBLE}{mlp}.net.2"),
    }


def first_embedder(first: str, official: str) -> dict[str, tuple]:
    """First names of a two-layer embedder of a condition."""
    layers = zip(("in_layer", "out_layer"), (1, 2), strict=True)
    return {f"{first}.{layer}": whole(official.format(i)) for layer, i in layers}


# Layers of the first release of FLUX.1, whose names kohya's scripts and ComfyUI use.
FIRST_NAMES = {
    **_first_stream("img", STREAMS[0]),
    **_first_stream("txt", STREAMS[1]),
    "single_blocks.{layer}.linear1": whole(
        *(f"{SINGLE}attn.{name}" for name in ATTENTION[0][0]), f"{SINGLE}proj_mlp"
    ),
    "single_blocks.{layer}.linear2": whole(f"{SINGLE}proj_out"),
    "single_blocks.{layer}.modulation.lin": whole(f"{SINGLE}norm.linear"),
    "img_in": whole("x_embedder"),
    "txt_in": whole("context_embedder"),
    **first_embedder("time_in", TIME),
    **first_embedder("vector_in", POOLED),
    **first_embedder("guidance_in", GUIDANCE),
    "final_layer.linear": whole(OUTPUT),
    # The shift comes before the scale there.
    "final_layer.adaLN_modulation.1": (("norm_out.linear", 1, 2), ("norm_out.linear", 0, 2)),
}

FLUX = Kind(
    name="flux",
    mark="single_transformer_blocks.0.proj_mlp.weight",
    load=load_text_network,
    read=_read,
    module=Flux,
    output=OUTPUT,
    rules=flux_rules,
    release=_release,
    first_names=FIRST_NAMES,
)
