"""Diagnoses of planted illnesses: no training, a small policy, few substeps, a collapse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax.diagnostics import (
    Capacity,
    Diagnosis,
    RolloutError,
    VelocityGap,
    diagnose,
    effective_components,
    plot_diagnosis,
    policy_capacity,
    rollout_error,
    velocity_gap,
)
from piflow_jax.flow.policies import DXPolicy, GMFlowPolicy, GMOutput
from piflow_jax.flow.sampling import few_step_sample
from piflow_jax.flow.schedule import TimeWarp

ANGLES = 2 * np.pi * np.arange(6) / 6
CENTRES = jnp.asarray(2 * np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=-1), jnp.float32)
STD = 0.1
WARP = TimeWarp(1.0)
FAST = {"substeps": 64, "capacity_steps": 300}


def teacher(x, t):
    """The exact flow to six narrow Gaussians on a circle."""
    t = jnp.maximum(t, 1e-3)[:, None]
    variance = t**2 + (STD * (1 - t)) ** 2
    offsets = x[:, None] - (1 - t)[..., None] * CENTRES[None]
    mean = jax.nn.softmax(-jnp.sum(offsets**2, -1) / (2 * variance)) @ CENTRES
    x0 = mean + STD**2 * (1 - t) / variance * (x - (1 - t) * mean)
    return (x - x0) / t


def exact(x, t, logweights=0.0, shift=0.0):
    """The teacher's own mixture given `(x, t)`, as a policy: what a perfect network predicts."""
    s = t[:, None, None]
    spread = s**2 + ((1 - s) * STD) ** 2
    off = x[:, None] - (1 - s) * CENTRES[None]
    means = CENTRES[None] + (1 - s) * STD**2 / spread * off
    logs = -jnp.sum(off**2, -1) / (2 * spread[..., 0]) + logweights
    std = STD / jnp.sqrt(spread[:, 0, 0])
    output = GMOutput((x[:, None] - means) / s + shift, jax.nn.log_softmax(logs), jnp.log(std))
    return GMFlowPolicy.create(output, x, t)


NOISE = jax.random.normal(jax.random.key(0), (64, 2))


def free(components):
    means = jax.random.normal(jax.random.key(1), (64, components, 2)) + NOISE[:, None]
    output = GMOutput(means, jnp.zeros((64, components)), jnp.zeros(64))
    return GMFlowPolicy.create, output


@pytest.mark.slow
def test_an_exact_student_has_no_gap_and_no_reasons():
    steps = {"substeps": 64, "capacity_steps": 1200}  # the free fit converges slowly
    found = diagnose(exact, teacher, NOISE, 2, WARP, free=free(6), **steps)
    assert found.gap.gap.shape == (2, 16) and found.gap.t[0, 0] == 1
    assert (np.diff(found.gap.t.ravel()) < 0).all()
    assert found.gap.gap.max() < 1e-3 < 0.01 < found.gap.power.min()
    assert found.rollout.student < 0.01 * found.naive
    assert found.capacity.error < 0.1 * found.naive
    assert found.capacity.loss[-50:].mean() < 0.2 * found.capacity.loss[:5].mean()
    np.testing.assert_allclose(found.components, 6, rtol=1e-5)  # all alike at pure noise
    assert not found.reasons()


def test_a_gap_is_the_planted_one_where_it_was_planted():
    def student(x, t):
        return exact(x, t, shift=jnp.where(t[0] < 1, 0.5, 0.0))

    gap = velocity_gap(student, teacher, NOISE, 2, WARP)
    # At its source a mixture's velocity is the mean of its means.
    np.testing.assert_allclose(gap.gap[1, 0], 0.25, rtol=0.02)
    assert gap.by_segment[0] < 1e-3 < 0.01 < gap.by_segment[1]


def test_a_gap_takes_noise_of_few_bits_and_some_points():
    low = velocity_gap(exact, teacher, NOISE.astype(jnp.bfloat16), 1, WARP, points=2)
    high = velocity_gap(exact, teacher, NOISE.astype(jnp.bfloat16).astype(float), 1, WARP, points=2)
    np.testing.assert_allclose(low.power, high.power, rtol=1e-5)
    with pytest.raises(ValueError, match="points must be"):
        velocity_gap(exact, teacher, NOISE, 1, WARP, points=0)


@pytest.mark.slow
def test_an_untrained_network_is_blamed():
    found = diagnose(
        lambda x, t: exact(x, t, shift=1.0), teacher, NOISE, 1, WARP, free=free(6), **FAST
    )
    assert found.reasons()[0].startswith("network: a free policy reaches")
    assert found.rollout.rollout[-1] < 0.1 * found.rollout.student
    figure = plot_diagnosis(found)
    titles = [axes.get_title() for axes in figure.axes]
    assert len(titles) == 4 and all(titles)
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), found.gap.gap[0])


@pytest.mark.slow
def test_a_policy_that_is_too_small_is_blamed():
    one = policy_capacity(*free(1), teacher, NOISE, WARP, steps=300, total_substeps=64)
    six = policy_capacity(*free(6), teacher, NOISE, WARP, steps=300, total_substeps=64)
    assert six.error < 0.3 * one.error

    def student(x, t):  # the best of one velocity for all times: straight to the mean of the data
        output = jnp.stack([x, x], axis=-2)
        return DXPolicy.create(output, x, t)

    grid = (lambda output, x, t: DXPolicy.create(output, x, t)), jnp.stack([NOISE], axis=-2)
    found = diagnose(student, teacher, NOISE, 1, WARP, free=grid, **FAST)
    assert found.components is None and found.num_components == 0
    assert any(reason.startswith("policy: even a free one") for reason in found.reasons())


def test_errors_of_rollouts_are_those_of_samples():
    def ends(count):
        options = {
            "total_substeps": count,
            "final_step_size_scale": 0.5,
            "solver": "multistep",
            "rounding": "ceil",
        }
        return few_step_sample(exact, NOISE, 2, WARP, **options)

    reference = jnp.zeros_like(NOISE)
    found = rollout_error(
        exact, NOISE, reference, 2, WARP, substeps=(3, 8), finest=32, final_step_size_scale=0.5
    )
    coarse, fine, finest = (np.asarray(ends(count)) for count in (3, 8, 32))
    expected = [np.mean((end - finest) ** 2) for end in (coarse, fine)]
    np.testing.assert_allclose(found.rollout, expected, rtol=1e-3)
    np.testing.assert_allclose(found.total, [np.mean(coarse**2), np.mean(fine**2)], rtol=1e-5)
    np.testing.assert_allclose(found.student, np.mean(finest**2), rtol=1e-5)


@pytest.mark.parametrize(("own", "blamed"), [(0.3, True), (0.001, False)])
def test_a_policy_is_not_blamed_for_a_student_that_is_better(own, blamed):
    """Free policies have one segment, the student may have several."""
    gap = VelocityGap(*(np.ones((2, 4)) for _ in range(3)))
    rollouts = RolloutError(np.asarray([128]), np.zeros(1), np.full(1, own), own)
    capacity = Capacity(np.zeros(1), 0.31)
    found = Diagnosis(gap, rollouts, 2.0, capacity, None, 0).reasons()
    assert any(reason.startswith("policy:") for reason in found) == blamed


@pytest.mark.slow
def test_few_substeps_are_blamed():
    found = diagnose(exact, teacher, NOISE, 1, WARP, substeps=3)
    assert found.capacity is None
    assert found.reasons()[0].startswith("rollout: substeps are too few")
    assert (np.diff(found.rollout.rollout) <= 0).all()


@pytest.mark.parametrize(("logits", "count"), [([0, 0, 0], 3), ([50, 0, 0], 1), ([0, 0, -50], 2)])
def test_effective_components_of_known_weights(logits, count):
    output = GMOutput(jnp.zeros((1, 3, 2)), jnp.asarray([logits], jnp.float32), jnp.zeros(1))
    policy = GMFlowPolicy.create(output, jnp.zeros((1, 2)), jnp.ones(1))
    np.testing.assert_allclose(effective_components(policy), [count], rtol=1e-5)
    dropped = policy.drop(jnp.asarray([[False, False, True]]))
    assert np.isfinite(effective_components(dropped)).all()


@pytest.mark.slow
def test_a_collapsed_mixture_is_said_to_be_one():
    weights = jnp.asarray([50.0, 0, 0, 0, 0, 0])
    found = diagnose(lambda x, t: exact(x, t, weights[None]), teacher, NOISE, 1, WARP)
    assert "mixture: 1.00 components of 6 in use" in found.reasons()
