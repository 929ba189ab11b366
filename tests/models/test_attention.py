"""Attention: cuDNN's where it can be had, and a word in the log where it cannot."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax.models import layers
from piflow_jax.models.dit import DiT
from tests.models.small import SMALL, apply, random_params, small_inputs


@pytest.fixture
def log(caplog):
    layers._say_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="absl"):
        yield caplog


def test_cudnn_is_replaced_where_there_is_none_and_the_log_says_so(log):
    module = DiT(**SMALL, attention="cudnn")
    params = random_params(module)
    inputs = small_inputs()
    expected = apply(module.clone(attention=None), params, *inputs)
    np.testing.assert_array_equal(apply(module, params, *inputs), expected)
    (record,) = log.records
    assert "the backend is cpu" in record.message


def test_the_log_has_what_jax_says_of_arrays_that_cudnn_refuses(log, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    q = jnp.ones((1, 4, 2, 8))
    for _ in range(2):
        np.testing.assert_allclose(layers.attend(q, q, q, "cudnn"), q, rtol=1e-6)
    (record,) = log.records
    assert "q float32[1, 4, 2, 8]" in record.message


@pytest.mark.gpu
@pytest.mark.parametrize("head", [64, 72])
def test_cudnn_agrees_with_xla(log, head):
    """With DiT-XL/2's heads of 72, values and gradients in bfloat16."""
    draws = jax.random.normal(jax.random.key(0), (4, 2, 256, 16, head), jnp.float32)
    q, k, v, weight = draws.astype(jnp.bfloat16)

    def value_and_grads(implementation):
        def weighted(q, k, v):
            out = layers.attend(q, k, v, implementation).astype(jnp.float32)
            return jnp.sum(out * weight.astype(jnp.float32)), out

        return jax.jit(jax.value_and_grad(weighted, (0, 1, 2), has_aux=True))(q, k, v)

    (_, ours), grads = value_and_grads("cudnn")
    (_, expected), expected_grads = value_and_grads("xla")
    assert not log.records
    np.testing.assert_allclose(ours, expected, atol=2e-2)
    for a, b in zip(grads, expected_grads, strict=True):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        assert jnp.linalg.norm(a - b) < 2e-2 * jnp.linalg.norm(b)
