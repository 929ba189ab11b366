"""Attention: cuDNN's where it can be had, and a word in the log where it cannot."""

import functools
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax.models import attention
from piflow_jax.models.dit import DiT
from tests import tpu_compiler
from tests.compiled import on_devices
from tests.models.small import SMALL, apply, random_params, small_inputs


@pytest.fixture
def log(caplog):
    attention._say_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="absl"):
        yield caplog


@pytest.mark.parametrize(
    ("implementation", "words"),
    [("cudnn", "the backend is cpu"), ("splash", "splash attention is for TPUs")],
)
def test_what_a_cpu_lacks_is_replaced_and_the_log_says_so(log, implementation, words):
    module = DiT(**SMALL, attention=implementation)
    params = random_params(module)
    inputs = small_inputs()
    expected = apply(module.clone(attention=None), params, *inputs)
    np.testing.assert_array_equal(apply(module, params, *inputs), expected)
    (record,) = log.records
    assert words in record.message


def test_the_log_has_what_jax_says_of_arrays_that_cudnn_refuses(log, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    q = jnp.ones((1, 4, 2, 8))
    for _ in range(2):
        np.testing.assert_allclose(attention.attend(q, q, q, "cudnn"), q, rtol=1e-6)
    (record,) = log.records
    assert "q float32[1, 4, 2, 8]" in record.message


@pytest.mark.parametrize(
    ("length", "head", "masked"), [(300, 8, True), (300, 128, False), (256, 72, False)]
)
def test_splash_attention_agrees_with_float64(length, head, masked):
    """In the kernel's interpreter, of lengths that tiles divide or not: values and gradients."""
    inputs, mask = long_inputs(jnp.float32, length, head=head)
    mask = mask if masked else None

    def weighted(attend, q, k, v, weight):
        out = attend(q, k, v)
        return jnp.sum(out * weight), out

    def results(attend, *inputs):
        function = functools.partial(weighted, attend)
        (_, out), grads = jax.value_and_grad(function, (0, 1, 2), has_aux=True)(*inputs)
        return out, *grads

    ours = functools.partial(attention.splash, key_mask=mask, interpret=True)
    found = results(ours, *inputs)
    with jax.enable_x64(True):
        exact = (jnp.asarray(np.asarray(x, np.float64)) for x in inputs)
        expected = results(functools.partial(attention.attend, key_mask=mask), *exact)
    for ours, true in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, true, rtol=0, atol=2e-5)


def test_splash_attention_is_in_programs_for_tpus_alone():
    module = DiT(**SMALL, attention="splash")
    traced = jax.jit(module.apply).trace(random_params(module), *small_inputs())
    for platform, kernels in (("cpu", 0), ("tpu", 1)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert text.count("tpu_custom_call") == kernels


@pytest.mark.gpu
@pytest.mark.parametrize("head", [64, 72])
def test_cudnn_agrees_with_xla(log, head):
    """With DiT-XL/2's heads of 72, values and gradients in bfloat16."""
    draws = jax.random.normal(jax.random.key(0), (4, 2, 256, 16, head), jnp.float32)
    q, k, v, weight = draws.astype(jnp.bfloat16)

    def value_and_grads(implementation):
        def weighted(q, k, v):
            out = attention.attend(q, k, v, implementation).astype(jnp.float32)
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
        return jnp.sum(attention.attend(q, k, v, key_mask=mask) * weight)

    return jax.grad(weighted, (0, 1, 2))(*inputs)


@pytest.mark.parametrize("masked", [False, True])
def test_long_sequences_attend_in_pieces_to_the_same_result(monkeypatch, masked):
    """Of a length that pieces do not divide, in float64: values and gradients."""
    with jax.enable_x64(True):
        inputs, mask = long_inputs(jnp.float64)
        mask = mask if masked else None
        expected = attention.attend(*inputs[:3], key_mask=mask), *grads_of(inputs, mask)
        monkeypatch.setattr(attention, "SCORES", 3 * 300 * 130)
        assert "scan" in str(jax.make_jaxpr(attention.attend)(*inputs[:3]))
        found = attention.attend(*inputs[:3], key_mask=mask), *grads_of(inputs, mask)
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
    monkeypatch.setattr(attention, "SCORES", 1)
    for many, one in zip(error(), one_piece, strict=True):
        assert many < 1.1 * one


@pytest.mark.parametrize("backward", [False, True])
def test_scores_are_not_all_in_memory(monkeypatch, backward):
    """At 2,048 tokens the scores of an example and a head are 16 MiB in float32."""
    inputs, _ = long_inputs(jnp.float32, length=2048, batch=1, heads=4)
    program = jax.jit(
        (lambda *inputs: grads_of(inputs, None)) if backward else attention.attend,
    )
    shapes = inputs if backward else inputs[:3]
    monkeypatch.setattr(attention, "SCORES", 2**20)
    memory = program.lower(*shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2**25  # two pieces of 4 MiB in both passes, and tokens


def test_devices_attend_to_their_own_examples_and_heads():
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, Path(__file__).parent / "split_attention.py"],
        env=os.environ | on_devices(8) | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert all(case.pop("error") < 1e-5 for case in found.values())
    assert found["divided"] == {"moves": 0, "part": [1, 100, 1, 8]}
    assert found["whole"]["part"] == [3, 100, 3, 8]


COMPILE = """
import functools, json, re
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from piflow_jax.models.attention import attend
from piflow_jax.parallel.mesh import device_mesh
from piflow_jax.parallel.topology import topology_devices

mesh = device_mesh(data=2, tensor=2, devices=topology_devices("v5e:2x2"))
split = NamedSharding(mesh, P(("data", "fsdp"), None, "tensor"))

def weighted(q, k, v):
    return attend(q, k, v, "splash").astype(jnp.float32).sum()

found = []
for shape in ((4, 4608, 4, 128), (4, 256, 16, 72)):  # of FLUX.1 and DiT-XL/2
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=split)
    with jax.set_mesh(mesh):
        step = jax.jit(jax.grad(weighted, (0, 1, 2))).lower(x, x, x).compile()
    moves = re.findall("all-reduce|all-gather|all-to-all|collective-permute", step.as_text())
    found.append((step.as_text().count('custom_call_target="tpu_custom_call"'), len(moves)))
print(json.dumps(found))
"""


@pytest.mark.tpu
def test_splash_attention_compiles_for_tpus():
    """Three kernels, of which two are the backward pass's, and nothing moves between devices."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env=tpu_compiler.environment() | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [[3, 0], [3, 0]]
