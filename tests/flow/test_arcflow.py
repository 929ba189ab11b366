"""ArcFlow: its integral against quadrature, and pi-ID of a teacher that it can imitate exactly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax.flow.imitation import imitation_loss, sample_intervals
from piflow_jax.flow.policies import ArcFlowPolicy, ArcOutput
from piflow_jax.flow.rollout import average_velocity, rollout
from piflow_jax.flow.sampling import few_step_sample
from piflow_jax.flow.schedule import TimeWarp
from tests import gaussian

BATCH, SITES, K, C = 3, 2, 4, 2


@functools.partial(jax.jit, static_argnums=0)
def make(seed=0, rates=None):
    keys = jax.random.split(jax.random.key(seed), 4)
    output = ArcOutput(
        means=jax.random.normal(keys[0], (BATCH, SITES, K, C)),
        logweights=jax.random.normal(keys[1], (BATCH, SITES, K)),
        rates=3 * jax.random.normal(keys[2], (BATCH, SITES, K)) if rates is None else rates,
    )
    x = jax.random.normal(keys[3], (BATCH, SITES, C))
    sigma = jnp.asarray([1.0, 0.8, 0.5])
    return output, x, sigma


def in_numpy(output, sigma, t):
    """The velocity at `t[B]` as the formula has it."""
    means, weights, rates = (np.asarray(a) for a in (output.means, output.logweights, output.rates))
    rates = np.concatenate([np.zeros_like(rates[..., :1]), rates[..., 1:]], -1)
    weights = np.exp(weights) / np.exp(weights).sum(-1, keepdims=True)
    grown = np.exp(rates * (np.asarray(sigma) - np.asarray(t))[:, None, None])
    return np.einsum("bsk,bskc->bsc", weights * grown, means)


@pytest.mark.parametrize("shift", [1.0, 3.2])
def test_a_rollout_is_the_integral(shift, x64):
    output, x, sigma = make()
    policy, warp = ArcFlowPolicy.create(output, x, sigma), TimeWarp(shift)
    np.testing.assert_allclose(
        policy.velocity(x, sigma / 2), in_numpy(output, sigma, sigma / 2), rtol=1e-12
    )
    start, end = 0.9 * sigma, 0.2 * sigma
    tau = warp.unwarp(start), warp.unwarp(end)
    found, at = gaussian.run(lambda: rollout(policy, x, *tau, warp))
    np.testing.assert_allclose(at, end, rtol=1e-12)
    nodes, weights = np.polynomial.legendre.leggauss(20)
    length = np.asarray(start - end)
    integral = sum(
        w / 2 * in_numpy(output, sigma, np.asarray(end) + length * (n + 1) / 2)
        for n, w in zip(nodes, weights, strict=True)
    )
    expected = x - length[:, None, None] * integral
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    mean = gaussian.run(lambda: average_velocity(policy, x, *tau, warp))
    np.testing.assert_allclose(mean, integral, rtol=1e-10)


def test_slow_rates_have_the_limit_and_its_gradient(x64):
    """Around `g = 0`: value and derivative of `(exp(g) - 1) / g` by its series."""
    sizes = jnp.asarray([0.0, 1e-12, 1e-6, 0.9e-3, 1.1e-3, 1e-2])

    def displacement(g):
        rates = jnp.broadcast_to(g, (BATCH, SITES, K))
        output, x, _ = make(rates=rates)
        one = jnp.ones(BATCH)
        policy = ArcFlowPolicy.create(output, x, one)
        return jnp.sum(policy.displacement(x, one, 0 * one)), output

    value_and_slope = jax.jit(jax.value_and_grad(lambda g: displacement(g)[0]))
    output = make()[0]
    for g in sizes:
        value, slope = value_and_slope(g)
        weights = jax.nn.softmax(output.logweights, -1)[..., None] * output.means
        growing = -np.sum(weights[:, :, 1:])
        constant = -np.sum(weights[:, :, :1])
        series = 1 + g / 2 + g**2 / 6 + g**3 / 24 + g**4 / 120
        np.testing.assert_allclose(value, constant + growing * series, rtol=1e-9)
        expected = growing * (1 / 2 + g / 3 + g**2 / 8 + g**3 / 30)
        np.testing.assert_allclose(slope, expected, rtol=1e-5)


def test_the_first_component_does_not_grow():
    output, x, sigma = make()

    def loss(rates):
        policy = ArcFlowPolicy.create(output.replace(rates=rates), x, sigma)
        return jnp.sum(jnp.square(policy.velocity(x, sigma / 3)))

    gradient = jax.jit(jax.grad(loss))(output.rates)
    np.testing.assert_array_equal(gradient[..., 0], 0)
    assert np.all(gradient[..., 1:] != 0)


def test_dropped_components_are_gone_and_never_all():
    output, x, sigma = make()
    mask = jnp.asarray([[1, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]], bool)
    policy = ArcFlowPolicy.create(output, x, sigma)
    dropped = policy.drop(mask)
    u, whole = dropped.velocity(x, sigma), policy.velocity(x, sigma)
    np.testing.assert_allclose(u[0], output.means[0, :, 1], rtol=1e-5)
    np.testing.assert_allclose(u[1:], whole[1:], rtol=1e-6)
    assert np.isfinite(dropped.displacement(x, sigma, 0 * sigma)).all()


def test_imitation_vanishes_where_the_teacher_is_an_arc(x64):
    """`u = mu exp(g (1 - t))`: data at a point, approached at a growing speed."""
    mu = jax.random.normal(jax.random.key(5), (BATCH, SITES, C))
    growth, one = 1.5, jnp.ones(BATCH)
    x = jax.random.normal(jax.random.key(6), (BATCH, SITES, C))
    times = sample_intervals(jax.random.key(7), 2, one, 0 * one, 0.0)

    def teacher(x, t):
        return mu * jnp.exp(growth * (1 - t))[:, None, None]

    def loss(rate):
        output = ArcOutput(
            means=jnp.repeat(mu[:, :, None], K, 2),
            logweights=jnp.broadcast_to(jnp.asarray([-1e3, 0.0, -1e3, -1e3]), (BATCH, SITES, K)),
            rates=jnp.full((BATCH, SITES, K), rate),
        )
        policy = ArcFlowPolicy.create(output, x, one)
        loss, aux = imitation_loss(policy, teacher, x, one, one, times, TimeWarp())
        return loss, (policy, aux)

    value_and_slope = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, (policy, aux)), slope = value_and_slope(jnp.asarray(growth))
    assert value < 1e-24 and abs(slope) < 1e-10
    # One evaluation ends where the teacher's path ends, whatever the substeps.
    end = x - mu * (np.exp(growth) - 1) / growth
    np.testing.assert_allclose(aux.x_dst, end, rtol=1e-10)
    sampled = gaussian.run(
        lambda: few_step_sample(lambda x, t: policy, x, 1, TimeWarp(), total_substeps=1)
    )
    np.testing.assert_allclose(sampled, end, rtol=1e-10)
    (beside, _), slope = value_and_slope(jnp.asarray(1.2))
    assert beside > 1e-3 and slope < -1e-2


@pytest.mark.parametrize("field", ["means", "logweights", "rates"])
def test_wrong_shapes_are_named(field):
    output, x, sigma = make()
    wrong = output.replace(**{field: getattr(output, field)[:1]})
    if field == "means":  # the number of components is read off the means
        wrong = output.replace(means=output.means[..., :1])
    with pytest.raises(ValueError, match=f"ArcOutput.{field} has shape"):
        ArcFlowPolicy.create(wrong, x, sigma)
    with pytest.raises(ValueError, match="sigma_src has shape"):
        ArcFlowPolicy.create(output, x, sigma[:1])
