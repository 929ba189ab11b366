"""The rivals' objectives on a Gaussian teacher, whose flow map is known, and finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax.flow.distribution import distribution_matching_loss
from piflow_jax.flow.schedule import TimeWarp
from piflow_jax.rivals.base import renoised_sample
from piflow_jax.rivals.consistency import (
    consistency_loss,
    consistency_tangent,
    consistency_times,
    trigflow,
)
from piflow_jax.rivals.distribution_matching import backward_simulation
from piflow_jax.rivals.flow_map import flow_map_sample, guided_target
from piflow_jax.rivals.meanflow import meanflow_loss, meanflow_times
from piflow_jax.rivals.reflow import reflow_loss
from piflow_jax.rivals.shortcut import shortcut_steps, shortcut_target
from tests import gaussian
from tests.gaussian import run

BATCH, CHANNELS = 6, 4


@pytest.fixture
def states(x64):
    x = 0.3 + jax.random.normal(jax.random.key(0), (BATCH, CHANNELS))
    t = jnp.asarray([1.0, 0.9, 0.7, 0.5, 0.4, 0.2])
    r = jnp.asarray([0.0, 0.2, 0.7, 0.1, 0.3, 0.05])
    return x, t, r


def off(function, by=0.1):
    """A network beside the solution: curved in all its arguments."""

    def network(x, *times):
        level = gaussian.spread(times[0] * (1 + sum(times[1:])), x)
        return function(x, *times) + by * jnp.sin(2 * x + 3 * level)

    return network


def gradient(loss, amount):
    """Derivative of a loss by the amount of the fault in its network."""
    return jax.jit(jax.grad(loss))(jnp.asarray(amount))


# --- MeanFlow ------------------------------------------------------------------------------------


def test_meanflow_vanishes_at_the_exact_mean_velocity(states):
    x, t, r = states
    v = gaussian.velocity(x, t)

    def loss(amount):
        network = off(gaussian.mean_velocity, amount)
        return meanflow_loss(network, x, v, t, r, power=0.0)[0]

    # Without the samples of r = t = 0.7, where two branches of the test's own formula meet.
    _, residual = run(lambda: meanflow_loss(gaussian.mean_velocity, x, v, t, r))
    apart = np.asarray(r < t)
    assert np.abs(residual[apart]).max() < 1e-12
    assert run(lambda: loss(0.0)) < 1e-6 < 1e-3 < run(lambda: loss(0.1))
    assert abs(gradient(loss, 0.1)) > 1e-2


def test_meanflow_residual_is_that_of_finite_differences(states):
    x, t, r = states
    v = jnp.cos(x)
    network = off(gaussian.mean_velocity)
    _, residual = run(lambda: meanflow_loss(network, x, v, t, r))
    h = 1e-6
    moved = jax.jit(lambda h: network(x + h * v, t + h, t + h - r))
    ahead, behind = moved(h), moved(-h)
    derivative = (ahead - behind) / (2 * h)
    expected = network(x, t, t - r) - v + gaussian.spread(t - r, x) * derivative
    apart = np.asarray(r < t)
    np.testing.assert_allclose(residual[apart], expected[apart], atol=1e-8)
    # Flow matching where r = t.
    same = (network(x, t, t - r) - v)[~apart]
    np.testing.assert_allclose(residual[~apart], same, atol=1e-12)


def test_meanflow_weight_is_without_gradient(states):
    x, t, r = states
    v = gaussian.velocity(x, t)

    def loss(amount, power):
        network = off(gaussian.mean_velocity, amount)
        return meanflow_loss(network, x, v, t, r, power=power, eps=1e-3)[0]

    _, residual = run(lambda: meanflow_loss(off(gaussian.mean_velocity), x, v, t, r))
    squares = np.sum(np.square(residual), -1)
    value = run(lambda: loss(0.1, 1.0))
    np.testing.assert_allclose(value, np.mean(squares / (squares + 1e-3)), rtol=1e-9)
    # d|residual|^2 of the prediction alone, each sample weighted by a constant.
    fault = jnp.sin(2 * x + 3 * gaussian.spread(t * (1 + t - r), x))
    expected = np.mean(np.sum(2 * residual * fault, -1) / (squares + 1e-3))
    np.testing.assert_allclose(gradient(lambda a: loss(a, 1.0), 0.1), expected, rtol=1e-9)


def test_meanflow_times_have_their_shares():
    t, r = meanflow_times(jax.random.key(0), 20_000)
    assert np.all(r <= t) and np.all((t > 0) & (t < 1))
    assert abs(np.mean(r < t) - 0.25) < 0.015
    # The smaller and the larger of two normals average to their mean.
    logits = np.log(t / (1 - t)), np.log(r / (1 - r))
    apart = np.asarray(r < t)
    assert abs(np.mean([a[apart] for a in logits]) + 0.4) < 0.03


def test_guidance_that_is_built_in_is_the_guided_velocity(states):
    """With the true velocities of label and none, `omega / (1 - kappa)` is the scale."""
    x, t, _ = states
    cond, uncond = gaussian.velocity(x, t), gaussian.velocity(x, t, mean=-0.2)
    omega, kappa = 1.5, 0.25
    # The fixed point of `v' = omega v + kappa v' + (1 - omega - kappa) u`.
    guided = uncond + omega / (1 - kappa) * (cond - uncond)
    found = guided_target(cond, guided, uncond, omega, kappa)
    np.testing.assert_allclose(found, guided, atol=1e-12)


# --- Shortcut models -----------------------------------------------------------------------------


def test_shortcut_target_is_the_longer_step(states):
    x, *_ = states
    d = jnp.asarray([0.5, 0.25, 0.125, 0.125, 1 / 128, 1 / 128])
    t = jnp.asarray([1.0, 1.0, 0.75, 0.25, 1.0, 1 / 64])
    target = run(lambda: shortcut_target(gaussian.mean_velocity, x, t, d, smallest=1 << 20))
    np.testing.assert_allclose(target, gaussian.mean_velocity(x, t, 2 * d), atol=1e-12)
    wrong = run(lambda: shortcut_target(off(gaussian.mean_velocity), x, t, d, smallest=1 << 20))
    apart = np.abs(wrong - off(gaussian.mean_velocity)(x, t, 2 * d)).max(-1)
    assert np.all(apart > 1e-5)


def test_shortest_shortcuts_are_asked_as_flow_matching(states):
    x, t, _ = states
    seen = []

    def network(x, t, d):
        seen.append((t, d))
        return x

    d = jnp.asarray([0.5, 0.25, 0.125, 0.0625, 1 / 32, 1 / 32])
    shortcut_target(network, x, t, d, smallest=32)
    (first, asked), (second, again) = seen
    np.testing.assert_array_equal(asked, [0.5, 0.25, 0.125, 0.0625, 0, 0])
    np.testing.assert_array_equal(again, asked)
    np.testing.assert_allclose(first - second, d)


def test_shortcut_steps_are_multiples_that_fit():
    t, d = shortcut_steps(jax.random.key(0), 5000, 16)
    np.testing.assert_array_equal(np.unique(d), [1 / 16, 1 / 8, 1 / 4, 1 / 2])
    whole = t / (2 * d)
    np.testing.assert_array_equal(whole, np.round(whole))
    assert np.all(t - 2 * d >= 0) and np.all(t <= 1)
    for length in np.unique(d):
        starts = t[d == length]
        assert abs(len(starts) / 5000 - 0.25) < 0.03
        assert len(np.unique(starts)) == round(1 / (2 * length))
    with pytest.raises(ValueError, match="power of two"):
        shortcut_steps(jax.random.key(0), 4, 12)


# --- Consistency ---------------------------------------------------------------------------------


def consistency_network(x, t):
    """The velocity whose `x - t u` is the end of the path."""
    return (x - gaussian.flow_map(x, t, 0 * t)) / gaussian.spread(t, x)


@pytest.fixture
def circle(states):
    x, *_ = states
    return x, jnp.asarray([1.5, 1.2, 1.0, 0.7, 0.4, 0.1])


def test_trigflow_is_the_derivative_on_the_circle(circle):
    z, angle = circle
    found = run(lambda: trigflow(gaussian.velocity)(z, angle))
    # z = cos(a) x_0 + sin(a) eps with conditional means of a Gaussian.
    c, s = np.cos(angle)[:, None], np.sin(angle)[:, None]
    scale, mean = gaussian.SCALE, gaussian.MEAN
    gain = (z - c * mean) / (c**2 * scale**2 + s**2)
    x0, eps = mean + c * scale**2 * gain, s * gain
    np.testing.assert_allclose(found, c * eps - s * x0, atol=1e-12)


def test_consistency_tangent_vanishes_at_the_exact_map(circle):
    z, angle = circle
    teacher = trigflow(gaussian.velocity)
    exact = trigflow(consistency_network)
    _, tangent = run(lambda: consistency_tangent(exact, teacher, z, angle))
    assert np.abs(tangent).max() < 1e-12
    loss, _ = run(lambda: consistency_loss(exact, teacher, z, angle))
    assert loss < 1e-20
    loss, tangent = run(lambda: consistency_loss(off(exact), teacher, z, angle))
    assert loss > 1e-3 and np.all(np.abs(tangent).max(-1) > 1e-4)


def test_consistency_tangent_is_that_of_finite_differences(circle):
    z, angle = circle
    teacher, network = trigflow(gaussian.velocity), off(trigflow(gaussian.velocity))
    prediction, tangent = run(lambda: consistency_tangent(network, teacher, z, angle))

    def function(z, angle):
        return jnp.cos(angle)[:, None] * z - jnp.sin(angle)[:, None] * network(z, angle)

    h, slope = 1e-6, teacher(z, angle)
    moved = jax.jit(lambda h: function(z + h * slope, angle + h))
    ahead, behind = moved(h), moved(-h)
    expected = np.cos(angle)[:, None] * (ahead - behind) / (2 * h)
    np.testing.assert_allclose(tangent, expected, atol=1e-8)
    np.testing.assert_allclose(prediction, network(z, angle), atol=1e-14)
    # At the beginning of the warm-up only the part without the network's derivative is left.
    _, begun = run(lambda: consistency_tangent(network, teacher, z, angle, 0.0))
    np.testing.assert_allclose(
        begun, -(np.cos(angle)[:, None] ** 2) * (network(z, angle) - slope), atol=1e-12
    )


def test_consistency_gradient_follows_the_normalised_tangent(circle):
    z, angle = circle
    teacher = trigflow(gaussian.velocity)

    def loss(amount):
        return consistency_loss(off(teacher, amount), teacher, z, angle)[0]

    _, tangent = run(lambda: consistency_loss(off(teacher), teacher, z, angle))
    norm = np.linalg.norm(tangent, axis=-1, keepdims=True)
    fault = np.sin(2 * z + 3 * np.asarray(angle)[:, None])
    expected = np.mean(-2 * tangent / (norm + 0.1) * fault)
    np.testing.assert_allclose(gradient(loss, 0.1), expected, rtol=1e-9)


def test_consistency_times_are_log_normal():
    angle = consistency_times(jax.random.key(0), 20_000)
    logs = np.log(np.tan(np.asarray(angle, np.float64)))
    assert abs(logs.mean() + 0.3) < 0.04 and abs(logs.std() - 1.4) < 0.04


# --- Reflow --------------------------------------------------------------------------------------


def test_reflow_of_the_exact_pairs(states):
    """Pairs of a linear flow map lie on straight paths that do not cross: both have no residual."""
    noise, t, _ = states
    one = jnp.ones(BATCH)
    ends = gaussian.flow_map(noise, one, 0 * one)

    def straight(x, t):
        # x = (1 - t) end(z) + t z is linear in z: solve for it.
        level = gaussian.spread(t, x)
        z = (x - (1 - level) * gaussian.MEAN) / ((1 - level) * gaussian.SCALE + level)
        return z - gaussian.flow_map(z, jnp.ones(len(t)), jnp.zeros(len(t)))

    assert run(lambda: reflow_loss(straight, noise, ends, t)) < 1e-24
    assert run(lambda: reflow_loss(consistency_network, noise, ends, one)) < 1e-24
    assert run(lambda: reflow_loss(off(straight), noise, ends, t)) > 1e-3
    found = gradient(lambda a: reflow_loss(off(straight, a), noise, ends, t), 0.1)
    fault = np.mean(
        np.square(off(lambda x, t: 0 * x, 1.0)((1 - t[:, None]) * ends + t[:, None] * noise, t))
    )
    np.testing.assert_allclose(found, 2 * 0.1 * fault, rtol=1e-9)


# --- DMD2 ----------------------------------------------------------------------------------------


def matching(shift, scale=gaussian.SCALE, batch=4000):
    """DMD of a student `N(mean + shift, scale^2)` whose own velocity is known."""
    keys = jax.random.split(jax.random.key(3), 3)
    mean = gaussian.MEAN + shift
    fake = functools.partial(gaussian.velocity, mean=mean, scale=scale)
    t = jax.random.uniform(keys[1], (batch,), minval=0.1, maxval=0.9)
    noise = jax.random.normal(keys[2], (batch, CHANNELS))
    z = jax.random.normal(keys[0], (batch, CHANNELS))

    def loss(offset):
        generated = mean + offset + scale * z
        return distribution_matching_loss(generated, gaussian.velocity, fake, noise, t)

    return gradient(loss, 0.0), z.size * gradient(loss, jnp.zeros_like(z))


def test_distribution_matching_vanishes_between_equal_distributions(x64):
    slope, direction = matching(0.0)
    assert np.abs(direction).max() < 1e-12 and abs(slope) < 1e-12


@pytest.mark.parametrize("shift", [-0.3, 0.3])
def test_distribution_matching_pulls_the_mean_back(shift, x64):
    slope, direction = matching(shift)
    assert np.sign(slope) == np.sign(shift) and abs(slope) > 0.01
    # Equal scales: the difference of predictions is a constant, (1 - a^2 s^2 / var) of the shift.
    assert np.all(np.sign(direction) == np.sign(shift))


def test_distribution_matching_narrows_what_is_too_wide(x64):
    """Gradient by the samples points along them, from the mean, when their scale is too large."""
    _, direction = matching(0.0, scale=1.5 * gaussian.SCALE)
    z = jax.random.normal(jax.random.split(jax.random.key(3), 3)[0], direction.shape)
    assert np.mean(direction * z) > 0.05


def test_distribution_matching_is_in_units_of_the_distance(x64):
    """One sample in NumPy: `(fake x_0 - real x_0) / mean |x - real x_0|`."""
    x0, noise, t = np.array([[0.5, -1.0]]), np.array([[0.3, 0.8]]), np.array([0.6])
    slope = gradient(
        lambda x0: distribution_matching_loss(
            x0, lambda x, t: 0.5 * x, lambda x, t: 0.2 * x, jnp.asarray(noise), t
        ),
        jnp.asarray(x0),
    )
    x = 0.4 * x0 + 0.6 * noise
    real, fake = x - 0.6 * 0.5 * x, x - 0.6 * 0.2 * x
    expected = (fake - real) / np.abs(x0 - real).mean()
    np.testing.assert_allclose(x0.size * slope, expected, rtol=1e-12)


def test_backward_simulation_visits_what_sampling_visits():
    """A perfect student stays on the distribution of `x_t`, at the levels of its evaluations."""
    batch = 6000
    noise = jax.random.normal(jax.random.key(0), (batch, 1))
    x, t = run(
        lambda: backward_simulation(consistency_network, jax.random.key(1), noise, (1, 2, 4))
    )
    levels, counts = np.unique(t, return_counts=True)
    np.testing.assert_allclose(levels, [0.25, 0.5, 0.75, 1.0])
    # One of three numbers of evaluations, one of its steps.
    shares = np.array([1 / 4, 1 / 4 + 1 / 2, 1 / 4, 1 + 1 / 2 + 1 / 4]) / 3
    np.testing.assert_allclose(counts / batch, shares, atol=0.03)
    for level in levels:
        picked = np.asarray(x[t == level], np.float64)
        expected = np.sqrt(gaussian.variance(level))
        assert abs(picked.mean() - (1 - level) * gaussian.MEAN) < 0.12
        assert abs(picked.std() / expected - 1) < 0.1


# --- Samplers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("nfe", [1, 3])
@pytest.mark.parametrize("shift", [1.0, 3.2])
def test_jumps_of_the_exact_map_end_on_the_path(nfe, shift, states):
    x, *_ = states
    one = jnp.ones(BATCH)
    found = run(lambda: flow_map_sample(gaussian.mean_velocity, x, nfe, TimeWarp(shift)))
    np.testing.assert_allclose(found, gaussian.flow_map(x, one, 0 * one), atol=1e-12)


@pytest.mark.parametrize("nfe", [1, 2, 4])
def test_renoised_samples_of_the_exact_map_are_data(nfe):
    noise = jax.random.normal(jax.random.key(0), (4000, 2))
    keys = jax.random.split(jax.random.key(1), 4000)
    found = run(lambda: renoised_sample(consistency_network, noise, nfe, TimeWarp(), keys))
    assert abs(float(found.mean()) - gaussian.MEAN) < 0.03
    assert abs(float(found.std()) - gaussian.SCALE) < 0.03
    ends = gaussian.flow_map(noise, jnp.ones(4000), jnp.zeros(4000))
    assert (np.abs(found - ends).max() < 1e-4) == (nfe == 1)
