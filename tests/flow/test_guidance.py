"""Guided velocities against the reference's vectors."""

import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax.flow.guidance import guided_velocity
from tests import golden_files
from tests.golden_files import sites_last


@pytest.mark.parametrize("name", golden_files.names("forward_u_"))
def test_guided_teacher_matches_reference(name):
    params, a = golden_files.load(name)
    scale_t = params["num_timesteps"]
    interval = tuple(edge / scale_t for edge in params["guidance_interval"])
    x, sigma = sites_last(a["x_t"]), a["t"] / scale_t

    def velocity(labels):
        b = (a["t"] / scale_t)[:, None, None, None] * a["b"] + a["E"][labels][:, None, None]
        return np.tanh(np.einsum("oc,bhwc->bhwo", a["A"], x)) + b

    cond, uncond = velocity(a["class_labels"]), velocity(a["negative_labels"])
    for i, scale in enumerate(params["guidance_scale"]):
        u = guided_velocity(
            jnp.asarray(cond),
            jnp.asarray(uncond),
            scale,
            jnp.asarray(sigma),
            interval,
            params["orthogonal_guidance"],
            x,
        )
        np.testing.assert_allclose(u, sites_last(a[f"u_{i}"]), rtol=2e-5, atol=2e-5)


def test_orthogonal_guidance_matches_reference(x64):
    params, a = golden_files.load("guidance_jit_a.npz")
    cond, uncond = sites_last(a["pos"]), sites_last(a["neg"])
    sigma = jnp.full((cond.shape[0],), 0.5)
    # The axis is x_0 = x - sigma u_c: choose x so that it is the recorded one.
    x = sites_last(a["orthogonal_axis"]) + 0.5 * cond
    for i, orthogonal in enumerate(params["orthogonal"]):
        scale = jnp.asarray(a["guidance_scale"])
        u = guided_velocity(cond, uncond, scale, sigma, orthogonal=orthogonal, x=x)
        np.testing.assert_allclose(u - cond, sites_last(a[f"bias_{i}"]), rtol=1e-9, atol=1e-12)


def test_interval_includes_both_ends():
    sigma = jnp.asarray([0.1, 0.2, 0.4, 0.6, 0.7])
    u = guided_velocity(jnp.ones((5, 1)), jnp.zeros((5, 1)), 3.0, sigma, (0.2, 0.6))
    np.testing.assert_allclose(u[:, 0], [1, 3, 3, 3, 1])


def test_orthogonal_guidance_needs_the_state():
    ones = jnp.ones((1, 1))
    with pytest.raises(ValueError, match="needs the state x"):
        guided_velocity(ones, ones, 2.0, jnp.ones((1,)), orthogonal=1.0)
