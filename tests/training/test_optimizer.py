"""The optimiser and its average, against the reference and against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from piflow_jax.config import OptimizerConfig
from piflow_jax.training.optimizer import (
    clip_after,
    karras_decay,
    learning_rate,
    make_optimizer,
    update_ema,
)
from tests import golden_files

# --- The average --------------------------------------------------------------------------------


def test_karras_average_matches_the_reference(x64):
    params, a = golden_files.load("ema_karras.npz")
    start, gamma = params["start_iter"], params["gamma"]
    np.testing.assert_allclose(
        karras_decay(a["iteration"], start, gamma), a["momentum"], rtol=1e-12, atol=1e-15
    )
    averages = jax.vmap(lambda step: update_ema(a["ema"], a["param"], step, start, gamma))
    np.testing.assert_allclose(averages(a["iteration"]), a["lerp"], rtol=1e-12)
    assert min(a["iteration"]) < start < max(a["iteration"])


def test_average_is_exact_in_float32_up_to_rounding():
    params, a = golden_files.load("ema_karras.npz")
    decay = karras_decay(jnp.asarray(a["iteration"]), params["start_iter"], params["gamma"])
    assert decay.dtype == jnp.float32
    # 1 - 1/t loses up to 6e-8 and the power multiplies it by gamma + 1.
    np.testing.assert_allclose(decay, a["momentum"], rtol=1e-6, atol=1e-15)


def test_average_is_a_copy_before_its_start_and_keeps_types():
    ema = {"a": jnp.full((3,), 7.0), "b": jnp.full((2,), 7.0, jnp.bfloat16)}
    params = {"a": jnp.asarray([0.1, 1e-9, 1e9]), "b": jnp.asarray([1.0, 2.0], jnp.bfloat16)}
    for step in (0, 99, 100):  # at the start itself the average has one member
        averaged = update_ema(ema, params, jnp.asarray(step), 100, 7.0)
        jax.tree.map(np.testing.assert_array_equal, averaged, params)
    averaged = update_ema(ema, params, jnp.asarray(101), 100, 7.0)
    decay = 0.5**8
    np.testing.assert_allclose(
        averaged["a"], decay * 7 + (1 - decay) * params["a"], rtol=1e-6, atol=1e-6
    )
    assert averaged["b"].dtype == jnp.bfloat16


def test_an_average_of_a_constant_is_that_constant():
    params = jnp.asarray([0.1, -3.0])
    ema = params
    for step in (3, 4, 1000, 100000):
        ema = update_ema(ema, params, jnp.asarray(step), 3, 7.0)
    np.testing.assert_array_equal(ema, params)


# --- Clipping -----------------------------------------------------------------------------------


def test_clipping_starts_after_its_start_and_is_by_the_global_norm():
    transformation = clip_after(5.0, 2)
    grads = {"a": jnp.asarray([6.0, 0.0]), "b": jnp.asarray([[8.0]])}  # of norm 10
    state = transformation.init(grads)
    update = jax.jit(transformation.update)
    for _ in range(2):
        updates, state = update(grads, state)
        jax.tree.map(np.testing.assert_array_equal, updates, grads)
    for _ in range(2):
        updates, state = update(grads, state)
        np.testing.assert_allclose(updates["a"], [3.0, 0.0], rtol=1e-6)
        np.testing.assert_allclose(updates["b"], [[4.0]], rtol=1e-6)
    assert state.count == 4
    small = jax.tree.map(lambda g: 0.5 * g, grads)  # of norm 5, the largest that is let through
    updates, _ = update(small, state)
    jax.tree.map(np.testing.assert_array_equal, updates, small)


def test_clipping_survives_zero_gradients_and_keeps_types():
    transformation = clip_after(5.0, 0)
    grads = {"a": jnp.zeros((2,)), "b": jnp.zeros((1,), jnp.bfloat16)}
    updates, _ = transformation.update(grads, transformation.init(grads))
    jax.tree.map(np.testing.assert_array_equal, updates, grads)
    assert updates["b"].dtype == jnp.bfloat16


# --- Learning rate ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("decay", "middle", "end"),
    [
        ("constant", 1.0, 1.0),
        ("linear", 0.51, 0.02),
        ("cosine", 0.51, 0.02),  # half way, a cosine is at the mean of its ends
    ],
)
def test_learning_rate_warms_up_and_decays(decay, middle, end):
    peak, warmup, steps = 2e-4, 100, 1100
    config = OptimizerConfig(learning_rate=peak, warmup_steps=warmup, decay=decay)
    rate = learning_rate(config, steps)
    np.testing.assert_allclose(rate(0), 1e-3 * peak, rtol=1e-5)
    np.testing.assert_allclose(rate(50), 0.5005 * peak, rtol=1e-5)
    np.testing.assert_allclose(rate(warmup), peak, rtol=1e-5)
    np.testing.assert_allclose(rate(600), middle * peak, rtol=1e-5)
    for step in (steps, steps + 500):
        np.testing.assert_allclose(rate(step), end * peak, rtol=1e-5)
    rates = np.asarray([rate(step) for step in range(0, warmup + 1, 10)])
    assert np.all(np.diff(rates) > 0)
    rates = np.asarray([rate(step) for step in range(warmup, steps, 50)])
    assert np.all(np.diff(rates) <= 0)


def test_without_warm_up_the_peak_comes_first():
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=0, decay="linear")
    rate = learning_rate(config, 10)
    np.testing.assert_allclose([rate(0), rate(10)], [0.1, 0.002], rtol=1e-5)


# --- The whole optimiser ------------------------------------------------------------------------


def numpy_adamw(config, params, gradients):
    """Clipping after warm-up, AdamW with bias correction and decoupled decay, as published."""
    m, v = np.zeros_like(params), np.zeros_like(params)
    for step, gradient in enumerate(gradients):
        if step >= config.warmup_steps:
            gradient = gradient / max(1.0, np.linalg.norm(gradient) / config.grad_clip)
        m = config.beta1 * m + (1 - config.beta1) * gradient
        v = config.beta2 * v + (1 - config.beta2) * gradient**2
        m_hat = m / (1 - config.beta1 ** (step + 1))
        v_hat = v / (1 - config.beta2 ** (step + 1))
        share = min(1.0, 1e-3 + (1 - 1e-3) * step / config.warmup_steps)
        direction = m_hat / (np.sqrt(v_hat) + 1e-8) + config.weight_decay * params
        params = params - config.learning_rate * share * direction
        yield params


def test_updates_are_those_of_adamw(x64):
    config = OptimizerConfig(
        learning_rate=0.1, warmup_steps=2, weight_decay=0.3, grad_clip=1.0, beta1=0.8, beta2=0.9
    )
    rng = np.random.default_rng(0)
    start = rng.standard_normal(4)
    # The norm changes from step to step, so that Adam cannot hide a forgotten clip.
    gradients = [scale * rng.standard_normal(4) for scale in (3.0, 0.1, 5.0, 0.05)]
    optimizer = make_optimizer(config, 10)
    params, state = jnp.asarray(start), optimizer.init(jnp.asarray(start))
    update = jax.jit(optimizer.update)
    for gradient, expected in zip(gradients, numpy_adamw(config, start, gradients), strict=True):
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        # optax takes its bias corrections and the learning rate in float32.
        np.testing.assert_allclose(params, expected, rtol=1e-6)


def test_zero_does_not_clip():
    gradient = jnp.asarray([3e4, 4e4])
    moments = {}
    for clip in (0.0, 50.0):
        config = OptimizerConfig(warmup_steps=0, grad_clip=clip)
        optimizer = make_optimizer(config, 10)
        _, state = optimizer.update(gradient, optimizer.init(gradient), gradient)
        (moments[clip],) = (s.mu for s in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(s))
    np.testing.assert_allclose(moments[0.0], 0.1 * gradient, rtol=1e-5)
    np.testing.assert_allclose(moments[50.0], 0.1 * gradient / 1000, rtol=1e-5)


def is_adam(state):
    return isinstance(state, optax.ScaleByAdamState)


# --- Muon ---------------------------------------------------------------------------------------


def numpy_muon(momenta, gradient, rate, beta=0.95):
    """One step of Muon with Nesterov momentum on one matrix, after Jordan's description."""
    momenta.append(gradient)
    weights = [(1 - beta) * beta**age for age in reversed(range(len(momenta)))]
    corrected = 1 - beta ** len(momenta)
    m = sum(w * g for w, g in zip(weights, momenta, strict=True))
    nesterov = beta * m / (1 - beta ** (len(momenta) + 1)) + (1 - beta) * gradient / corrected
    x = nesterov / np.linalg.norm(nesterov)
    x = x.T if x.shape[0] > x.shape[1] else x
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    x = x.T if gradient.shape[0] > gradient.shape[1] else x
    return -rate * 0.2 * np.sqrt(max(gradient.shape)) * x


def test_muon_updates_the_matrices_of_the_blocks_and_adamw_the_rest(x64):
    rng = np.random.default_rng(0)
    shapes = {
        "blocks": {
            "qkv": {"kernel": (2, 6, 3, 4), "bias": (2, 3, 4)},
            "mlp": {"kernel": (2, 4, 8)},
        },
        "head": {"kernel": (6, 5)},
    }
    draw = functools.partial(
        jax.tree.map, rng.standard_normal, shapes, is_leaf=lambda x: isinstance(x, tuple)
    )
    params = {"params": draw()}
    config = OptimizerConfig(kind="muon", learning_rate=0.1, warmup_steps=0, grad_clip=0.0)
    optimizer = make_optimizer(config, 10)
    adam = optax.adamw(0.1, b1=config.beta1, b2=config.beta2, weight_decay=0.0, nesterov=True)
    state, adam_state = optimizer.init(params), adam.init(params)
    update, histories = jax.jit(optimizer.update), {}
    for _ in range(3):
        grads = {"params": draw()}
        updates, state = update(grads, state, params)
        by_adam, adam_state = adam.update(grads, adam_state, params)
        for path in (("head", "kernel"), ("blocks", "qkv", "bias")):
            of_adam = functools.reduce(lambda tree, name: tree[name], path, by_adam["params"])
            ours = functools.reduce(lambda tree, name: tree[name], path, updates["params"])
            np.testing.assert_allclose(ours, of_adam, rtol=1e-7)
        for layer in range(2):
            for output in range(3):
                momenta = histories.setdefault((layer, output), [])
                matrix = grads["params"]["blocks"]["qkv"]["kernel"][layer, :, output]
                np.testing.assert_allclose(
                    updates["params"]["blocks"]["qkv"]["kernel"][layer, :, output],
                    numpy_muon(momenta, matrix, 0.1),
                    rtol=1e-5,
                    atol=1e-8,
                )
            momenta = histories.setdefault(layer, [])
            np.testing.assert_allclose(
                updates["params"]["blocks"]["mlp"]["kernel"][layer],
                numpy_muon(momenta, grads["params"]["blocks"]["mlp"]["kernel"][layer], 0.1),
                rtol=1e-5,
                atol=1e-8,
            )


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_first_moment_may_be_kept_in_half_precision(kind):
    params = {"params": {"blocks": {"qkv": {"kernel": jnp.ones((2, 4, 3, 4))}}, "b": jnp.ones(4)}}
    grads = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), params)
    updates = {}
    for dtype in ("float32", "bfloat16"):
        config = OptimizerConfig(kind=kind, warmup_steps=0, moment_dtype=dtype)
        optimizer = make_optimizer(config, 10)
        state = optimizer.init(params)
        for _ in range(3):
            updates[dtype], state = optimizer.update(grads, state, params)
        kinds = {leaf.dtype.name for leaf in jax.tree.leaves(state) if leaf.ndim}
        assert kinds == {"float32", dtype} if kind == "adamw" else dtype in kinds
    exact = jax.tree.leaves(updates["float32"])
    for ours, leaf in zip(jax.tree.leaves(updates["bfloat16"]), exact, strict=True):
        assert ours.dtype == jnp.float32
        # By direction: Muon's iteration, too, runs in the moment's type, and turns small errors
        # of a nearly singular matrix into larger ones.
        cosine = jnp.vdot(ours, leaf) / (jnp.linalg.norm(ours) * jnp.linalg.norm(leaf))
        assert cosine > {"adamw": 0.999, "muon": 0.95}[kind]


# --- The layer of the rates of growth -----------------------------------------------------------


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_rates_of_growth_take_steps_of_their_own_size(kind):
    params = {
        "params": {
            "head": {name: {"kernel": jnp.ones((4, 2))} for name in ("rates", "means")},
            "blocks": {"rates": {"kernel": jnp.ones((2, 4, 4))}},  # no head's
        }
    }
    grads = jax.tree.map(lambda a: 0.3 * a, params)

    def steps(scale):
        optimizer = make_optimizer(OptimizerConfig(kind=kind, growth_rate_scale=scale), 100)
        state = optimizer.init(params)
        updates, state = jax.jit(optimizer.update)(grads, state, params)
        return updates["params"], state

    (plain, before), (slow, _) = steps(1.0), steps(0.1)
    np.testing.assert_allclose(
        slow["head"]["rates"]["kernel"], 0.1 * plain["head"]["rates"]["kernel"], rtol=1e-6
    )
    assert np.abs(plain["head"]["rates"]["kernel"]).min() > 0
    np.testing.assert_array_equal(slow["head"]["means"]["kernel"], plain["head"]["means"]["kernel"])
    jax.tree.map(np.testing.assert_array_equal, slow["blocks"], plain["blocks"])
    # Without the choice, the state is that of older checkpoints.
    assert len(before) == 2
