"""Errors of velocities and of endpoints on Gaussian data, against the flow itself."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import endpoint_weights as weights
from piflow_jax.data import load_digits_source
from tests import gaussian

PAGE = Path(__file__).parents[2] / "docs" / "beyond.md"


@pytest.mark.parametrize("s", [0.1, 0.7, 1.0, 3.0])
def test_the_propagator_is_the_derivative_of_the_flow_map(s):
    with jax.enable_x64(True):
        t = jnp.linspace(0.01, 1, 9)
        x = jnp.full(9, 0.3)[:, None]
        zero = jnp.zeros(9)
        found = jax.jvp(lambda x: gaussian.flow_map(x, t, zero, 0.4, s), (x,), (jnp.ones_like(x),))[
            1
        ]
        np.testing.assert_allclose(found[:, 0], weights.propagator(np.asarray(t), s), rtol=1e-12)


@pytest.mark.parametrize("s", [0.1, 0.7, 1.0])
def test_errors_along_a_students_path_add_up_to_that_of_its_endpoint(s):
    """The student follows the flow of data whose mean is off, and ends as far off."""
    off, mean = 0.25, 0.4
    with jax.enable_x64(True):
        nodes, share = np.polynomial.legendre.leggauss(400)
        t, share = (nodes + 1) / 2, share / 2
        noise = jnp.full((400, 1), -0.7)
        path = gaussian.flow_map(noise, jnp.ones(400), jnp.asarray(t), mean + off, s)
        student, teacher = (
            gaussian.velocity(path, jnp.asarray(t), m, s)[:, 0] for m in (mean + off, mean)
        )
        error = np.asarray(student - teacher)
        np.testing.assert_allclose(error, -off * weights.velocity_error(t, s), rtol=1e-9)
        moved = -np.sum(share * weights.propagator(t, s) * error)
        ends = [
            gaussian.flow_map(noise[:1], jnp.ones(1), jnp.zeros(1), m, s)
            for m in (mean + off, mean)
        ]
        np.testing.assert_allclose(moved, float((ends[0] - ends[1])[0, 0]), rtol=1e-6)


@pytest.mark.parametrize("s", [0.01, 0.3, 1.0, 4.0])
def test_the_plain_loss_counts_an_endpoint_by_one_over_its_deviation(s):
    np.testing.assert_allclose(weights.counted(s, 0), np.pi / (4 * s), rtol=1e-6)


def test_the_page_has_the_tables():
    text = PAGE.read_text(encoding="utf-8")
    assert "\n".join(weights.spread_table()) in text
    for line in weights.data_table({"the digits": load_digits_source()}):
        assert line in text
