"""Time warp, segments and sampling times against the reference's vectors."""

import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax.flow.schedule import (
    Segments,
    TimeWarp,
    sampling_times,
    segment_start,
)
from tests import golden_files


@pytest.mark.parametrize("name", golden_files.names("warp_a"))
def test_warp_matches_reference(name, x64):
    params, a = golden_files.load(name)
    warp = TimeWarp(params["shift"])
    np.testing.assert_allclose(warp.warp(a["raw_t"]), a["warped"], rtol=1e-12)
    np.testing.assert_allclose(warp.unwarp(a["raw_t"]), a["unwarped"], rtol=1e-12)
    np.testing.assert_allclose(warp.unwarp(warp.warp(a["raw_t"])), a["raw_t"], rtol=1e-9)


@pytest.mark.parametrize("name", golden_files.names("warp_dynamic"))
def test_warp_takes_resolution_dependent_shifts(name, x64):
    _, a = golden_files.load(name)
    for shift, warped, unwarped in zip(a["shift"], a["warped"], a["unwarped"], strict=True):
        warp = TimeWarp(float(shift))
        np.testing.assert_allclose(warp.warp(a["raw_t"]), warped, rtol=1e-12)
        np.testing.assert_allclose(warp.unwarp(a["raw_t"]), unwarped, rtol=1e-12)


@pytest.mark.parametrize("name", golden_files.names("sample_t_"))
def test_segment_start_matches_reference(name, x64):
    params, a = golden_files.load(name)
    nfe, f = params["nfe"], params["final_step_size_scale"]
    for suffix, dtype in (("64", np.float64), ("", np.float32)):
        tau = jnp.asarray(1 - a[f"uniforms{suffix}"], dtype)
        tau_src, size = segment_start(tau, nfe, f, params["eps"])
        assert tau_src.dtype == dtype
        base = 1 / (nfe - 1 + f)
        # A draw on a border may fall on either side by rounding.
        border = np.abs((np.asarray(tau) / base + (1 - f)) % 1)
        border = np.minimum(border, 1 - border) < 1e-6
        inner = ~border
        rtol = 1e-9 if suffix else 1e-6
        np.testing.assert_allclose(tau_src[inner], a[f"raw_t_src{suffix}"][inner], rtol=rtol)
        np.testing.assert_allclose(size[inner], a[f"segment_size{suffix}"][inner], rtol=rtol)
        assert inner.sum() >= 8
        sigma = TimeWarp(params["shift"]).warp(tau_src)
        np.testing.assert_allclose(sigma[inner], a[f"sigma_t_src{suffix}"][inner], rtol=rtol)


def test_segments_tile_the_unit_interval():
    for nfe, f in ((1, 1.0), (2, 1.0), (4, 0.5), (8, 0.5), (3, 1.5)):
        tau = jnp.linspace(1e-3, 1, 997)
        tau_src, size = segment_start(tau, nfe, f)
        assert len(np.unique(np.round(tau_src, 5))) == nfe
        assert np.all(tau_src >= tau - 1e-6) and np.all(tau_src - size <= tau + 1e-6)


def test_zero_segments_are_refused():
    with pytest.raises(ValueError, match="nfe must be at least 1"):
        segment_start(jnp.ones((1,)), 0)
    with pytest.raises(ValueError, match="h must be at least 0"):
        sampling_times(2, TimeWarp(), h=-1.0)


@pytest.mark.parametrize(
    "name", [n for n in golden_files.names("flowmapsde_") if "dynamic" not in n]
)
def test_sampling_times_match_reference(name, x64):
    params, a = golden_files.load(name)
    scale = params.get("num_train_timesteps", 1)
    h = float(params["h"])
    for nfe in params["nfe"]:
        times = sampling_times(nfe, TimeWarp(params["shift"]), params["final_step_size_scale"], h)
        # The reference computes in float32.
        for found, expected in (
            (times.src, a[f"timesteps_{nfe}"] / scale),
            (times.dst, a[f"timesteps_dst_{nfe}"] / scale),
            (times.to, a[f"sigmas_{nfe}"][1:]),
            (times.m, a[f"m_vals_{nfe}"]),
        ):
            np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)
        for i in range(nfe):
            to, m = times.to[i], times.m[i]
            stepped = (1 - to + to * m) * a[f"step_x_t_dst_{nfe}"][i]
            stepped = stepped + to * np.sqrt(1 - m**2) * a[f"step_noise_{nfe}"][i]
            np.testing.assert_allclose(stepped, a[f"step_out_{nfe}"][i], rtol=1e-4, atol=1e-4)


def test_sampling_times_take_resolution_dependent_shifts():
    params, a = golden_files.load("flowmapsde_a_dynamic.npz")
    slope = (params["max_logshift"] - params["base_logshift"]) / (
        params["max_seq_len"] - params["base_seq_len"]
    )
    logshift = (params["seq_len"] - params["base_seq_len"]) * slope + params["base_logshift"]
    for nfe in (1, 4):
        times = sampling_times(nfe, TimeWarp(float(np.exp(logshift))), 0.5)
        np.testing.assert_allclose(times.src, a[f"timesteps_{nfe}"], rtol=1e-5)
        np.testing.assert_allclose(times.dst, a[f"timesteps_dst_{nfe}"], rtol=1e-5)


@pytest.mark.parametrize(("nfe", "scale"), [(1, 1.0), (1, 0.5), (2, 3.0), (4, 0.5), (8, 1.0)])
def test_the_longest_segment_is_the_longest_that_a_time_can_be_in(nfe, scale):
    _, sizes = segment_start(jnp.linspace(1e-3, 1, 500), nfe, scale)
    np.testing.assert_allclose(Segments(nfe, scale).longest, jnp.max(sizes), rtol=1e-6)


def test_what_has_no_longest_segment_is_refused():
    with pytest.raises(ValueError, match="nfe must be at least 1"):
        Segments(0)
