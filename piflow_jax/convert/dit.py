"""Weights of the DiT family with their official names.

Source: parameter names and layouts of the pi-Flow release (arXiv 2510.14974) and of the `diffusers`
DiT checkpoints that it starts from.
"""

from collections.abc import Mapping

import numpy as np

from piflow_jax.convert.heads import head_rules, read_head
from piflow_jax.convert.kinds import Kind
from piflow_jax.convert.rules import Place, Rule, embedder_rules, import_state, linear
from piflow_jax.convert.sizes import check_given, count_layers, shape_of
from piflow_jax.models.dit import DiT
from piflow_jax.models.layers import TIME_FEATURES, position_table

PATCH_EMBED = "pos_embed.proj"
CLASS_EMBED = "emb.class_embedder.embedding_table.weight"
FIRST_BLOCK_EMBEDDER = "transformer_blocks.0.norm1.emb."
POSITIONS = "pos_embed.pos_embed"
OUTPUT = "proj_out_2"
# Students of a range of guidance scales have it; no release does.
GUIDANCE = "emb.guidance_embedder.linear_{}"
# The averaged table of a long training run is off by 2e-4, a wrong table by about 1.
_POSITION_TOLERANCE = 1e-3


def dit_rules(module: DiT) -> list[Rule]:
    """The table for a DiT.

    Args:
        module: A DiT with any of the heads of `piflow_jax.models.heads`.

    Returns:
        Rules that cover every parameter once.

    Raises:
        ValueError: The head has no official counterpart.
    """
    d, p, c = module.hidden, module.patch_size, module.in_channels
    mlp = int(d * module.mlp_ratio)
    depth, block = module.depth, "transformer_blocks.{layer}."
    attention = tuple(f"{block}attn1.to_{which}" for which in "qkv")
    patch = {"o": d, "c": c, "p": p, "q": p}

    def head_layer(name, ours, k, c):
        # Rows are ordered (row, column, K, C) on both sides, so the head's layers only transpose.
        return linear(name, ("head", ours), p * p * k * c, d)

    guidance = []
    if module.guidance_embed:
        guidance = embedder_rules(GUIDANCE, "guidance", d, TIME_FEATURES)
    return [
        Rule((f"{PATCH_EMBED}.weight",), ("patch_embed", "kernel"), "o c p q -> (p q c) o", patch),
        Rule((f"{PATCH_EMBED}.bias",), ("patch_embed", "bias"), "o -> o", {"o": d}),
        *linear("emb.timestep_embedder.linear_1", ("time_in",), d, TIME_FEATURES),
        *linear("emb.timestep_embedder.linear_2", ("time_out",), d, d),
        Rule((CLASS_EMBED,), ("class_embed",), "o i -> o i", {"o": module.num_classes + 1, "i": d}),
        *linear(f"{block}norm1.linear", ("blocks", "modulation"), d, d, pieces=6, depth=depth),
        *linear(attention, ("blocks", "qkv"), d, d, depth=depth),
        *linear(f"{block}attn1.to_out.0", ("blocks", "attention_out"), d, d, depth=depth),
        *linear(f"{block}ff.net.0.proj", ("blocks", "mlp_in"), mlp, d, depth=depth),
        *linear(f"{block}ff.net.2", ("blocks", "mlp_out"), d, mlp, depth=depth),
        *linear("proj_out_1", ("final_modulation",), d, d, pieces=2),
        *guidance,
        *head_rules(module, OUTPUT, head_layer),
    ]


def load_dit(
    kind: Kind,
    state: Mapping[str, np.ndarray],
    head: str,
    *,
    num_heads: int,
    sample_size: int,
    time_scale: float = 1.0,
    place: Place | None = None,
    **given: float,
) -> tuple[DiT, dict]:
    """Loads a network of the DiT family.

    In addition to the release's own layout, a teacher may have one of two older layouts.
    Checkpoints of `diffusers` have an embedder per block, of which only the first is kept, and
    predicted variances, which are dropped. GMDiT-V1 with one Gaussian has a log-weight channel,
    which is dropped.

    Args:
        kind: The network's row.
        state: Arrays by official name.
        head: A name in `HEADS`.
        num_heads: Attention heads.
        sample_size: Side, in sites, of the square inputs in training.
        time_scale: See `DiT`.
        place: Puts each leaf on its devices as soon as it is built, see `import_state`; None keeps
            leaves on the default device.
        **given: Sizes that shapes show, as a check: `patch_size`, `in_channels`, `hidden`, `depth`,
            `mlp_ratio`, `num_classes`, `guidance_embed`, `num_components`, `logstd_hidden`,
            `num_grid`. A mixture without a logstd head needs `constant_logstd`.

    Returns:
        The module, and `{"params": ...}` as JAX arrays with the dtypes of `state`.

    Raises:
        ValueError: Names, shapes or dtypes do not match (the message lists the faults), numbers are
            not finite, or a given size contradicts the weights.
    """
    state = _shared_embedder(dict(state))
    sizes = _read_sizes(state)
    if not head:
        _keep_velocity_rows(state, sizes["patch_size"] ** 2, sizes["in_channels"])
    predicts, head_sizes = read_head(state, head, kind, sizes, given)
    check_given(given, sizes | head_sizes)
    sizes |= {"num_heads": num_heads, "sample_size": sample_size, "time_scale": time_scale}
    module = DiT(**sizes, head=predicts)
    _drop_position_table(state, module)
    return module, {"params": import_state(state, dit_rules(module), place)}


def _read_sizes(state: Mapping[str, np.ndarray]) -> dict:
    """Sizes of the backbone, as fields of `DiT`."""
    _, channels, patch, _ = shape_of(state, f"{PATCH_EMBED}.weight", 4)
    (hidden,) = shape_of(state, f"{PATCH_EMBED}.bias", 1)
    (mlp,) = shape_of(state, "transformer_blocks.0.ff.net.0.proj.bias", 1)
    return {
        "patch_size": patch,
        "in_channels": channels,
        "hidden": hidden,
        "depth": count_layers(state, "transformer_blocks"),
        "mlp_ratio": mlp / hidden,
        "num_classes": shape_of(state, CLASS_EMBED, 2)[0] - 1,
        "guidance_embed": f"{GUIDANCE.format(1)}.weight" in state,
    }


def _shared_embedder(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Replaces the embedders that `diffusers` has in every block by the first block's."""
    first = {n: a for n, a in state.items() if n.startswith(FIRST_BLOCK_EMBEDDER)}
    if CLASS_EMBED in state or not first:
        return state
    shared = {n: a for n, a in state.items() if ".norm1.emb." not in n}
    return shared | {f"emb.{n.removeprefix(FIRST_BLOCK_EMBEDDER)}": a for n, a in first.items()}


def _keep_velocity_rows(state: dict[str, np.ndarray], pixels: int, channels: int) -> None:
    """Drops output rows beyond the first C of a pixel if a known older layout has them."""
    for name in (f"{OUTPUT}.weight", f"{OUTPUT}.bias"):
        rows = np.asarray(state[name]) if name in state else None
        # C + 1: GMDiT-V1 with one Gaussian; 2 C: the original DiT's predicted variance.
        if rows is not None and len(rows) in (pixels * (channels + 1), pixels * 2 * channels):
            kept = rows.reshape(pixels, -1, *rows.shape[1:])[:, :channels]
            state[name] = kept.reshape(pixels * channels, *rows.shape[1:])


def _drop_position_table(state: dict[str, np.ndarray], module: DiT) -> None:
    """Drops the fixed position table of some files if it equals the one that we compute."""
    if POSITIONS not in state:
        return
    side = module.sample_size // module.patch_size
    table = position_table(module.hidden, side, side, side).reshape(1, side * side, module.hidden)
    stored = np.asarray(state.pop(POSITIONS), np.float32)
    if stored.shape != table.shape:
        raise ValueError(
            f"{POSITIONS} has shape {stored.shape}, sample_size {module.sample_size} makes "
            f"{table.shape}"
        )
    error = np.abs(stored - table).max()
    if not error <= _POSITION_TOLERANCE:
        raise ValueError(f"{POSITIONS} is not the fixed table, it is off by {error:.2g}")


DIT = Kind(
    name="dit",
    mark="transformer_blocks.0.attn1.to_q.weight",
    load=load_dit,
    module=DiT,
    output=OUTPUT,
    rules=dit_rules,
)
