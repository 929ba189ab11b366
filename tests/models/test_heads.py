"""Output heads: initial values, blocked gradients, and the way from a teacher to a student."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax.convert import load_torch_state, to_torch_state
from piflow_jax.models import (
    ArcHead,
    DiT,
    DXHead,
    GMHead,
    VelocityHead,
    initialize_student,
    student_from_teacher,
)
from tests.golden_files import load
from tests.models.small import SMALL, apply, random_params, small_inputs

from_teacher = jax.jit(student_from_teacher, static_argnums=1)


def recorded_states(arrays, *prefixes):
    return [{n.removeprefix(p): a for n, a in arrays.items() if n.startswith(p)} for p in prefixes]


def assert_states_equal(actual, expected):
    assert set(actual) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(actual[name], array, err_msg=name)


def test_gm_student_from_teacher_reproduces_the_release():
    _, arrays = load("gmdit_init_from_teacher.npz")
    teacher_state, student_state = recorded_states(arrays, "sd_teacher/", "sd_student/")
    teacher, teacher_params = load_torch_state(teacher_state, "dit", num_heads=2, sample_size=8)
    student, recorded = load_torch_state(student_state, "gm_dit", num_heads=2, sample_size=8)
    # A fresh student shares with the recorded one only the random first layer of its logstd head.
    start = jax.tree.map(lambda a: jnp.full_like(a, 7.0), recorded)
    start["params"]["head"]["logstd_in"] = recorded["params"]["head"]["logstd_in"]
    noise = jnp.asarray(arrays["randn_bias"]).reshape(4, 4)
    params = initialize_student(student, start, teacher_params, noise, teacher=teacher)
    assert_states_equal(to_torch_state(student, params), student_state)


def test_dx_student_from_teacher_reproduces_the_release():
    _, arrays = load("dxdit_init_from_teacher.npz")
    teacher_state, student_state = recorded_states(arrays, "sd_teacher/", "sd_student/")
    _, teacher_params = load_torch_state(teacher_state, "dit", num_heads=2, sample_size=8)
    student, recorded = load_torch_state(student_state, "dx_dit", num_heads=2, sample_size=8)
    start = jax.tree.map(lambda a: jnp.full_like(a, 7.0), recorded)
    params = student_from_teacher(jax.random.key(0), student, start, teacher_params)
    assert_states_equal(to_torch_state(student, params), student_state)


def test_gm_student_starts_at_its_teacher():
    teacher = DiT(**SMALL)
    teacher_params = random_params(teacher)
    student = teacher.clone(head=GMHead(num_components=3, logstd_hidden=4))
    fresh = random_params(student)
    params = from_teacher(jax.random.key(3), student, fresh, teacher_params)
    inputs = small_inputs()
    velocity = apply(teacher, teacher_params, *inputs)
    output = apply(student, params, *inputs)
    offset = output.means - velocity[..., None, :]
    # One draw per (component, channel), the same everywhere.
    np.testing.assert_allclose(
        offset, jnp.broadcast_to(offset[:1, :1, :1], offset.shape), atol=1e-5
    )
    assert 0.01 < float(offset[0, 0, 0].std()) < 0.1
    np.testing.assert_allclose(output.logweights, -math.log(3), atol=1e-6)
    np.testing.assert_allclose(output.logstd, math.log(0.05), atol=1e-6)
    other = from_teacher(jax.random.key(4), student, fresh, teacher_params)
    assert (
        other["params"]["head"]["means"]["bias"] != params["params"]["head"]["means"]["bias"]
    ).all()


def test_arc_student_starts_at_its_teacher():
    """At the source every component has the teacher's velocity, but for the noise between them."""
    teacher = DiT(**SMALL)
    teacher_params = random_params(teacher)
    student = teacher.clone(head=ArcHead(num_components=3))
    shapes = jax.eval_shape(student.init, jax.random.key(1), *small_inputs())
    fresh = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    params = from_teacher(jax.random.key(3), student, fresh, teacher_params)
    x, t, labels = small_inputs()
    velocity = apply(teacher, teacher_params, x, t, labels)
    output = apply(student, params, x, t, labels)
    offset = output.means - velocity[..., None, :]
    np.testing.assert_allclose(
        offset, jnp.broadcast_to(offset[:1, :1, :1], offset.shape), atol=1e-5
    )
    assert 0.01 < float(offset[0, 0, 0].std()) < 0.1
    np.testing.assert_allclose(output.logweights, -math.log(3), atol=1e-6)
    # Rates do not come from the teacher: they are spread, so that components can part.
    expected = jnp.broadcast_to(jnp.asarray([-2.0, 0.0, 2.0]), output.rates.shape)
    np.testing.assert_allclose(output.rates, expected, atol=1e-6)


@pytest.mark.parametrize("num_grid", [1, 4])
def test_polynomial_student_starts_at_its_teacher(num_grid):
    teacher = DiT(**SMALL)
    teacher_params = random_params(teacher)
    student = teacher.clone(head=DXHead(num_grid=num_grid, input_skip=True))
    params = from_teacher(jax.random.key(3), student, random_params(student), teacher_params)
    x, t, labels = small_inputs()
    s = t[:, None, None, None]
    velocity = apply(teacher, teacher_params, x, t, labels)
    coefficients = x[..., None, :] - s[..., None] * apply(student, params, x, t, labels)
    # The policy's x_0 is sum_n (tau_src - tau)^n coefficient_n: only the constant may remain.
    np.testing.assert_allclose(coefficients[..., 0, :], x - s * velocity, atol=1e-5)
    np.testing.assert_allclose(coefficients[..., 1:, :], 0, atol=1e-6)


def test_velocity_student_is_its_teacher():
    teacher = DiT(**SMALL)
    teacher_params = random_params(teacher)
    params = from_teacher(jax.random.key(0), teacher, random_params(teacher, 0.1), teacher_params)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, teacher_params))


def test_student_shares_no_buffer_with_its_teacher():
    teacher = DiT(**SMALL)
    teacher_params = random_params(teacher)
    student = teacher.clone(head=GMHead(num_components=2, logstd_hidden=4))
    fresh = random_params(student)
    params = student_from_teacher(jax.random.key(0), student, fresh, teacher_params)
    # What donating the student's parameters to a training step does to their buffers.
    for leaf in jax.tree.leaves(params):
        leaf.delete()
    for leaf in jax.tree.leaves((teacher_params, fresh)):
        np.asarray(leaf)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"hidden": 32}, "hidden"),
        ({"depth": 2}, "depth"),
        ({"mlp_ratio": 2.0}, "mlp_ratio"),
        ({"num_classes": 4}, "num_classes"),
        ({"patch_size": 1}, "patch_size"),
        ({"num_heads": 4}, "num_heads"),
        ({"time_scale": 1000.0}, "time_scale"),
        ({"sample_size": 16}, "sample_size"),
        ({"head": DXHead(num_grid=2)}, "head"),
        ({"head": GMHead(num_components=2)}, "head"),
    ],
)
def test_teachers_of_another_size_are_refused(change, field):
    student = DiT(**SMALL)
    teacher = DiT(**(SMALL | change))
    shapes = [
        jax.eval_shape(m.init, jax.random.key(0), *small_inputs()) for m in (student, teacher)
    ]
    with pytest.raises(ValueError, match=rf"(?m)^(  )?{field}: "):
        student_from_teacher(jax.random.key(0), student, *shapes, teacher=teacher)


def test_parameters_of_another_network_are_named():
    student, teacher = DiT(**SMALL), DiT(**(SMALL | {"depth": 2}))
    shapes = [
        jax.eval_shape(m.init, jax.random.key(0), *small_inputs()) for m in (student, teacher)
    ]
    shapes[1]["params"]["extra"] = shapes[1]["params"].pop("class_embed")
    with pytest.raises(ValueError, match="teacher and student differ in") as raised:
        student_from_teacher(jax.random.key(0), student, *shapes)
    assert "  blocks/mlp_in/bias: student (" in str(raised.value)
    assert "  class_embed: student (" in str(raised.value)
    assert "  extra: student None, teacher (" in str(raised.value)


def test_fresh_student_has_the_release_statistics():
    case, arrays = load("gmdit_init_fresh.npz")
    (state,) = recorded_states(arrays, "sd_student/")
    module = DiT(
        patch_size=2,
        in_channels=4,
        hidden=16,
        num_heads=2,
        depth=case["num_layers"],
        num_classes=10,
        sample_size=8,
        head=GMHead(num_components=4, logstd_hidden=case["logstd_inner_dim"]),
    )
    inputs = jnp.ones((1, 8, 8, 4)), jnp.ones(1), jnp.zeros(1, int)
    ours = to_torch_state(module, jax.jit(module.init)(jax.random.key(0), *inputs))
    assert set(ours) == set(state)
    for name, recorded in state.items():
        assert ours[name].shape == recorded.shape, name
        if name == "proj_out_means.bias":
            continue
        if not recorded.any():
            assert not ours[name].any(), name
        elif "class_embedder" in name:
            assert abs(ours[name].std() / 0.02 - 1) < 0.2
        else:  # Xavier-uniform of the flattened matrix.
            bound = math.sqrt(6 / (recorded[0].size + len(recorded)))
            for array in (recorded, ours[name]):
                assert 0.85 * bound < np.abs(array).max() <= bound, name
                assert abs(array.std() / (bound / math.sqrt(3)) - 1) < 0.2, name
    bias = ours["proj_out_means.bias"].reshape(4, 16)
    np.testing.assert_array_equal(bias, np.broadcast_to(bias[:1], bias.shape))
    np.testing.assert_allclose(
        state["proj_out_means.bias"].reshape(4, 16)[0], 0.1 * arrays["randn_fresh"], rtol=1e-6
    )


def test_fresh_means_bias_has_std_a_tenth():
    head = GMHead(num_components=64, constant_logstd=0.0)
    module = DiT(**SMALL, head=head)
    params = jax.jit(module.init)(jax.random.key(0), *small_inputs())
    bias = params["params"]["head"]["means"]["bias"]
    assert abs(float(bias.std()) / 0.1 - 1) < 0.2
    assert set(params["params"]["head"]) == {"means", "logweights"}


@pytest.mark.parametrize("head", [VelocityHead(), DXHead(num_grid=2)])
def test_fresh_networks_predict_zero(head):
    module = DiT(**SMALL, head=head)
    params = jax.jit(module.init)(jax.random.key(0), *small_inputs())
    assert not apply(module, params, *small_inputs()).any()


def test_logstd_sends_no_gradient_into_the_embedder():
    module = DiT(**SMALL, head=GMHead(num_components=2, logstd_hidden=4))
    params = random_params(module)

    def gradient(pick):
        def loss(p):
            return pick(module.apply(p, *small_inputs())).sum()

        return jax.jit(jax.grad(loss))(params)["params"]

    through_logstd = gradient(lambda out: out.logstd)
    head = through_logstd.pop("head")
    assert all(a.any() for a in jax.tree.leaves([head["logstd_in"], head["logstd_out"]]))
    assert not any(a.any() for a in jax.tree.leaves(through_logstd))
    assert gradient(lambda out: out.means)["class_embed"].any()


def test_log_weights_are_normalised():
    module = DiT(**SMALL, head=GMHead(num_components=4, constant_logstd=-1.25))
    output = apply(module, random_params(module), *small_inputs())
    assert output.means.shape == (3, 4, 4, 4, 3)
    assert output.logweights.shape == (3, 4, 4, 4)
    np.testing.assert_allclose(jnp.exp(output.logweights).sum(-1), 1, atol=1e-6)
    np.testing.assert_array_equal(output.logstd, np.full(3, -1.25, np.float32))
