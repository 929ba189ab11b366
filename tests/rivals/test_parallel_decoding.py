"""Parallel decoding on a Gaussian teacher, whose flow map is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax.flow.schedule import TimeWarp
from piflow_jax.rivals.parallel_decoding import (
    INTERVALS,
    PDD,
    block_bounds,
    decode,
    decoding_indices,
    decoding_loss,
    interval_levels,
)
from tests import gaussian
from tests.gaussian import run

BATCH, CHANNELS = 6, 4


@pytest.fixture
def noise(x64):
    return 0.3 + jax.random.normal(jax.random.key(0), (BATCH, 2, CHANNELS))


def exact(levels):
    """The network whose outputs are the mean velocities of the flow, forwards and back in time."""

    def network(x, t):
        ends = jax.vmap(lambda level: gaussian.flow_map(x, t, jnp.full_like(t, level)))(levels)
        steps = jnp.diff(levels).reshape(-1, *(1,) * x.ndim)
        return jnp.moveaxis(jnp.diff(ends, axis=0) / steps, 0, -2)

    return network


def midpoints(levels, first):
    """The network whose outputs are midpoint steps of the teacher from the interval `first` on."""

    def network(x, t):
        def step(x, ends):
            t, half = jnp.full(BATCH, ends[0]), (ends[1] - ends[0]) / 2
            u = gaussian.velocity(x + half * gaussian.velocity(x, t), t + half)
            return x + 2 * half * u, u

        del t
        ends = levels[first:-1], levels[first + 1 :]
        outputs = jnp.moveaxis(jax.lax.scan(step, x, ends)[1], 0, -2)
        return jnp.concatenate([jnp.zeros_like(outputs[..., :1, :])] * first + [outputs], -2)

    return network


def off(network, amount):
    def wrong(x, t):
        outputs = network(x, t)
        return outputs + amount * jnp.sin(3 * outputs + 1)

    return wrong


def intervals_of(start, count):
    return jnp.full(BATCH, start), start + jnp.arange(BATCH) % count


@pytest.mark.parametrize("shift", [1.0, 3.2])
def test_exact_velocities_lead_along_the_path(shift, noise):
    levels = interval_levels(TimeWarp(shift), 16)
    start, stop = jnp.full(BATCH, 5), jnp.asarray([5, 6, 9, 12, 15, 16])
    found = run(lambda: decode(exact(levels)(noise, levels[start]), noise, levels, start, stop))
    expected = gaussian.flow_map(noise, levels[start], levels[stop])
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_the_loss_vanishes_at_the_teachers_midpoint_steps_and_nowhere_else(noise):
    levels = interval_levels(TimeWarp(3.2), 8)
    start, index = intervals_of(3, 5)

    def loss(network):
        return run(lambda: decoding_loss(network, gaussian.velocity, noise, levels, start, index))

    right = midpoints(levels, 3)
    assert loss(right) < 1e-24
    assert loss(off(right, 0.1)) > 1e-4
    # One wrong output is seen in its own interval, and behind it by the state that it leads to.
    for k in (3, 5):
        assert loss(lambda x, t, k=k: right(x, t).at[..., k, :].add(0.5)) > 1e-3


def test_the_exact_flow_is_the_minimum_but_for_the_midpoints_own_error(noise):
    """Its square falls by 64 when intervals halve: of second order in them, and here of third.

    A midpoint step's error in the mean velocity begins with `h^2 (g'' / 24 + g g' / 4 + g^3 / 6) x`
    for a velocity `g(t) x`, which is zero where `g = v' / 2 v` with a quadratic variance `v`.
    """

    def loss(intervals):
        levels = interval_levels(TimeWarp(), intervals)
        start = jnp.full(BATCH, intervals // 4)
        index = start + intervals // 16 * jnp.asarray([0, 1, 3, 6, 8, 11])
        return run(
            lambda: decoding_loss(exact(levels), gaussian.velocity, noise, levels, start, index)
        )

    losses = [loss(intervals) for intervals in (16, 32, 64)]
    ratios = np.array(losses[:-1]) / np.array(losses[1:])
    np.testing.assert_allclose(ratios, 64, rtol=0.1)


def test_gradients_flow_through_the_taught_output_alone(noise):
    levels = interval_levels(TimeWarp(), 8)
    start, index = intervals_of(2, 6)
    network = exact(levels)

    def loss(amount):
        wrong = off(network, amount)
        return decoding_loss(wrong, gaussian.velocity, noise, levels, start, index)

    found = jax.jit(jax.grad(loss))(jnp.asarray(0.1))
    outputs = network(noise, levels[start])
    wrong = off(network, 0.1)(noise, levels[start])
    state = decode(wrong, noise, levels, start, index)
    t, r = levels[index], levels[index + 1]
    middle = state + gaussian.spread((r - t) / 2, state) * gaussian.velocity(state, t)
    target = gaussian.velocity(middle, (t + r) / 2)
    rows = jnp.arange(BATCH)
    picked, slope = wrong[rows, :, index], jnp.sin(3 * outputs + 1)[rows, :, index]
    np.testing.assert_allclose(found, jnp.mean(2 * (picked - target) * slope), rtol=1e-9)


@pytest.mark.parametrize("nfe", [1, 3, 4])
@pytest.mark.parametrize("shift", [1.0, 3.2])
def test_one_network_samples_with_any_number_of_evaluations(nfe, shift, noise):
    """Of the exact flow, with an evaluation at the start of each block."""
    asked = []

    def network(x, t):
        jax.debug.callback(lambda t: asked.append(float(t)), t[0])
        return exact(interval_levels(TimeWarp(shift)))(x, t)

    found = run(lambda: PDD.sample(network, noise, nfe, TimeWarp(shift)))
    jax.effects_barrier()
    one = jnp.ones(BATCH)
    np.testing.assert_allclose(found, gaussian.flow_map(noise, one, 0 * one), atol=1e-12)
    starts = TimeWarp(shift).warp(1 - np.arange(nfe) / nfe)
    np.testing.assert_allclose(sorted(asked, reverse=True), starts, atol=1 / INTERVALS)


def test_blocks_and_intervals_are_those_that_sampling_meets():
    np.testing.assert_array_equal(block_bounds(4), [0, 16, 32, 48, 64])
    np.testing.assert_array_equal(block_bounds(3), [0, 21, 43, 64])
    start, index = decoding_indices(jax.random.key(0), 20_000, (2, 4))
    starts, counts = np.unique(start, return_counts=True)
    np.testing.assert_array_equal(starts, [0, 16, 32, 48])
    np.testing.assert_allclose(counts / 20_000, 0.25, atol=0.015)
    for first, longest in ((0, 32), (16, 32), (32, 32), (48, 16)):
        taught = index[start == first]
        assert taught.min() == first and taught.max() == first + longest - 1
        assert abs(taught.mean() - (first + (longest - 1) / 2)) < 0.6
