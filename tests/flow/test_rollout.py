"""Rollouts and mean velocities against the reference's vectors, and the orders of their error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax.flow.policies import DXPolicy, GMFlowPolicy, GMOutput
from piflow_jax.flow.rollout import average_velocity, rollout
from piflow_jax.flow.schedule import TimeWarp
from tests import golden_files
from tests.golden_files import mixture_last, sites_last


def warp_of(params):
    if params["dynamic_shifting"] is None:
        return TimeWarp(params["shift"])
    # Defaults of the reference's resolution-dependent shift.
    slope = (1.15 - 0.5) / (4096 - 256)
    return TimeWarp(float(np.exp((params["dynamic_shifting"]["seq_len"] - 256) * slope + 0.5)))


def outputs_and_factory(params, a, warp, dtype):
    x_src = jnp.asarray(sites_last(a["x_t_src"]), dtype)
    sigma_src = jnp.asarray(a["sigma_t_src"], dtype)
    if params["kind"] == "DX":
        output = jnp.asarray(mixture_last(a["denoising_output"]), dtype)
        return output, lambda output: DXPolicy.create(
            output,
            x_src,
            sigma_src,
            params["segment_size"],
            params["shift"],
            params["mode"],
            params["policy_eps"],
        )
    output = GMOutput(
        jnp.asarray(mixture_last(a["means"]), dtype),
        jnp.asarray(mixture_last(a["logweights"])[..., 0], dtype),
        jnp.asarray(a["logstds"].reshape(-1), dtype),
    )
    return output, lambda output: GMFlowPolicy.create(output, x_src, sigma_src, params["eps"])


@pytest.mark.parametrize("name", golden_files.names("rollout_"))
def test_matches_reference(name, x64):
    params, a = golden_files.load(name)
    warp, total = warp_of(params), params["total_substeps"]
    start = sites_last(a["x_t_start"]), a["raw_t_start"]
    output, factory = outputs_and_factory(params, a, warp, np.float64)

    @jax.jit
    def run(output, tau_end, w):
        def weighted(output):
            x_end, sigma_end = rollout(factory(output), *start, tau_end, warp, total)
            return jnp.sum(x_end * w), (x_end, sigma_end)

        (_, ends), grads = jax.value_and_grad(weighted, has_aux=True)(output)
        policy = factory(output)
        return (
            ends,
            grads,
            average_velocity(policy, *start, tau_end, warp, total, 1e-4),
            rollout(policy, *start, tau_end, warp, total, bound="traced"),
        )

    for i in range(len(params["ends"])):
        (x_end, sigma_end), grads, average, traced = run(
            output, a[f"raw_t_end_{i}"], sites_last(a[f"w_{i}"])
        )
        noise = 100 * a[f"conditioning_{i}"]
        expected = sites_last(a[f"x_t_end_{i}"])
        atol = max(1e-9 * np.abs(expected).max(), noise)
        np.testing.assert_allclose(x_end, expected, rtol=0, atol=atol)
        np.testing.assert_allclose(traced[0], expected, rtol=0, atol=atol)
        np.testing.assert_allclose(
            sigma_end, a[f"sigma_t_end_{i}"].reshape(-1), rtol=1e-9, atol=1e-12
        )
        expected = sites_last(a[f"average_u_{i}"])
        np.testing.assert_allclose(
            average, expected, rtol=0, atol=max(1e-9 * np.abs(expected).max(), 1e4 * noise)
        )
        if params["kind"] == "DX":
            pairs = [(grads, mixture_last(a[f"grad_denoising_output_{i}"]))]
        else:
            pairs = [
                (grads.means, mixture_last(a[f"grad_means_{i}"])),
                (grads.logweights, mixture_last(a[f"grad_logweights_{i}"])[..., 0]),
                (grads.logstd, a[f"grad_logstds_{i}"].reshape(-1)),
            ]
        for found, expected in pairs:
            atol = max(1e-9 * np.abs(expected).max(), 100 * noise)
            np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("name", golden_files.names("rollout_"))
def test_float32_matches_reference(name):
    params, a = golden_files.load(name)
    warp = warp_of(params)
    output, factory = outputs_and_factory(params, a, warp, np.float32)
    run = jax.jit(
        lambda output, x, start, end: rollout(
            factory(output), x, start, end, warp, params["total_substeps"]
        )[0]
    )
    for i in range(2):
        single = [
            jnp.asarray(value, jnp.float32)
            for value in (sites_last(a["x_t_start"]), a["raw_t_start"], a[f"raw_t_end_{i}"])
        ]
        expected = sites_last(a[f"x_t_end_{i}"])
        found = run(output, *single)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4 * np.abs(expected).max())


class Exponential:
    """`u = x`, whose exact rollout in `t` is an exponential."""

    def velocity(self, x, sigma):
        return x


def test_euler_converges_at_first_order(x64):
    x, one = jnp.ones((1, 1)), jnp.ones((1,))
    errors = []
    for total in (64, 128, 256):
        x_end, _ = rollout(Exponential(), x, one, 0 * one, TimeWarp(3.2), total)
        errors.append(abs(float(x_end[0, 0]) - np.exp(-1)))
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    np.testing.assert_allclose(orders, 1, atol=0.05)


def test_samples_with_fewer_substeps_wait(x64):
    """Each sample of a ragged batch ends where it would alone."""
    x = jnp.asarray([[1.0], [2.0], [3.0]])
    start, end = jnp.asarray([1.0, 0.5, 0.3]), jnp.asarray([0.0, 0.4, 0.3])
    together, sigma = rollout(Exponential(), x, start, end, TimeWarp(), 40)
    for i in range(3):
        alone, _ = rollout(
            Exponential(), x[i : i + 1], start[i : i + 1], end[i : i + 1], TimeWarp(), 40
        )
        np.testing.assert_allclose(together[i], alone[0], rtol=1e-13)
    np.testing.assert_allclose(sigma, end)


def test_tight_bound_takes_longer_steps_but_arrives(x64):
    x, one = jnp.ones((1, 1)), jnp.ones((1,))
    x_end, sigma = rollout(Exponential(), x, one, 0 * one, TimeWarp(), 128, bound=8)
    np.testing.assert_allclose(x_end[0, 0], (1 - 1 / 8) ** 8, rtol=1e-12)
    np.testing.assert_allclose(sigma, 0, atol=1e-15)


def test_no_substeps_are_refused():
    with pytest.raises(ValueError, match="total_substeps must be at least 1"):
        rollout(Exponential(), jnp.ones((1, 1)), jnp.ones((1,)), jnp.zeros((1,)), TimeWarp(), 0)
