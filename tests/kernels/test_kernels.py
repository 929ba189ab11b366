"""The kernels, operation by operation, against the plain loop; what they are lowered to."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax.kernels.blocked import blocked_rollout, whole_rollout
from piflow_jax.kernels.mosaic import fits_on_chip, mosaic_rollout
from piflow_jax.kernels.recurrence import COLUMNS, Recurrence
from piflow_jax.kernels.triton import triton_rollout

BATCH, STEPS = 3, 5


def arguments(components, channels, sites, trips=(5, 3, 1)):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    table = 0.5 * normal(BATCH, COLUMNS, STEPS)
    arrived = np.arange(STEPS) >= np.asarray(trips)[:, None]
    moves = [Recurrence._fields.index(name) for name in ("step", "step_previous")]
    for column in moves:
        table = table.at[:, column].set(jnp.where(arrived, 0, table[:, column]))
    logweights = normal(BATCH, components, sites).at[0, 0].set(-jnp.inf if components > 1 else 0)
    return (
        normal(BATCH, components, channels, sites),
        logweights,
        *(normal(BATCH, channels, sites) for _ in range(3)),
        table,
        jnp.asarray(trips, jnp.int32),
    )


def expected_end(offsets, logweights, center, residual_src, residual, table, trips):
    """The recurrence of `Recurrence`, in float64, sample by sample."""
    ends = []
    for b in range(BATCH):
        d, a, r, ys, y = (
            np.asarray(v[b], np.float64)
            for v in (offsets, logweights, center, residual_src, residual)
        )
        before = np.zeros_like(y)
        for n in range(int(trips[b])):
            of = Recurrence(*np.asarray(table[b, :, n], np.float64))
            e = of.pull * y + of.pull_src * ys + of.pull_center * r
            w = np.exp(a + (d * e).sum(1) - of.half_zeta * (d * d).sum(1))
            mean = (w[:, None] * d).sum(0) / w.sum(0)
            g = of.gain * y + of.gain_src * ys + of.gain_center * r - of.gain_offset * mean
            y, before = y + of.step * g + of.step_previous * before, g
        ends.append(y)
    return np.stack(ends)


KERNELS = {
    "whole": whole_rollout,
    "blocked": blocked_rollout,
    "mosaic": functools.partial(mosaic_rollout, interpret=True),
    "triton": functools.partial(triton_rollout, interpret=True),
}


# One site, and more than a row, a register or a block of threads, in no multiple of it.
@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 2, 150)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_compute_the_recurrence(kernel, sizes):
    given = arguments(*sizes)
    found = jax.jit(KERNELS[kernel])(*given)
    np.testing.assert_allclose(found, expected_end(*given), rtol=0, atol=2e-5)


def test_blocks_are_many_when_the_mixture_is_large(monkeypatch):
    """Several blocks on several threads, the last one padded."""
    monkeypatch.setattr("piflow_jax.kernels.blocked.CACHE", 3000)
    monkeypatch.setattr("piflow_jax.kernels.blocked.SMALL", 0)
    given = arguments(3, 2, 150)
    found = jax.jit(lambda *a: blocked_rollout(*a))(*given)
    np.testing.assert_allclose(found, expected_end(*given), rtol=0, atol=2e-5)


def test_a_large_mixture_is_not_held_in_registers(monkeypatch):
    monkeypatch.setattr("piflow_jax.kernels.triton.REGISTERS", 0)
    given = arguments(2, 2, 3)
    found = jax.jit(lambda *a: triton_rollout(*a, interpret=True))(*given)
    np.testing.assert_allclose(found, expected_end(*given), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("kernel", "platform", "target"),
    [(mosaic_rollout, "tpu", "tpu_custom_call"), (triton_rollout, "cuda", "triton")],
)
def test_kernels_are_lowered_for_their_platforms(kernel, platform, target):
    """To Mosaic and to Triton; what their compilers make of it is not seen here."""
    with a_gpu() if platform == "cuda" else contextlib.nullcontext():
        traced = jax.jit(kernel).trace(*arguments(2, 1, 130))
        assert target in traced.lower(lowering_platforms=(platform,)).as_text()


def a_gpu():
    """A GPU that is not there, which Triton's lowering asks for from JAX 0.12 on."""
    if not hasattr(jax.sharding, "AbstractDevice"):
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100", num_cores=None, platform="gpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


@pytest.mark.gpu
def test_on_a_gpu_it_is_the_plain_loop():
    for sizes in ((32, 4, 1024), (8, 64, 256), (16, 1, 64)):
        given = arguments(*sizes)
        found = jax.jit(triton_rollout)(*given)
        np.testing.assert_allclose(found, expected_end(*given), rtol=0, atol=1e-4)


def test_a_mixture_too_large_for_a_tpus_memory_is_not_fused():
    assert fits_on_chip(32, 4) and fits_on_chip(8, 64)
    assert not fits_on_chip(32, 64)
