"""The orders of the rollout's solvers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax.flow.policies import GMFlowPolicy, GMOutput
from piflow_jax.flow.rollout import rollout
from piflow_jax.flow.schedule import TimeWarp


class Oscillation:
    """`u = x cos(5 t)`, whose exact rollout is an exponential of a sine."""

    def velocity(self, x, sigma):
        return x * jnp.cos(5 * sigma)[:, None]


def orders(errors):
    return np.log2(np.asarray(errors[:-1]) / np.asarray(errors[1:]))


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("multistep", 2)])
@pytest.mark.parametrize("shift", [1.0, 3.2])
def test_orders_of_convergence(solver, order, shift, x64):
    x, start, end = jnp.ones((2, 1)), jnp.asarray([1.0, 0.9]), jnp.asarray([0.0, 0.4])
    warp = TimeWarp(shift)
    levels = warp.warp(end), warp.warp(start)
    exact = np.exp((np.sin(5 * levels[0]) - np.sin(5 * levels[1])) / 5)
    errors = [
        np.abs(rollout(Oscillation(), x, start, end, warp, n, solver=solver)[0][:, 0] - exact)
        for n in (160, 320, 640)
    ]
    np.testing.assert_allclose(orders(errors), order, atol=0.1)


def test_a_mixture_to_the_data_at_second_order(x64):
    """The policy itself, whose velocity is a quotient by t, down to t = 0."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 6, 1)))
    output = GMOutput(
        jnp.asarray(rng.normal(size=(2, 6, 3, 1))), jnp.zeros((2, 6, 3)), jnp.full(2, -1.0)
    )
    one = jnp.ones(2)
    policy = GMFlowPolicy.create(output, x, one)

    def end(n, solver):
        return jax.jit(lambda x: rollout(policy, x, one, 0 * one, TimeWarp(), n, solver=solver)[0])(
            x
        )

    exact = end(5000, "multistep")
    for solver, order in (("euler", 1), ("multistep", 2)):
        errors = [np.abs(end(n, solver) - exact).max() for n in (100, 200, 400)]
        np.testing.assert_allclose(orders(errors), order, atol=0.3)
    assert np.abs(end(16, "multistep") - exact).max() < np.abs(end(64, "euler") - exact).max()
