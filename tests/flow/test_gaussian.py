"""The Gaussian teacher itself, and pi-Flow's policies on it."""

import jax
import jax.numpy as jnp
import numpy as np

from piflow_jax.flow.imitation import imitation_loss, sample_intervals
from piflow_jax.flow.policies import GMFlowPolicy, GMOutput
from piflow_jax.flow.sampling import ode_sample
from piflow_jax.flow.schedule import TimeWarp
from tests import gaussian


def test_the_flow_map_is_the_flow_of_the_velocity(x64):
    x = jax.random.normal(jax.random.key(0), (5, 3))
    end = gaussian.run(lambda: ode_sample(gaussian.velocity, x, 400, TimeWarp(), "heun"))
    found = gaussian.flow_map(x, jnp.ones(5), jnp.zeros(5))
    np.testing.assert_allclose(found, end, atol=1e-5)
    # Velocities are those of flow matching: E[eps - x_0 | x_t] of a million draws.
    x0, eps = gaussian.MEAN, 1.0
    x0 = x0 + gaussian.SCALE * jax.random.normal(jax.random.key(1), (1_000_000,))
    eps = jax.random.normal(jax.random.key(2), x0.shape)
    t = 0.6
    xt = (1 - t) * x0 + t * eps
    near = jnp.abs(xt - 0.9) < 0.05
    expected = jnp.sum(jnp.where(near, eps - x0, 0)) / jnp.sum(near)
    found = gaussian.velocity(jnp.full((1, 1), 0.9), jnp.full((1,), t))
    np.testing.assert_allclose(found[0, 0], expected, atol=0.02)


def imitation(offset):
    """pi-ID of one component whose mean is off, with the exact posterior's variance."""
    x = jax.random.normal(jax.random.key(0), (6, 4))
    tau = jnp.asarray([1.0, 0.9, 0.8, 0.6, 0.5, 0.3])
    # The posterior of x_0 has the variance (scale t)^2 / var, and the policy's is (std t)^2.
    logstd = jnp.log(gaussian.SCALE / jnp.sqrt(gaussian.variance(tau)))
    intervals = sample_intervals(jax.random.key(1), 2, 0.9 * tau, 0 * tau, 0.0)

    def loss(means):
        output = GMOutput(means, jnp.zeros((6, 1)), logstd)
        policy = GMFlowPolicy.create(output, x, tau)
        return imitation_loss(
            policy, gaussian.velocity, x, tau, 0.9 * tau, intervals, TimeWarp(), total_substeps=8
        )[0]

    means = gaussian.velocity(x, tau)[:, None] + offset
    return jax.jit(jax.value_and_grad(loss))(means)


def test_imitation_vanishes_at_the_exact_mixture_and_not_beside_it(x64):
    loss, gradient = imitation(0.0)
    assert loss < 1e-20 and np.abs(gradient).max() < 1e-9
    loss, gradient = imitation(0.1)
    assert loss > 1e-4 and np.all(gradient > 0)
