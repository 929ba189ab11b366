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


def long_inputs(dtype, length=300, batch=2, heads=3, head=8):
    """Queries, keys, values and weights of outputs, and a mask that hides a fifth of the keys."""
    rng = np.random.default_rng(0)
    draws = rng.standard_normal((4, batch, length, heads, head))
    return [jnp.asarray(x, dtype) for x in draws], jnp.asarray(rng.random((batch, length)) > 0.2)


def grads_of(inputs, mask):
    def weighted(q, k, v, weight):
        return jnp.sum(layers.attend(q, k, v, key_mask=mask) * weight)

    return jax.grad(weighted, (0, 1, 2))(*inputs)


@pytest.mark.parametrize("masked", [False, True])
def test_long_sequences_attend_in_pieces_to_the_same_result(monkeypatch, masked):
    """Of a length that pieces do not divide, in float64: values and gradients."""
    with jax.enable_x64(True):
        inputs, mask = long_inputs(jnp.float64)
        mask = mask if masked else None
        expected = layers.attend(*inputs[:3], key_mask=mask), *grads_of(inputs, mask)
        monkeypatch.setattr(layers, "SCORES", 3 * 300 * 130)
        assert "scan" in str(jax.make_jaxpr(layers.attend)(*inputs[:3]))
        found = layers.attend(*inputs[:3], key_mask=mask), *grads_of(inputs, mask)
    for ours, whole in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, whole, rtol=0, atol=1e-13)


def test_gradients_of_pieces_add_up_in_float32(monkeypatch):
    """In bfloat16, those of many pieces are as close to the exact ones as those of one."""
    exact = grads_of(*long_inputs(jnp.float32, length=2048))
    rounded = [x.astype(jnp.bfloat16) for x in long_inputs(jnp.float32, length=2048)[0]]

    def error():
        found = grads_of(rounded, long_inputs(jnp.float32, length=2048)[1])
        return [
            float(jnp.linalg.norm(ours - true) / jnp.linalg.norm(true))
            for ours, true in zip(found, exact, strict=True)
        ]

    one_piece = error()
    monkeypatch.setattr(layers, "SCORES", 1)
    for many, one in zip(error(), one_piece, strict=True):
        assert many < 1.1 * one


@pytest.mark.parametrize("backward", [False, True])
def test_scores_are_not_all_in_memory(monkeypatch, backward):
    """At 2,048 tokens the scores of an example and a head are 16 MiB in float32."""
    inputs, _ = long_inputs(jnp.float32, length=2048, batch=1, heads=4)
    program = jax.jit(
        (lambda *inputs: grads_of(inputs, None)) if backward else layers.attend,
    )
    shapes = inputs if backward else inputs[:3]
    monkeypatch.setattr(layers, "SCORES", 2**20)
    memory = program.lower(*shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2**25  # two pieces of 4 MiB in both passes, and tokens
