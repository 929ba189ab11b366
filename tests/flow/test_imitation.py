"""The pi-ID loss against the reference's vectors: values, gradients, intermediate states."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax.flow.imitation import (
    imitation_loss,
    intervals_from_uniforms,
    sample_intervals,
    uniforms_by_density,
    window_size,
)
from piflow_jax.flow.policies import DXPolicy, GMFlowPolicy, GMOutput
from piflow_jax.flow.schedule import TimeWarp
from tests import golden_files
from tests.golden_files import mixture_last, sites_last


@functools.cache
def compiled_loss(
    policy_kind, mode, total_substeps, window_substeps, eps, policy_eps, mixing, gain, longest
):
    """One jitted loss for all cases of a structure; shifts, ratios and sizes are arguments."""

    def loss(output, a, shift, ratio, policy_segment):
        warp = TimeWarp(shift)
        segment, x_src = a["segment_size"], a["x_t_src"]
        window = window_size(segment, window_substeps, total_substeps)
        intervals = intervals_from_uniforms(
            a["student_uniforms"], a["teacher_uniforms"], segment, window, ratio if mixing else 0
        )

        def teacher(x, sigma):
            drift = jnp.einsum("oc,b...c->b...o", a["teacher_A"], x)
            sigma = jnp.reshape(sigma, (-1,) + (1,) * (x.ndim - 1))
            offset = jnp.reshape(a["teacher_b"], (1,) * (x.ndim - 1) + (-1,))
            return gain * jnp.tanh(drift) + 0.25 * x + sigma * offset

        detached = None
        if policy_kind == "DX":
            policy = DXPolicy.create(
                output, x_src, a["sigma_t_src"], policy_segment, shift, mode, policy_eps
            )
        else:
            policy = GMFlowPolicy.create(output, x_src, a["sigma_t_src"], policy_eps)
            detached = policy.drop(a["dropout_mask"])
        return imitation_loss(
            policy,
            teacher,
            x_src,
            a["raw_t_src"],
            segment,
            intervals,
            warp,
            detached=detached,
            total_substeps=total_substeps,
            window_substeps=window_substeps,
            longest_segment=longest,
            loss_scale=3.0,
            eps=eps,
        )

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def run_case(params, a, dtype):
    """The loss, its gradients and what it saw, with the reference's draws and teacher."""

    def cast(value):
        return jnp.asarray(value, dtype)

    names = ("student_uniforms", "teacher_uniforms", "raw_t_src", "sigma_t_src")
    inputs = {name: cast(a[name]) for name in (*names, "teacher_A", "teacher_b")}
    inputs["x_t_src"] = cast(sites_last(a["x_t_src"]))
    inputs["segment_size"] = jnp.broadcast_to(cast(a["segment_size"]), a["raw_t_src"].shape)
    if params["policy"] == "DX":
        output = cast(mixture_last(a["denoising_output"]))
    else:
        output = GMOutput(
            cast(mixture_last(a["means"])),
            cast(mixture_last(a["logweights"])[..., 0]),
            cast(a["logstds"].reshape(-1)),
        )
        shape = a["means"].shape[:2]
        inputs["dropout_mask"] = jnp.asarray(a.get("dropout_mask", np.zeros(shape)), bool)
        inputs["dropout_mask"] = inputs["dropout_mask"].reshape(shape)
    # A ratio that is an array is mixed even where it is zero; a Python zero is not.
    ratio = params["teacher_ratio"]
    loss = compiled_loss(
        params["policy"],
        params.get("mode"),
        params["total_substeps"],
        params["window_substeps"],
        params["eps"],
        params["policy_eps"],
        not (isinstance(ratio, int | float) and ratio == 0),
        params["teacher_gain"],
        params.get("longest_segment", 1.0),
    )
    return loss(
        output,
        inputs,
        cast(params["shift"]),
        cast(ratio),
        cast(params.get("policy_segment_size", 1.0)),
    )


@pytest.mark.parametrize("name", golden_files.names("piid_"))
def test_matches_reference(name, x64):
    params, a = golden_files.load(name)
    (loss, aux), grads = run_case(params, a, np.float64)
    # The reference rounds a Python-float segment to float32 (see its notes).
    rtol = 1e-7 if params["segment_size_argument"] == "python float" else 1e-9
    np.testing.assert_allclose(loss, a["loss"], rtol=rtol)
    np.testing.assert_allclose(aux.tau_dst, a["raw_t_dst"], rtol=0, atol=max(rtol, 1e-12))
    timesteps = params["num_timesteps"]
    np.testing.assert_allclose(aux.sigma * timesteps, a["teacher_t"], rtol=10 * rtol)
    shape = (-1, *aux.prediction.shape[2:])
    pairs = [
        (aux.x_dst, sites_last(a["x_t_dst"])),
        (aux.x, sites_last(a["teacher_x_t"], 2)),
        (aux.prediction.reshape(shape), sites_last(a["u_t_pred"])),
        (aux.target.reshape(shape), sites_last(a["u_t"])),
    ]
    if params["policy"] == "DX":
        pairs.append((grads, mixture_last(a["grad_denoising_output"])))
    else:
        pairs += [
            (grads.means, mixture_last(a["grad_means"])),
            (grads.logweights, mixture_last(a["grad_logweights"])[..., 0]),
            (grads.logstd, a["grad_logstds"].reshape(-1)),
        ]
    for found, expected in pairs:
        scale = np.abs(expected).max()
        np.testing.assert_allclose(found, expected, rtol=0, atol=10 * rtol * scale)


def test_a_loop_as_long_as_the_longest_segment_is_enough(x64):
    """Half of raw time, of which the loop then has 64 substeps instead of 128."""
    params, a = golden_files.load("piid_gm_21.npz")
    assert params["teacher_ratio"] == 1 and np.max(a["segment_size"]) == 0.5
    short = run_case(params | {"longest_segment": 0.5}, a, np.float64)
    whole = run_case(params, a, np.float64)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12), short, whole)
    # The loop is as long as it says: one that is too short for the segment has other steps.
    (loss, _), _ = run_case(params | {"longest_segment": 0.25}, a, np.float64)
    assert abs(loss - whole[0][0]) > 1e-6 * abs(loss)


@pytest.mark.parametrize("name", golden_files.names("piid_")[::5])
def test_float32_matches_reference(name):
    params, a = golden_files.load(name)
    (loss, aux), _ = run_case(params, a, np.float32)
    np.testing.assert_allclose(loss, a["loss"], rtol=2e-4)
    expected = sites_last(a["x_t_dst"])
    np.testing.assert_allclose(aux.x_dst, expected, rtol=0, atol=2e-4 * np.abs(expected).max())


@pytest.mark.parametrize("window", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_python_zero_and_traced_zero_mixing_agree(window, x64):
    """The shortcut without teacher intervals computes the same loss and gradient."""
    params, a = golden_files.load("piid_gm_00.npz")
    params = params | {"window_substeps": window, "teacher_ratio": 0}
    (loss, _), grads = run_case(params, a, np.float64)
    params = params | {"teacher_ratio": jnp.zeros(())}
    (traced_loss, _), traced_grads = run_case(params, a, np.float64)
    np.testing.assert_allclose(loss, traced_loss, rtol=1e-12)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-15), grads, traced_grads
    )


def test_weights_are_those_of_the_errors_and_times(x64):
    """In NumPy, from what the loss saw; the gradient takes the adaptive weight for a constant."""
    x = jax.random.normal(jax.random.key(0), (3, 5, 2))
    tau = jnp.asarray([1.0, 0.9, 0.7])
    intervals = intervals_from_uniforms(
        jnp.asarray([[0.1, 0.8], [0.3, 0.6], [0.2, 0.9]]), jnp.zeros((3, 1)), tau, 0 * tau, 0
    )

    @functools.partial(jax.jit, static_argnames=("adaptive_power", "time_power"))
    def loss(output, intervals, **weights):
        policy = DXPolicy.create(output, x, tau)
        return imitation_loss(
            policy,
            lambda x, t: jnp.sin(3 * x) * jnp.reshape(1 + t, (-1, 1, 1)),
            x,
            tau,
            tau,
            intervals,
            TimeWarp(2.0),
            total_substeps=4,
            loss_scale=2.0,
            **weights,
        )

    output = jax.random.normal(jax.random.key(1), (3, 5, 4, 2))
    grads = jax.grad(loss, has_aux=True)
    plain, aux = loss(output, intervals)
    errors = np.mean(np.square(aux.prediction - aux.target), axis=(2, 3))
    np.testing.assert_allclose(plain, np.mean(errors), rtol=1e-12)
    weighted, _ = loss(output, intervals, adaptive_power=0.5, time_power=2.0)
    weights = (errors + 1e-3) ** -0.5 * np.square(aux.sigma)
    np.testing.assert_allclose(weighted, np.mean(weights * errors), rtol=1e-12)
    # A sample's states share its output: with one weight for both, gradients are in proportion.
    one = intervals.replace(student=intervals.student[:, :1], teacher=intervals.teacher[:, :1])
    _, aux = loss(output, one)
    errors = np.mean(np.square(aux.prediction - aux.target), axis=(2, 3))[0]
    found, expected = grads(output, one, adaptive_power=1.0)[0], grads(output, one)[0]
    np.testing.assert_allclose(
        found, expected / np.reshape(errors + 1e-3, (-1, 1, 1, 1)), rtol=1e-9, atol=1e-14
    )


@pytest.mark.parametrize("power", [0, 1.0, 2.0])
def test_raw_times_of_states_have_the_density_of_their_power(x64, power):
    """Its distribution function `(tau^(q+1) - a^(q+1)) / (b^(q+1) - a^(q+1))` is the uniform's."""
    u = np.linspace(0, 1, 7)[None, :] * np.ones((3, 1))
    start, size, window = np.array([[1.0, 0.9, 0.5], [1.0, 0.4, 0.5], [0.0, 0.1, 0.0]])
    moved = uniforms_by_density(jnp.asarray(u), start, size - window, power)
    intervals = intervals_from_uniforms(moved, jnp.zeros((3, 6)), size, window, 0)
    tau = start[:, None] - np.cumsum(intervals.student, axis=1)
    a, b = (start - size + window)[:, None] ** (power + 1), start[:, None] ** (power + 1)
    np.testing.assert_allclose((tau ** (power + 1) - a) / (b - a), 1 - u, atol=1e-12)
    if power:  # no room at all leaves all states at the start
        assert np.all(uniforms_by_density(jnp.asarray(u), start, 0 * start, power) == 0)


def test_states_by_density_count_as_the_weight_does_on_average(x64):
    """Over all uniforms of one state: the density `t^q` counts as the weight `(q + 1) t^q`."""
    count = 4000
    u = (jnp.arange(count)[:, None] + 0.5) / count
    tau, x = jnp.ones(count), jnp.broadcast_to(jnp.asarray([[0.3, -0.8]]), (count, 2))
    output = jnp.broadcast_to(jnp.asarray([[[0.5, 1.0], [-0.2, 0.4]]]), (count, 2, 2))

    @functools.partial(jax.jit, static_argnames=("power", "weight"))
    def loss(power, weight):
        moved = uniforms_by_density(u, tau, tau, power)
        intervals = intervals_from_uniforms(moved, jnp.zeros((count, 0)), tau, 0 * tau, 0)
        return imitation_loss(
            DXPolicy.create(output, x, tau),
            lambda x, t: jnp.sin(3 * x) * jnp.reshape(1 + t, (-1, 1)),
            x,
            tau,
            tau,
            intervals,
            TimeWarp(1.0),
            total_substeps=64,
            time_power=weight,
        )[0]

    plain, weighted, drawn = loss(0.0, 0.0), loss(0.0, 1.0), loss(1.0, 0.0)
    np.testing.assert_allclose(drawn, 2 * weighted, rtol=2e-3)
    assert abs(float(drawn / plain) - 1) > 0.05


def test_intervals_stay_inside_the_segment():
    segment = jnp.asarray([1.0, 0.5, 0.2])
    window = window_size(segment, 3, 128)
    intervals = sample_intervals(jax.random.key(0), 4, segment, window, 0.3)
    assert intervals.student.shape == intervals.teacher.shape == (3, 4)
    assert np.all(intervals.student >= 0) and np.all(intervals.teacher >= 0)
    walked = intervals.student.sum(-1) + intervals.teacher.sum(-1)
    assert np.all(walked <= segment - window + 1e-6)
    np.testing.assert_allclose(intervals.teacher.sum(-1), 0.3 * (segment - window), rtol=1e-5)


def test_no_states_are_refused():
    with pytest.raises(ValueError, match="num_states must be at least 1"):
        sample_intervals(jax.random.key(0), 0, jnp.ones((1,)), jnp.zeros((1,)), 0.0)


def test_second_order_substeps_are_near_the_limit_of_many(x64):
    """States, mean velocities and the end, against 4096 Euler substeps: orders 1 and 2."""
    x = jax.random.normal(jax.random.key(0), (3, 5, 2))
    tau = jnp.asarray([1.0, 0.9, 0.7])
    u = jnp.asarray([[0.1, 0.8], [0.3, 0.6], [0.2, 0.9]])
    intervals = intervals_from_uniforms(u, u[:, :1], tau, 0 * tau, 0.5)
    means = jax.random.normal(jax.random.key(1), (3, 5, 3, 2))
    logits = jax.random.normal(jax.random.key(2), (3, 5, 3))
    policy = GMFlowPolicy.create(GMOutput(means, logits, jnp.full(3, -1.0)), x, tau)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def found(substeps, solver):
        _, aux = imitation_loss(
            policy,
            lambda x, t: jnp.sin(x),
            x,
            tau,
            tau,
            intervals,
            TimeWarp(2.0),
            total_substeps=substeps,
            solver=solver,
        )
        return aux.x, aux.prediction, aux.x_dst

    limit = found(4096, "euler")

    def errors(substeps, solver):
        pairs = zip(found(substeps, solver), limit, strict=True)
        return np.array([np.sqrt(np.mean(np.square(a - b))) for a, b in pairs])

    euler, second = errors(64, "euler"), errors(64, "multistep")
    assert np.all(second < euler / 4), (euler, second)
    assert np.all(errors(128, "multistep") < second / 2.5)
