"""Official names and layouts of FLUX.1 and its students, in and out."""

import json
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest

from piflow_jax.convert import load_torch_state, open_weights, to_torch_state, write_safetensors
from piflow_jax.convert.flux import flux_rules
from piflow_jax.models.flux import FLUX_TARGETS, Flux
from piflow_jax.models.heads import DXHead, GMHead
from piflow_jax.models.lora import LoRA
from tests.models.recorded import assert_bit_equal, random_state

D, P = 32, 4
ROPE = {"axes_dims_rope": (4, 6, 6)}


def official_state(head="proj_out", copies=1, dtype=np.float32):
    """A state as the release lays it out, from shapes alone: one number per entry."""
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    peer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    state = random_state(peer)
    draw = np.random.default_rng(1).normal
    del state["proj_out.weight"], state["proj_out.bias"]
    outputs = {head: (copies * 16, D)}
    if head == "proj_out_means":
        outputs |= {
            "proj_out_logweights": (copies * P, D),
            "proj_out_logstds.1": (7, D),
            "proj_out_logstds.3": (1, 7),
        }
    for name, shape in outputs.items():
        state[f"{name}.weight"], state[f"{name}.bias"] = draw(size=shape), draw(size=shape[0])
    return {name: np.asarray(array, dtype) for name, array in state.items()}


@pytest.mark.parametrize(
    ("kind", "head", "copies"),
    [("flux", "proj_out", 1), ("gm_flux", "proj_out_means", 3), ("dx_flux", "proj_out", 5)],
)
def test_round_trip_is_bit_exact(kind, head, copies):
    state = official_state(head, copies)
    module, params = load_torch_state(state, kind, **ROPE)
    assert_bit_equal(to_torch_state(module, params), state)
    # The module is the one whose fresh parameters have these shapes.
    fresh = jax.eval_shape(module.init, jax.random.key(0), *module.example())
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda a: a.shape, fresh)


def test_sizes_are_read_off_the_shapes():
    module, _ = load_torch_state(official_state("proj_out_means", 3), "gm_flux", **ROPE)
    assert module == Flux(
        in_channels=4,
        hidden=D,
        num_heads=2,
        double_depth=2,
        single_depth=3,
        text_features=12,
        pooled_features=10,
        axes_dims_rope=(4, 6, 6),
        head=GMHead(num_components=3, logstd_hidden=7),
    )


def test_patches_and_rows_are_permuted_to_channels_last():
    state = official_state("proj_out", 3)
    _, params = load_torch_state(state, "dx_flux", num_grid=3, **ROPE)
    params = params["params"]
    ours = params["patch_embed"]["kernel"].reshape(2, 2, 4, D)
    theirs = state["x_embedder.weight"].reshape(D, 4, 2, 2)
    np.testing.assert_array_equal(ours[1, 0, 3], theirs[:, 3, 1, 0])
    ours = params["head"]["output"]["kernel"].reshape(D, 2, 2, 3, 4)
    theirs = state["proj_out.weight"].reshape(3, 4, 2, 2, D)
    np.testing.assert_array_equal(ours[:, 1, 0, 2, 3], theirs[2, 3, 1, 0])
    # The single block's output reads attention first, then the hidden layer.
    out = params["single_blocks"]["out"]["kernel"][1]
    weight = state["single_transformer_blocks.1.proj_out.weight"]
    np.testing.assert_array_equal(out[0], weight[:, :D].T)
    np.testing.assert_array_equal(out[4], weight[:, 4 * D :].T)
    text = params["double_blocks"]["text_qkv"]["kernel"][1, :, 2]
    np.testing.assert_array_equal(text, state["transformer_blocks.1.attn.add_v_proj.weight"].T)


def test_misfits():
    state = official_state()
    with pytest.raises(ValueError, match="double_depth: given 4, the state has 2"):
        load_torch_state(state, "flux", double_depth=4, **ROPE)
    with pytest.raises(ValueError, match="no logstd head: constant_logstd must be given"):
        load_torch_state(
            {n: a for n, a in official_state("proj_out_means").items() if "logstds" not in n},
            "gm_flux",
            **ROPE,
        )
    del state["single_transformer_blocks.2.proj_mlp.bias"]
    state["surplus"] = np.zeros(3)
    with pytest.raises(ValueError) as error:
        load_torch_state(state, "flux", **ROPE)
    assert "missing single_transformer_blocks.2.proj_mlp.bias (128,)" in str(error.value)
    assert "unexpected surplus (3,)" in str(error.value)
    module, params = load_torch_state(official_state(), "flux", **ROPE)
    with pytest.raises(ValueError, match="has adapters"):
        to_torch_state(module.clone(lora=LoRA(FLUX_TARGETS)), params)
    with pytest.raises(ValueError, match="input_skip"):
        to_torch_state(module.clone(head=DXHead(1, input_skip=True)), params)


def test_leaves_are_placed_one_by_one():
    state = official_state()
    placed = {}

    def place(path, leaf):
        placed[path] = leaf.shape
        return leaf

    _, params = load_torch_state(state, "flux", place=place, **ROPE)
    assert len(placed) == len(jax.tree.leaves(params))
    assert placed[("single_blocks", "mlp_in", "kernel")] == (3, D, 4, D)


def test_shards_go_leaf_by_leaf_to_where_they_belong(tmp_path):
    """Of a network in bfloat16 over two files, the host never holds more than one leaf."""
    module = Flux(
        in_channels=4,
        hidden=128,
        num_heads=8,
        double_depth=6,
        single_depth=12,
        text_features=64,
        pooled_features=32,
        axes_dims_rope=(4, 6, 6),
    )
    names = {n: r.torch_shape for r in flux_rules(module) for n in r.torch_names}
    rng = np.random.default_rng(0)
    state = {n: rng.normal(size=s).astype(ml_dtypes.bfloat16) for n, s in names.items()}
    where = {n: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, n in enumerate(state)}
    for shard in set(where.values()):
        write_safetensors(tmp_path / shard, {n: state[n] for n in where if where[n] == shard})
    index = {"metadata": {}, "weight_map": where}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))

    largest = total = 0
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    checked = {}

    def place(path, leaf):
        nonlocal largest, total
        largest, total = max(largest, leaf.nbytes), total + leaf.nbytes
        if path == ("single_blocks", "mlp_in", "kernel"):
            # One layer: on a CPU the device may keep the host's own buffer, and count as the host.
            checked[path] = jax.device_put(leaf[7].copy(), device)
        return leaf.shape  # what it leaves on the host is counted, the device's copy is not

    weights = open_weights(tmp_path)
    tracemalloc.start()
    load_torch_state(weights, "flux", axes_dims_rope=(4, 6, 6), place=place)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    layer = max(np.prod(s) for s in names.values()) * 2
    assert largest < total / 5
    # The leaf, a layer on its way into it in two layouts, and bookkeeping.
    assert peak < largest + 4 * layer + 2**20 < total / 2
    ours = np.asarray(checked["single_blocks", "mlp_in", "kernel"])
    theirs = state["single_transformer_blocks.7.proj_mlp.weight"]
    np.testing.assert_array_equal(ours.reshape(128, -1), theirs.T)
