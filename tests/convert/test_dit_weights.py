"""Official weight names and layouts, in and out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax.convert import load_torch_state, to_torch_state
from piflow_jax.convert.rules import Rule, export_state, import_state, linear
from piflow_jax.models import DiT, DXHead, GMHead, VelocityHead
from piflow_jax.models.layers import position_table
from tests.golden_files import load

SIZES = {"num_heads": 2, "sample_size": 8}


def recorded(name, prefix="sd/"):
    return {n.removeprefix(prefix): a for n, a in load(name)[1].items() if n.startswith(prefix)}


def assert_bit_equal(actual, expected):
    assert set(actual) == set(expected)
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype, name
        assert actual[name].shape == array.shape, name
        assert actual[name].tobytes() == np.ascontiguousarray(array).tobytes(), name


@pytest.mark.parametrize(
    ("name", "model", "extra"),
    [
        ("dit_teacher.npz", "dit", {}),
        ("gmdit_student.npz", "gm_dit", {}),
        ("gmdit_student_constant_logstd.npz", "gm_dit", {"constant_logstd": -1.25}),
        ("dxdit_student.npz", "dx_dit", {}),
    ],
)
def test_round_trip_is_bit_exact(name, model, extra):
    state = recorded(name)
    module, params = load_torch_state(state, model, **SIZES, **extra)
    assert_bit_equal(to_torch_state(module, params), state)
    # The module is the one whose fresh parameters have these shapes.
    inputs = jnp.ones((1, 8, 8, 4)), jnp.ones(1), jnp.zeros(1, int)
    fresh = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda a: a.shape, fresh)


def test_float64_stays_float64(x64):
    state = {n: a.astype(np.float64) + 1e-12 for n, a in recorded("gmdit_student.npz").items()}
    module, params = load_torch_state(state, "gm_dit", **SIZES)
    assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(params))
    assert_bit_equal(to_torch_state(module, params), state)


def test_sizes_are_read_off_the_shapes():
    module, _ = load_torch_state(
        recorded("gmdit_student.npz"), "gm_dit", num_heads=4, sample_size=16, time_scale=1000.0
    )
    assert module == DiT(
        patch_size=2,
        in_channels=4,
        hidden=16,
        num_heads=4,
        depth=2,
        mlp_ratio=4.0,
        num_classes=10,
        sample_size=16,
        time_scale=1000.0,
        head=GMHead(num_components=4, logstd_hidden=16),
    )
    module, _ = load_torch_state(recorded("dxdit_student.npz"), "dx_dit", **SIZES, num_grid=5)
    assert module.head == DXHead(num_grid=5)


def test_fused_and_stacked_layouts():
    state = recorded("dit_teacher.npz")
    _, params = load_torch_state(state, "dit", **SIZES)
    blocks = params["params"]["blocks"]
    for i in range(2):
        for j, which in enumerate("qkv"):
            weight = state[f"transformer_blocks.{i}.attn1.to_{which}.weight"]
            np.testing.assert_array_equal(blocks["qkv"]["kernel"][i, :, j], weight.T)
        weight = state[f"transformer_blocks.{i}.norm1.linear.weight"]
        np.testing.assert_array_equal(blocks["modulation"]["kernel"][i, :, 1], weight[16:32].T)
    patch = params["params"]["patch_embed"]["kernel"].reshape(2, 2, 4, 16)
    np.testing.assert_array_equal(patch[1, 0, 3], state["pos_embed.proj.weight"][:, 3, 1, 0])


def test_diffusers_checkpoint():
    name = "dit_convert_diffusers_checkpoint.npz"
    module, params = load_torch_state(recorded(name, "sd_diffusers/"), "dit", **SIZES)
    assert module.head == VelocityHead()
    assert_bit_equal(to_torch_state(module, params), recorded(name, "sd_converted/"))


def test_gmdit_v1_with_one_gaussian():
    arrays = load("dit_convert_gmdit_v1_1gaussian.npz")[1]
    state = recorded("dit_teacher.npz")
    v1 = state | {f"proj_out_2.{k}": arrays[f"v1_proj_out_2.{k}"] for k in ("weight", "bias")}
    module, params = load_torch_state(v1, "dit", **SIZES)
    back = to_torch_state(module, params)
    for k in ("weight", "bias"):
        np.testing.assert_array_equal(back[f"proj_out_2.{k}"], arrays[f"teacher_proj_out_2.{k}"])
    # The same file records what a four-component student makes of these rows.
    student = GMHead(num_components=4, constant_logstd=0.0)
    head = student.from_velocity(
        {"logweights": {}},
        params["params"]["head"]["output"],
        channels=4,
        noise=jnp.asarray(arrays["randn_bias"]).reshape(4, 4),
    )
    np.testing.assert_array_equal(
        head["means"]["kernel"].T, arrays["student_proj_out_means.weight"]
    )
    np.testing.assert_array_equal(head["means"]["bias"], arrays["student_proj_out_means.bias"])


def test_all_misfits_are_listed():
    state = recorded("dit_teacher.npz")
    del state["transformer_blocks.1.attn1.to_k.bias"], state["proj_out_1.weight"]
    state["transformer_blocks.0.attn1.to_q.weight"] = np.zeros((16, 8), np.float32)
    state["surplus"] = np.zeros(3, np.float32)
    with pytest.raises(ValueError) as error:
        load_torch_state(state, "dit", **SIZES)
    for part in (
        "missing transformer_blocks.1.attn1.to_k.bias (16,)",
        "missing proj_out_1.weight (32, 16)",
        "transformer_blocks.0.attn1.to_q.weight has shape (16, 8), expected (16, 16)",
        "unexpected surplus (3,)",
    ):
        assert part in str(error.value)


def test_position_table_is_dropped_only_if_it_is_ours():
    state = recorded("dit_teacher.npz")
    table = position_table(16, 4, 4, 4).reshape(1, 16, 16)
    _, params = load_torch_state(state | {"pos_embed.pos_embed": table}, "dit", **SIZES)
    assert "pos_embed" not in params["params"]
    with pytest.raises(ValueError, match=r"pos_embed\.pos_embed"):
        load_torch_state(state | {"pos_embed.pos_embed": table[:, ::-1]}, "dit", **SIZES)


@pytest.mark.parametrize(
    ("name", "model", "sizes", "message"),
    [
        ("dit_teacher.npz", "sit", {}, "gm_dit"),
        ("dit_teacher.npz", "dit", {"depth": 3}, "depth: given 3"),
        ("dit_teacher.npz", "dit", {"width": 3}, "unknown sizes.*width"),
        ("dxdit_student.npz", "dx_dit", {"num_grid": 4}, "num_grid: given 4"),
        (
            "dxdit_student.npz",
            "dit",
            {},
            r"proj_out_2\.bias has 5 .*a student that predicts a grid",
        ),
        ("dit_teacher.npz", "gm_dit", {}, r"missing proj_out_logweights\.bias"),
        ("gmdit_student.npz", "dit", {}, r"missing proj_out_2\.weight"),
        ("gmdit_student_constant_logstd.npz", "gm_dit", {}, "constant_logstd must be given"),
        ("gmdit_student.npz", "gm_dit", {"constant_logstd": 0.0}, "has a logstd head"),
    ],
)
def test_errors(name, model, sizes, message):
    with pytest.raises(ValueError, match=message):
        load_torch_state(recorded(name), model, **SIZES, **sizes)


def test_networks_without_a_counterpart_are_refused():
    state = recorded("dxdit_student.npz")
    module, params = load_torch_state(state, "dx_dit", **SIZES)
    with pytest.raises(ValueError, match="input_skip"):
        to_torch_state(module.clone(head=DXHead(num_grid=5, input_skip=True)), params)
    with pytest.raises(ValueError, match="Dense"):
        import flax.linen as nn

        to_torch_state(nn.Dense(3), params)
    with pytest.raises(ValueError, match="head/means"):
        to_torch_state(module.clone(head=GMHead(num_components=5, constant_logstd=0.0)), params)


def test_rules_are_their_own_inverse():
    rules = [
        *linear(("{layer}.a", "{layer}.b"), ("fused",), 3, 2, depth=2),
        *linear("{layer}.m", ("pieces",), 3, 2, pieces=4, depth=2),
        Rule(("rows",), ("rows",), "(k c p) i -> i (p k c)", {"k": 2, "c": 3, "p": 4, "i": 5}),
    ]
    draw = np.random.default_rng(0).normal
    names = {name: rule.torch_shape for rule in rules for name in rule.torch_names}
    assert names["0.m.weight"] == (12, 2) and names["rows"] == (24, 5)
    state = {name: draw(size=shape) for name, shape in names.items()}
    params = import_state(state, rules, lambda path, leaf: leaf)
    assert params["fused"]["kernel"].shape == (2, 2, 2, 3)
    assert params["pieces"]["bias"].shape == (2, 4, 3)
    assert_bit_equal(export_state(params, rules), state)
