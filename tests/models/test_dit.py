"""The DiT against recorded evaluations of the released networks, and against itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax.convert import load_torch_state, to_torch_state
from piflow_jax.flow.policies import GMOutput
from piflow_jax.models import DiT, DXHead, GMHead, VelocityHead, dit, layers
from tests.golden_files import load
from tests.models.small import SMALL, apply, random_params, small_inputs

NETWORKS = {
    "dit_teacher.npz": "dit",
    "gmdit_student.npz": "gm_dit",
    "gmdit_student_constant_logstd.npz": "gm_dit",
    "dxdit_student.npz": "dx_dit",
}


def channels_last(array):
    """Moves a recorded output to our layout: `[B, C, H, W]`, `[B, N, C, H, W]`, logstd `[B]`."""
    if array.ndim == 4:
        return array.transpose(0, 2, 3, 1)
    if array.shape[1:] == (1, 1, 1, 1):
        return array.reshape(-1)
    return array.transpose(0, 3, 4, 1, 2)


def as_dict(output, suffix=""):
    """Our output under the recorded names, in our layout."""
    if not isinstance(output, GMOutput):
        return {f"out{suffix}": output}
    return {
        f"means{suffix}": output.means,
        f"logweights{suffix}": output.logweights[..., None],
        f"logstds{suffix}": output.logstd,
    }


def build(name, dtype):
    params, arrays = load(name)
    state = {n[3:]: a.astype(dtype) for n, a in arrays.items() if n.startswith("sd/")}
    sizes = {"constant_logstd": params["constant_logstd"]} if "constant_logstd" in params else {}
    module, variables = load_torch_state(
        state,
        NETWORKS[name],
        num_heads=params["num_attention_heads"],
        sample_size=params["sample_size"],
        **sizes,
    )
    t, labels = jnp.asarray(arrays["t"], dtype), jnp.asarray(arrays["class_labels"])
    return module, variables, arrays, t, labels


def use_recorded_features(monkeypatch, arrays):
    """Replaces the float32 sinusoids by the recorded ones.

    At t = 1000 radians one float32 rounding of a frequency moves them by 6e-5 (1e-5 at the output),
    so only with the same sinusoids can the rest of the network be compared at 1e-9.
    """
    recorded = jnp.asarray(arrays["inter_time_proj"])
    monkeypatch.setattr(dit, "time_features", lambda t: recorded)


def assert_close(actual, expected, tolerance):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("name", NETWORKS)
def test_float32_outputs(name):
    module, variables, arrays, t, labels = build(name, np.float32)
    x = jnp.asarray(channels_last(arrays["x"]))
    outputs = as_dict(apply(module, variables, x, t, labels), "_float32")
    for key, value in outputs.items():
        assert value.dtype == jnp.float32
        assert_close(value, channels_last(arrays[key]), 2e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_float64_outputs_and_intermediates(name, x64, monkeypatch):
    module, variables, arrays, t, labels = build(name, np.float64)
    tolerance = 1e-9
    if "inter_time_proj" in arrays:
        use_recorded_features(monkeypatch, arrays)
    else:  # The sinusoids were not recorded: allow what they are worth (measured by the recorder).
        tolerance = 3 * float(arrays["means_change_if_time_embedding_float64"])
    x = jnp.asarray(channels_last(arrays["x"]), jnp.float64)
    run = jax.jit(lambda *args: module.apply(*args, mutable=["intermediates"]))
    outputs, extra = run(variables, x, t, labels)
    for key, value in as_dict(outputs).items():
        assert value.dtype == jnp.float64
        assert_close(value, channels_last(arrays[key]), tolerance)
    if "inter_cond_emb" not in arrays:
        return
    extra = extra["intermediates"]
    assert_close(extra["embedded"][0], arrays["inter_pos_embed_out"], 1e-12)
    assert_close(extra["embedding"][0], arrays["inter_cond_emb"], 1e-12)
    blocks = extra["blocks"]["tokens"][0]
    assert blocks.shape[0] == module.depth
    for i, block in enumerate(blocks):
        assert_close(block, arrays[f"inter_block{i}_out"], 1e-9)


@pytest.mark.parametrize("name", ["dit_teacher.npz", "gmdit_student.npz"])
def test_other_resolution(name, x64, monkeypatch):
    module, variables, arrays, t, labels = build(name, np.float64)
    use_recorded_features(monkeypatch, arrays)
    x = jnp.asarray(channels_last(arrays["x_alt"]), jnp.float64)
    assert x.shape[1] != x.shape[2]
    outputs = jax.jit(module.apply)(variables, x, t, labels)
    for key, value in as_dict(outputs, "_alt").items():
        assert_close(value, channels_last(arrays[key]), 1e-9)


@pytest.mark.parametrize("name", ["dit_teacher.npz", "gmdit_student.npz"])
def test_parameter_gradients(name, x64, monkeypatch):
    module, variables, arrays, t, labels = build(name, np.float64)
    use_recorded_features(monkeypatch, arrays)
    x = jnp.asarray(channels_last(arrays["x"]), jnp.float64)

    def loss(variables):
        outputs = as_dict(module.apply(variables, x, t, labels))
        return sum((v * channels_last(arrays[f"w_{k}"])).sum() for k, v in outputs.items())

    gradients = to_torch_state(module, jax.jit(jax.grad(loss))(variables))
    recorded = {n[8:]: a for n, a in arrays.items() if n.startswith("grad_sd/")}
    assert set(gradients) == set(recorded)
    for key, gradient in gradients.items():
        # Keys' bias has no effect on a softmax over keys: its recorded gradient is rounding.
        atol = 1e-12 if key.endswith("to_k.bias") else 1e-9 * np.abs(recorded[key]).max()
        np.testing.assert_allclose(gradient, recorded[key], rtol=0, atol=atol, err_msg=key)


def test_time_features():
    _, arrays = load("dit_teacher.npz")
    features = layers.time_features(jnp.asarray(arrays["t"]))
    # The largest angle is 1000: float32 resolves it, and its frequency, to 3e-5 each.
    np.testing.assert_allclose(features, arrays["inter_time_proj"], atol=7e-5)
    np.testing.assert_allclose(features[2], arrays["inter_time_proj"][2], atol=1e-6)  # t = 0.6


def test_time_features_stay_float32(x64):
    assert layers.time_features(jnp.asarray([0.3, 700.0], jnp.float64)).dtype == jnp.float32


def test_position_table():
    _, arrays = load("dit_teacher.npz")
    table = layers.position_table(16, 4, 4, 4).reshape(1, 16, 16)
    np.testing.assert_array_equal(table, arrays["pos_embed_buffer"])


def test_patches_round_trip():
    x = jnp.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)
    patches = layers.patchify(x, 2)
    assert patches.shape == (2, 2, 3, 12)
    np.testing.assert_array_equal(patches[0, 0, 1], x[0, :2, 2:4].reshape(-1))
    np.testing.assert_array_equal(layers.unpatchify(patches, 2, (3,)), x)


def value_and_gradient(module, params):
    inputs = small_inputs()
    out, pull = jax.vjp(lambda p: module.apply(p, *inputs), params)
    return out, pull(jax.tree.map(jnp.cos, out))[0]


def assert_trees_close(actual, expected, tolerance):
    jax.tree.map(lambda a, b: assert_close(a, np.asarray(b), tolerance), actual, expected)


@pytest.mark.parametrize(
    "options", [{"scan_unroll": 3}, {"scan_unroll": 2}, {"remat": "full"}, {"remat": "dots"}]
)
def test_same_network_however_it_is_run(options):
    plain = DiT(**SMALL, head=GMHead(num_components=2, logstd_hidden=4))
    params = random_params(plain)
    expected = jax.jit(lambda p: value_and_gradient(plain, p))(params)
    variant = plain.clone(**options)
    actual = jax.jit(lambda p: value_and_gradient(variant, p))(params)
    assert_trees_close(actual, expected, 2e-5)


def test_scan_equals_a_loop_over_blocks():
    module = DiT(**SMALL)
    params = random_params(module)
    x, t, labels = small_inputs()
    run = jax.jit(lambda *args: module.apply(*args, mutable=["intermediates"]))
    extra = run(params, x, t, labels)[1]["intermediates"]
    tokens, conditioning = extra["embedded"][0], jax.nn.silu(extra["embedding"][0])
    block = jax.jit(dit.DiTBlock(num_heads=2, mlp_hidden=64).apply)
    for i in range(module.depth):
        layer = jax.tree.map(lambda a, i=i: a[i], params["params"]["blocks"])
        tokens, _ = block({"params": layer}, tokens, conditioning)
        assert_close(extra["blocks"]["tokens"][0][i], np.asarray(tokens), 1e-5)


def test_remat_saves_less():
    module = DiT(**SMALL)
    params, inputs = random_params(module), small_inputs()

    def products(module):
        jaxpr = jax.make_jaxpr(jax.grad(lambda p: module.apply(p, *inputs).sum()))(params)
        return str(jaxpr).count("dot_general")

    counts = [products(module.clone(remat=name)) for name in ("none", "dots", "full")]
    assert counts[0] <= counts[1] < counts[2]


@pytest.mark.parametrize(
    "head", [VelocityHead(), GMHead(num_components=2, logstd_hidden=4), DXHead(num_grid=3)]
)
def test_bfloat16_is_close_and_leaves_in_float32(head):
    full = DiT(**SMALL, head=head)
    params = random_params(full, scale=0.1)
    half = full.clone(dtype=jnp.bfloat16)
    expected = apply(full, params, *small_inputs())
    actual = apply(half, params, *small_inputs())
    assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(actual))
    assert_trees_close(actual, expected, 0.05)
    different = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), actual, expected)
    assert max(jax.tree.leaves(different)) > 1e-4  # It did compute in bfloat16.


def test_bfloat16_parameters_leave_in_float32():
    module = DiT(**SMALL, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    params = jax.jit(module.init)(jax.random.key(0), *small_inputs())
    assert all(a.dtype == jnp.bfloat16 for a in jax.tree.leaves(params))
    assert apply(module, params, *small_inputs()).dtype == jnp.float32


@pytest.mark.parametrize(
    ("stored", "computed", "ordered"),
    [("bfloat16", "bfloat16", True), ("float32", "float32", True), ("float32", "bfloat16", False)],
)
def test_only_kernels_that_are_not_narrowed_keep_their_order(stored, computed, ordered):
    kernel = jax.ShapeDtypeStruct((8, 3, 16), stored)
    program = jax.make_jaxpr(lambda kernel: layers.in_place(kernel, computed))(kernel)
    assert ("layout_constraint" in str(program)) == ordered


def test_time_scale():
    module = DiT(**SMALL)
    params = random_params(module)
    x, t, labels = small_inputs()
    scaled = apply(module.clone(time_scale=1000.0), params, x, t, labels)
    assert_close(apply(module, params, x, 1000.0 * t, labels), np.asarray(scaled), 1e-6)


def test_null_label_has_its_own_row_and_others_are_caught():
    module = DiT(**SMALL)
    params = random_params(module)
    assert params["params"]["class_embed"].shape[0] == SMALL["num_classes"] + 1
    x, t, _ = small_inputs()
    out = apply(module, params, x, t, jnp.asarray([5, 5, 6]))
    assert jnp.isfinite(out[:2]).all() and jnp.isnan(out[2]).all()


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({"remat": "some"}, (2, 4, 4, 3), "dots_no_batch"),
        ({"num_heads": 3}, (2, 4, 4, 3), "num_heads 3"),
        ({}, (2, 4, 4, 1), "x must be"),
        ({}, (2, 5, 4, 3), "patches of 2"),
        ({}, (1, 4, 4, 3), "B = 1"),
    ],
)
def test_errors(options, shape, message):
    module = DiT(**(SMALL | options))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            module.init, jax.random.key(0), jnp.ones(shape), jnp.ones(2), jnp.ones(2, int)
        )
