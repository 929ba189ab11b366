"""DX policy against the reference's vectors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax.flow.policies import DXPolicy
from tests import golden_files
from tests.golden_files import mixture_last, sites_last


@pytest.mark.parametrize("name", golden_files.names("dx_"))
def test_velocity_and_gradients_match_reference(name, x64):
    params, a = golden_files.load(name)
    x_src, sigma_src = sites_last(a["x_t_src"]), a["sigma_t_src"]
    output = mixture_last(a["denoising_output"])

    def make(output, x_src=x_src, sigma_src=sigma_src):
        return DXPolicy.create(
            output,
            x_src,
            sigma_src,
            params["segment_size"],
            params["shift"],
            params["mode"],
            params["eps"],
        )

    def weighted(output, x, sigma, w):
        u = make(output).velocity(x, sigma)
        return jnp.sum(u * w), u

    policy = make(output)
    np.testing.assert_allclose(policy.tau_src, a["raw_t_src"], rtol=1e-12)
    np.testing.assert_allclose(policy.tau_dst, a["raw_t_dst"], rtol=1e-12, atol=1e-15)
    single = [jnp.asarray(v, jnp.float32) for v in (output, x_src, sigma_src)]
    single = make(*single)
    grads = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1), has_aux=True))
    for i in range(a["sigma_t"].shape[0]):
        x, sigma = sites_last(a["x_t"][i]), a["sigma_t"][i]
        (_, u), (g, gx) = grads(output, x, sigma, sites_last(a["w"][i]))
        u32 = single.velocity(jnp.asarray(x, jnp.float32), jnp.asarray(sigma, jnp.float32))
        # An x_0 of order 1 is subtracted and divided by t: the rounding of both grows by 1 / t.
        amplitude = np.abs(x).max() / max(sigma.min(), params["eps"])
        for found, expected, unit in (
            (u, sites_last(a["u"][i]), 2.0**-52),
            (u32, sites_last(a["u"][i]), 2.0**-23),
            (g, mixture_last(a["grad_denoising_output"][i]), 2.0**-52),
            (gx, sites_last(a["grad_x_t"][i]), 2.0**-52),
        ):
            relative = 1e-9 if unit < 1e-9 else 2e-4
            atol = max(relative * np.abs(expected).max(), 100 * unit * amplitude)
            if unit > 1e-9 and np.any(np.isclose(sigma, 0, atol=2 * params["eps"])):
                continue  # float32 tau cannot resolve the grid there
            np.testing.assert_allclose(
                found, expected, rtol=0, atol=atol, err_msg=params["queries"][i]
            )


def test_grid_is_exact_for_linear_x0(x64):
    """Interpolating samples of a linear x_0(tau) reproduces it, whatever the spacing."""
    rng = np.random.default_rng(0)
    x_src, slope, offset = rng.normal(size=(3, 2, 5, 3))
    sigma_src = np.array([1.0, 0.8])
    tau_src = sigma_src / (3.2 - 2.2 * sigma_src)
    tau_dst = np.maximum(tau_src - 0.4, 0)
    tau = tau_dst[:, None] + np.linspace(0, 1, 6) * (tau_src - tau_dst)[:, None]
    x0 = offset[:, :, None] + slope[:, :, None] * tau[:, None, :, None]
    output = (x_src[:, :, None] - x0) / sigma_src[:, None, None, None]
    policy = DXPolicy.create(output, x_src, sigma_src, segment_size=0.4, shift=3.2)
    query = np.array([0.37, 0.2])
    query = tau_dst + query * (tau_src - tau_dst)
    t = 3.2 * query / (1 + 2.2 * query)
    x = rng.normal(size=x_src.shape)
    expected = (x - offset - slope * query[:, None, None]) / t[:, None, None]
    np.testing.assert_allclose(policy.velocity(x, t), expected, rtol=1e-12)


def test_a_policy_of_one_sample_takes_any_number_of_states():
    rng = np.random.default_rng(0)
    draws = (rng.normal(size=(1, 3, 4, 2)), rng.normal(size=(1, 3, 2)), np.array([0.9]))
    output, x_src, sigma_src = (a.astype(np.float32) for a in draws)
    x, t = rng.normal(size=(5, 3, 2)), np.linspace(0.1, 0.9, 5)
    one, many = (
        DXPolicy.create(*(np.repeat(a, count, 0) for a in (output, x_src, sigma_src)))
        for count in (1, 5)
    )
    np.testing.assert_allclose(one.velocity(x, t), many.velocity(x, t), rtol=1e-5)


def test_bad_arguments_are_named():
    x, sigma = jnp.ones((2, 3, 1)), jnp.ones((2,))
    with pytest.raises(ValueError, match="unknown DX mode 'spline'"):
        DXPolicy.create(jnp.ones((2, 3, 4, 1)), x, sigma, mode="spline")
    with pytest.raises(ValueError, match="not \\[B, \\*sites, N, C\\]"):
        DXPolicy.create(jnp.ones((2, 4, 1)), x, sigma)
