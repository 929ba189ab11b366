"""How many substeps a segment has, by the two rules, and that samples take them."""

import jax.numpy as jnp
import numpy as np
import pytest

import piflow_jax
from piflow_jax.flow.schedule import sampling_times
from piflow_jax.flow.substeps import num_substeps
from tests.students import WARP, X, few, grid, mixture, tiny_student

# nfe, length of the last segment, shift, substeps: how many each segment has, rounded and up.
COUNTS = [
    (4, 0.5, 3.2, 128, (37, 37, 37, 18), (37, 37, 37, 19)),
    (4, 0.5, 3.2, 132, (38, 38, 38, 19), (38, 38, 38, 19)),
    (4, 1.0, 3.2, 128, (32, 32, 32, 32), (32, 32, 32, 32)),
    (3, 1.0, 1.0, 128, (43, 43, 43), (43, 43, 43)),
    (3, 1.0, 1.0, 100, (33, 33, 33), (34, 34, 34)),
    (1, 1.0, 1.0, 512, (512,), (512,)),
    (2, 1.0, 1.0, 1, (1, 1), (1, 1)),
]


@pytest.mark.parametrize(("nfe", "last", "shift", "total", "rounded", "up"), COUNTS)
def test_substeps_of_segments(nfe, last, shift, total, rounded, up):
    warp = piflow_jax.TimeWarp(shift)
    times = sampling_times(nfe, warp, last)
    ends = [warp.unwarp(t) for t in (times.src, times.dst)]
    for rounding, expected in (("round", rounded), ("ceil", up)):
        assert tuple(num_substeps(ends[0] - ends[1], total, rounding)) == expected
        # And so where levels and times are float32.
        src, dst = (warp.unwarp(jnp.asarray(t, jnp.float32)) for t in (times.src, times.dst))
        assert tuple(np.asarray(num_substeps(src - dst, total, rounding))) == expected


def test_rounding_errors_are_no_substep():
    lengths = np.float32([32.000002, 31.999998, 32.01, 0.0, 1e-9]) / np.float32(128)
    np.testing.assert_array_equal(num_substeps(lengths, 128, "ceil"), [32, 32, 33, 1, 1])


def by_hand(policy_fn, x, times, counts):
    """Euler's steps, one after the other, as the release takes them."""
    for src, dst, count in zip(times.src, times.dst, counts, strict=True):
        policy = policy_fn(x, jnp.full(len(x), src, jnp.float32))
        taus = np.linspace(WARP.unwarp(src), WARP.unwarp(dst), count + 1)
        for begin, end in zip(WARP.warp(taus)[:-1], WARP.warp(taus)[1:], strict=True):
            x = x + (end - begin) * policy.velocity(x, jnp.full(len(x), begin, jnp.float32))
    return x


@pytest.mark.parametrize("policy_fn", [mixture, grid])
def test_samples_take_the_substeps_of_the_rule(policy_fn):
    times = sampling_times(4, WARP, 0.5)
    for rounding, counts in (("round", (5, 5, 5, 2)), ("ceil", (5, 5, 5, 3))):
        options = {"final_step_size_scale": 0.5, "rounding": rounding, "policy_fn": policy_fn}
        found = piflow_jax.few_step_sample(noise=X, nfe=4, warp=WARP, total_substeps=17, **options)
        right = by_hand(policy_fn, jnp.asarray(X), times, counts)
        np.testing.assert_allclose(found, right, rtol=0, atol=2e-5)
    assert (
        np.abs(
            few(4, final_step_size_scale=0.5) - few(4, final_step_size_scale=0.5, rounding="ceil")
        ).max()
        > 1e-4
    )


def test_students_sample_with_the_substeps_of_the_release():
    student = tiny_student(nfe=4, shift=3.2, final=0.5)
    noise = np.random.default_rng(2).normal(size=(2, 8, 8, 1)).astype(np.float32)
    found = student.sample(0, [3, 4], noise=noise, substeps=17, solver="euler")
    times = sampling_times(4, WARP, 0.5)
    labels = np.array([3, 4])
    right = by_hand(lambda x, t: student.policy(x, t, labels), noise, times, (5, 5, 5, 3))
    np.testing.assert_allclose(found, right, rtol=0, atol=5e-5)
