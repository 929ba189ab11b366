"""Official FLUX.2 weights: names and layouts in both directions, and errors that list misfits."""

import jax
import numpy as np
import pytest

from piflow_jax.convert import load_torch_state, to_torch_state
from piflow_jax.models.flux2 import Flux2
from piflow_jax.models.heads import DXHead, GMHead, VelocityHead
from tests.models.recorded import assert_bit_equal, random_state

D, ROPE = 32, {"axes_dims_rope": (4, 4, 4, 4)}
SIZES = {"in_channels": 4, "hidden": D, "num_heads": 2, "text_features": 12, **ROPE}
# Rows of output layers, and whether they have biases.
GM = {
    "proj_out_means": ((48, D), True),
    "proj_out_logweights": ((12, D), True),
    "proj_out_logstds.1": ((7, D), True),
    "proj_out_logstds.3": ((1, 7), True),
}


def official_state(outputs, guidance=True):
    """Random weights under official names, with other output layers."""
    diffusers = pytest.importorskip("diffusers")
    state = random_state(
        diffusers.Flux2Transformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=12,
            guidance_embeds=guidance,
            **ROPE,
        )
    )
    assert not any(name.endswith("bias") for name in state)
    del state["proj_out.weight"]
    draw = np.random.default_rng(1).normal
    for name, (shape, bias) in outputs.items():
        state[f"{name}.weight"] = draw(size=shape)
        state |= {f"{name}.bias": draw(size=shape[0])} if bias else {}
    return {name: np.asarray(array, np.float32) for name, array in state.items()}


@pytest.mark.parametrize(
    ("kind", "outputs", "head"),
    [
        ("flux2", {"proj_out": ((16, D), False)}, VelocityHead()),
        ("gm_flux2", GM, GMHead(3, 7)),
        ("dx_flux2", {"proj_out": ((80, D), False)}, DXHead(5)),
    ],
)
def test_round_trip_is_bit_exact(kind, outputs, head):
    for guidance in (True, False):
        state = official_state(outputs, guidance)
        module, params = load_torch_state(state, kind, double_depth=2, **ROPE)
        sizes = SIZES | {"double_depth": 2, "single_depth": 3, "guidance_embed": guidance}
        assert module == Flux2(**sizes, head=head)
        assert_bit_equal(to_torch_state(module, params), state)
        # The module is the one whose fresh parameters have these shapes.
        fresh = jax.eval_shape(module.init, jax.random.key(0), *module.example())
        assert jax.tree.map(np.shape, params) == jax.tree.map(lambda a: a.shape, fresh)


def test_layouts():
    """Fused layers are in pieces of the token's width; patches are channels first there."""
    state = official_state({"proj_out": ((16, D), False)})
    params = load_torch_state(state, "flux2", **ROPE)[1]["params"]
    fused = state["single_transformer_blocks.1.attn.to_qkv_mlp_proj.weight"]
    single = params["single_blocks"]
    np.testing.assert_array_equal(single["qkv_mlp"]["kernel"][1, :, 4], fused[4 * D : 5 * D].T)
    out = state["single_transformer_blocks.2.attn.to_out.weight"]
    np.testing.assert_array_equal(single["out"]["kernel"][2, 1], out[:, D : 2 * D].T)
    gate = state["transformer_blocks.1.ff_context.linear_in.weight"][: 3 * D]
    double = params["double_blocks"]["text_mlp_in"]["kernel"]
    np.testing.assert_array_equal(double[1, :, 0], gate.T)
    scale = state["norm_out.linear.weight"][:D]
    np.testing.assert_array_equal(params["final_modulation"]["kernel"][:, 0], scale.T)
    # Channel 3, row 0, column 1 of a patch.
    row = state["x_embedder.weight"][:, 3 * 4 + 1]
    np.testing.assert_array_equal(params["patch_embed"]["kernel"][1 * 4 + 3], row)


def test_misfits_are_listed():
    state = official_state(GM)
    del state["transformer_blocks.1.ff.linear_out.weight"]
    state["x_embedder.bias"] = np.zeros(D, np.float32)
    with pytest.raises(ValueError) as error:
        load_torch_state(state, "gm_flux2", **ROPE)
    assert "missing transformer_blocks.1.ff.linear_out.weight (32, 96)" in str(error.value)
    assert "unexpected x_embedder.bias (32,)" in str(error.value)
    teacher = official_state({"proj_out": ((16, D), False)})
    for given, kind, message in (
        (teacher, "gm_flux2", "weights of a teacher"),
        (teacher, "flux", "these are weights of a flux2, not of a flux"),
        (teacher, "dx_flux2", r"proj_out\.weight has one output .* weights of a teacher"),
        (official_state(GM), "flux2", "weights of a gm_flux2"),
        (
            official_state({"proj_out": ((80, D), False)}),
            "flux2",
            r"proj_out\.weight has 5 outputs .* a grid, dx_flux2",
        ),
        ({}, "flux2", "no size can be read"),
    ):
        with pytest.raises(ValueError, match=message):
            load_torch_state(given, kind, **ROPE)
