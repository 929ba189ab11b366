"""The rivals' steps on a tiny network: what they change, what they are given, how they sample."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax.config import parse
from piflow_jax.models.dit import DiT
from piflow_jax.rivals import METHODS, Rival
from piflow_jax.rivals.base import Pairs, endpoint_pairs, rival_sampler, rival_setting
from piflow_jax.systems.networks import teacher_network
from piflow_jax.systems.shapes import DataShape
from tests import tiny

RIVALS = {name: row for name, row in METHODS.items() if isinstance(row, Rival)}
DATA = DataShape(name="digits", sample_size=4, channels=1, num_classes=10)
BATCH = 8
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="module")
def settings():
    config = tiny.get_config()
    config.model.dit.time_scale = 1.0
    config.train.optimizer.warmup_steps = 0
    config.train.optimizer.learning_rate = 1e-2
    config.rivals.fake_updates = 2
    config.rivals.nfes = (1, 2)
    return parse(config)


@pytest.fixture(scope="module")
def batch():
    images = jax.random.uniform(jax.random.key(1), (BATCH, *DATA.shape), minval=-1, maxval=1)
    return {"x": images, "condition": jnp.arange(BATCH, dtype=jnp.int32)}


@pytest.fixture(scope="module")
def teacher(settings):
    """A teacher without a zero in it, so that nothing hides behind one."""
    fresh = jit(lambda: teacher_network(settings.model, DATA).init(jax.random.key(0)))()
    leaves, tree = jax.tree.flatten(fresh)
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(
        tree, [jnp.asarray(a + 0.2 * rng.normal(size=a.shape), a.dtype) for a in leaves]
    )


def largest_change(a, b):
    return max(
        float(jnp.abs(x - y).max()) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)
    )


def assert_starts_at(setting, start, teacher, batch):
    """A copy of the teacher; a network of more outputs predicts the teacher's with each of them."""
    inputs = batch["x"], jnp.linspace(0.1, 1.0, BATCH), batch["condition"]
    found = jit(setting.network.apply)(start, *inputs)
    expected = jit(setting.teacher.apply)(teacher, *inputs)
    if found.shape == expected.shape:
        assert largest_change(start, teacher) == 0
    else:
        expected = jnp.broadcast_to(expected[..., None, :], found.shape)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert jnp.abs(expected).max() > 0.1


# Compiling is most of the time: the one with most of its own is in the fast tests.
FAST = ("dmd",)


@pytest.mark.parametrize(
    "method",
    [m if m in FAST else pytest.param(m, marks=pytest.mark.slow) for m in RIVALS],
)
def test_a_step_trains_the_network_and_leaves_the_rest(method, settings, batch, teacher):
    rival = RIVALS[method]
    setting = rival_setting(settings, DATA, rival)
    # What starts at its teacher has nothing to learn of it in the first step.
    given = {"teacher": jax.tree.map(lambda a: 1.2 * a, teacher)}
    if rival.given == "pairs":
        given["pairs"] = Pairs(batch["x"] + 1, batch["x"], batch["condition"])
    state = jit(lambda t: rival.init(setting, jax.random.key(2), t))(teacher)
    start = state.ema_params
    if rival.given == "data":
        # Fresh heads are zero: a network that starts from scratch knows nothing of the teacher.
        assert not np.any(start["params"]["head"]["output"]["kernel"])
    else:
        assert_starts_at(setting, start, teacher, batch)
    step = jit(rival.step(setting))
    after, metrics = step(state, given, jax.random.key(3), batch)
    assert np.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0
    assert int(after.step) == 1
    assert jax.tree.structure(after) == jax.tree.structure(state)
    two_networks = set(after.params) == {"student", "fake"}
    assert two_networks == (method == "dmd")
    params = after.params["student"] if two_networks else after.params
    assert largest_change(params, start) > 1e-3
    # Without warm-up the average is a copy of the first step's parameters.
    assert largest_change(after.ema_params, params) == 0
    if two_networks:
        assert largest_change(after.params["fake"], teacher) > 1e-3
        assert largest_change(after.params["fake"], params) > 1e-3
    again, _ = step(state, given, jax.random.key(3), batch)
    assert largest_change(again.params, after.params) == 0


@pytest.mark.slow
@pytest.mark.parametrize("method", ["meanflow", "shortcut"])
def test_guidance_is_built_into_what_learns_from_data(method, settings, batch, teacher):
    """A scale other than 1 changes the target, within the interval."""
    norms = {}  # of the gradient: MeanFlow's loss is normalised to about 1
    for scale, interval in ((1.0, (0.0, 1.0)), (3.0, (0.0, 1.0)), (3.0, (0.99999, 1.0))):
        guided = dataclasses.replace(
            settings.teacher, guidance_scale=scale, guidance_interval=interval
        )
        config = dataclasses.replace(settings, teacher=guided)
        rival = RIVALS[method]
        setting = rival_setting(config, DATA, rival)
        state = rival.init(setting, jax.random.key(2), teacher)
        moved = jax.tree.map(
            lambda a: a + 0.1 * jnp.cos(jnp.arange(a.size)).reshape(a.shape), state.params
        )
        state = state.replace(params=moved, ema_params=moved)
        _, metrics = jit(rival.step(setting))(state, {}, jax.random.key(3), batch)
        norms[scale, interval] = float(metrics["grad_norm"])
    plain, guided, outside = norms.values()
    assert plain == pytest.approx(outside, rel=1e-5)
    assert abs(guided - plain) > 1e-3 * abs(plain)


def test_pairs_are_the_teachers_paths(settings, teacher):
    rivals = dataclasses.replace(settings.rivals, pair_steps=3)
    config = dataclasses.replace(settings, rivals=rivals)
    make = jit(functools.partial(endpoint_pairs, config, DATA, jax.random.key(4), 6, teacher))
    pairs, others = make(0), make(1)
    assert np.abs(pairs.noise - others.noise).min() > 0
    x = pairs.noise
    module = teacher_network(settings.model, DATA)
    for t in (1, 2 / 3, 1 / 3):
        x = x - module.apply(teacher, x, jnp.full(6, t), pairs.labels) / 3
    np.testing.assert_allclose(pairs.endpoints, x, atol=1e-5)
    # A pair is its number's, however many are made in a call.
    two = jit(functools.partial(endpoint_pairs, config, DATA, jax.random.key(4), 12, teacher))(0)
    for found, halves in zip(
        jax.tree.leaves(two), zip(*map(jax.tree.leaves, (pairs, others)), strict=True), strict=True
    ):
        np.testing.assert_allclose(found, np.concatenate(halves), atol=1e-5)


def test_samplers_ask_the_network_as_it_was_trained(settings, monkeypatch):
    """Levels and lengths of steps of two evaluations; fresh noise that is the sample's own."""
    seen = []

    def spy(self, params, x, t, labels, *second):
        jax.debug.callback(lambda *a: seen.append([float(v[0]) for v in a]), t, *second)
        return 0 * x

    monkeypatch.setattr(DiT, "apply", spy)
    noise = jax.random.normal(jax.random.key(0), (4, *DATA.shape))
    labels = jnp.zeros(4, jnp.int32)
    calls = {"meanflow": [[1, 0.5], [0.5, 0.5]], "shortcut": [[1, 7 / 8], [0.5, 7 / 8]]}
    for method, expected in calls.items():
        seen.clear()
        found = rival_sampler(settings, DATA, RIVALS[method], 2)({}, noise, labels)
        jax.effects_barrier()
        np.testing.assert_allclose(sorted(seen, reverse=True), expected)
        np.testing.assert_allclose(found, noise)
    sample = rival_sampler(settings, DATA, RIVALS["dmd"], 2)
    together, alone = sample({}, noise, labels), sample({}, noise[2:3], labels[:1])
    np.testing.assert_array_equal(together[2], alone[0])
    assert np.abs(together - noise).max() > 0.1
