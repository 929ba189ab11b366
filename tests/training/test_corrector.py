"""The marginal corrector on Gaussian data, where samples and velocities are known, and in steps."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from piflow_jax.config import ConfigError, parse
from piflow_jax.data import load_digits_source
from piflow_jax.distillation.stages import student_stage
from piflow_jax.flow.frechet import Moments
from piflow_jax.flow.policies import GMOutput
from piflow_jax.flow.teacher import Teacher
from piflow_jax.parallel import device_mesh
from piflow_jax.runs.loop import run_stage
from piflow_jax.systems.assembly import Systems
from piflow_jax.systems.conditioning import Unconditional
from piflow_jax.systems.network import Network, abstract_variables
from piflow_jax.systems.shapes import DataShape
from piflow_jax.systems.spaces import Space
from piflow_jax.training.corrector import make_corrector
from piflow_jax.training.optimizer import make_optimizer
from piflow_jax.training.step import first_student_state
from tests import gaussian, tiny
from tests.compiled import on_devices
from tests.steps import step_of, without_step
from tests.training.test_text_step import batch_of, system

DATA = DataShape(name="digits", sample_size=8, channels=1, num_classes=10)
SITES, BATCH = (2, 2, 1), 512


class Student(Network):
    """A student of Gaussian data: `N(mean, scale^2)` at every site, from any noise.

    One Gaussian of `x_0` gives the exact velocity at every later state, so the samples are those
    of the exact flow.
    """

    conditioning = Unconditional()

    def named(self, key):
        return {"mean": jnp.zeros(()), "logstd": jnp.zeros(())}

    def apply(self, variables, x, t, condition):
        means = (x - variables["mean"])[..., None, :]
        logstd = jnp.broadcast_to(variables["logstd"], t.shape)
        return GMOutput(means, jnp.zeros(means.shape[:-1]), logstd)

    def train(self, variables, x, t, condition, key):
        return self.apply(variables, x, t, condition), ()

    def trained(self, variables):
        return variables

    def with_base(self, trained, base):
        return trained

    def start(self, key, teacher, teacher_variables):
        return self.named(key)


def velocity(variables, x, t, condition):
    return gaussian.velocity.__wrapped__(
        x, t, mean=variables["mean"], scale=jnp.exp(variables["logstd"])
    )


TEACHER = Teacher(predict=velocity, shape=SITES)
RIGHT = {"mean": jnp.asarray(gaussian.MEAN), "logstd": jnp.log(gaussian.SCALE)}


SEEN = jax.random.key(7)


def settings(kind, **changes):
    config = tiny.get_config()
    config.train.corrector.kind = kind
    config.train.corrector.start = 0 if kind != "frechet" else 1
    config.train.optimizer.grad_clip = 0.0
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return parse(config)


def part(key):
    noise = jax.random.normal(key, (BATCH, *SITES))
    return {"noise": noise, "condition": None}


class Pixels:
    """Features of Gaussian data that are Gaussian too: the pixels themselves."""

    name, digest = "pixels", 64 * "0"

    def features(self, images):
        return images.reshape(len(images), -1)


SIZE = int(np.prod(SITES))
SPACE = Space(
    features=Pixels(),
    mean=np.full(SIZE, gaussian.MEAN),
    covariance=gaussian.SCALE**2 * np.eye(SIZE),
)


def corrector_of(config, teacher=TEACHER):
    return make_corrector(config, Student(), teacher, SPACE)


def first_state(config, student):
    return first_student_state(jax.random.key(0), config, Student(), student, RIGHT, space=SPACE)


@pytest.mark.parametrize("kind", ["critic", "policy"])
def test_a_student_that_is_right_gets_no_gradient(kind):
    corrector = corrector_of(settings(kind))
    state = first_state(corrector.config, RIGHT)
    grads = jax.tree.map(jnp.ones_like, RIGHT)

    @jax.jit
    def corrected(state):
        return corrector.correct(state, grads, RIGHT, part(jax.random.key(1)), jax.random.key(2))

    found, metrics = corrected(state)
    if kind == "critic":  # its velocity is the teacher's to the last bit
        np.testing.assert_array_equal(jax.tree.leaves(found), [1.0, 1.0])
        assert metrics["corrector_loss"] == 0
    else:
        wrong = {"mean": jnp.asarray(1.0), "logstd": jnp.asarray(0.0)}
        other = corrected(state.replace(params=wrong))[1]["corrector_loss"]
        assert metrics["corrector_loss"] < 1e-5 < 1e-2 < other


def test_a_critic_leaves_running_averages_and_random_state_as_they_are():
    others = {"batch_stats": {"scale": jnp.float32(1)}, "carried": {"count": jnp.uint32(3)}}

    def predict(variables, x, t, condition):
        return variables["batch_stats"]["scale"] * velocity(variables["params"], x, t, condition)

    teacher = Teacher(predict=predict, shape=SITES)
    teacher_params = {"params": RIGHT} | others
    corrector = corrector_of(settings("critic"), teacher)
    state = corrector.begin(SEEN, first_state(corrector.config, RIGHT), teacher_params)
    followed, metrics = corrector.follow(state, teacher_params, part(SEEN), SEEN)
    assert followed.critic.params.keys() == {"params"} and np.isfinite(metrics["critic_loss"])


@pytest.mark.parametrize("policy", ["gm", "dx"])
def test_shares_of_draws_that_are_empty(policy):
    """One state has no teacher's draws beside it, and DX drops nothing."""
    changes = {"train__num_states": 1, "policy__kind": policy, "train__gm_dropout": 0.0}
    corrector = corrector_of(settings("policy", train__corrector__share=0.25, **changes))
    batch = {"x": np.arange(8.0), "none": np.zeros((8, 0)), "of none": np.zeros((8, 2, 0))}
    for rows, found in zip(([0, 4], [1, 2, 3, 5, 6, 7]), corrector.shares(batch), strict=True):
        np.testing.assert_array_equal(found["x"], rows)
        assert found["none"].shape == (len(rows), 0) and found["of none"].shape == (len(rows), 2, 0)


class Normalised(nnx.Module):
    def __init__(self):
        self.norm = nnx.BatchNorm(1, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    "given", [nnx.state(Normalised()), {"w": jnp.ones(2), "count": jnp.uint32(3)}]
)
def test_a_critic_is_no_copy_of_more_than_parameters(given):
    corrector = corrector_of(settings("critic"))
    state = first_student_state(SEEN, settings("policy"), Student(), RIGHT, RIGHT)
    with pytest.raises(ConfigError, match="'critic' trains a copy of teacher_params, which have"):
        corrector.begin(SEEN, state, given)


# Settings of the test and the rate of its descent, for each corrector.
OF_KIND = {
    "critic": (
        {
            "train__corrector__critic_steps": 4,
            "train__corrector__optimizer__learning_rate": 0.03,
            "train__corrector__optimizer__warmup_steps": 0,
        },
        0.4,
    ),
    "policy": ({}, 0.4),
    # Eight of the batches here, which are larger than that of the settings.
    "frechet": ({"train__corrector__population": 16}, 0.4 / SIZE),
}


def test_the_gradient_of_features_is_the_closed_form():
    """`D ((m - n)^2 + (s - r)^2)` between `N(m, s^2)` and `N(n, r^2)` in D dimensions."""
    corrector = corrector_of(settings("frechet", train__corrector__substeps=64))
    mean, std = -0.2, 1.3
    wrong = {"mean": jnp.asarray(mean), "logstd": jnp.log(std)}
    shift = np.full(SIZE, mean - gaussian.MEAN)
    moments = Moments(jnp.asarray(1), shift, np.outer(shift, shift) + std**2 * np.eye(SIZE))
    inputs = part(jax.random.key(1))
    value, grads = jax.jit(jax.value_and_grad(corrector.loss))(wrong, moments, (), RIGHT, inputs)
    expected = SIZE * ((mean - gaussian.MEAN) ** 2 + (std - gaussian.SCALE) ** 2)
    np.testing.assert_allclose(value, expected, rtol=0.03)  # of 512 samples
    np.testing.assert_allclose(grads["mean"], 2 * SIZE * (mean - gaussian.MEAN), rtol=0.03)
    by_log = 2 * SIZE * (std - gaussian.SCALE) * std
    np.testing.assert_allclose(grads["logstd"], by_log, rtol=0.03)
    # Right moments: no gradient. Those of the student are its samples', so the student is right.
    moments = Moments(jnp.asarray(1), jnp.zeros(SIZE), gaussian.SCALE**2 * jnp.eye(SIZE))
    grads = jax.jit(jax.grad(corrector.loss))(RIGHT, moments, (), RIGHT, inputs)
    assert max(map(abs, map(float, jax.tree.leaves(grads)))) < 1e-4


@pytest.mark.parametrize("kind", OF_KIND)
def test_the_fixed_point_is_the_distribution_that_is_right(kind):
    """From another mean and scale, by the corrector's gradient alone, at nfe = 1."""
    changes, first_rate = OF_KIND[kind]
    config = settings(kind, **changes)
    corrector = corrector_of(config)
    wrong = {"mean": jnp.asarray(-0.2), "logstd": jnp.asarray(0.3)}
    state = corrector.follow(first_state(config, wrong), RIGHT, part(SEEN), SEEN)[0]

    @jax.jit
    def run(state):
        def step(state, index):
            keys = jax.random.split(jax.random.fold_in(jax.random.key(1), index), 3)
            inputs = part(keys[0])
            drawn = inputs | corrector.draw(keys[1], inputs["noise"])
            rate = first_rate * 0.99**index
            learned = corrector.learned(state)
            grads = jax.grad(corrector.loss)(state.params, learned, (), RIGHT, drawn)
            params = jax.tree.map(lambda a, g: a - rate * g, state.params, grads)
            state = state.replace(params=params)
            return corrector.follow(state, RIGHT, inputs, keys[2])[0], None

        return jax.lax.scan(step, state, jnp.arange(400))[0]

    end = run(state)
    found = [float(end.params["mean"]), float(jnp.exp(end.params["logstd"]))]
    np.testing.assert_allclose(found, [gaussian.MEAN, gaussian.SCALE], atol=0.02)
    if kind == "critic":
        found = [float(end.critic.params["mean"]), float(jnp.exp(end.critic.params["logstd"]))]
        np.testing.assert_allclose(found, [gaussian.MEAN, gaussian.SCALE], atol=0.04)


def test_its_gradient_has_the_norm_of_the_other_and_waits_for_the_critic():
    config = settings("policy", train__corrector__scale=0.5, train__corrector__start=3)
    corrector = corrector_of(config)
    wrong = {"mean": jnp.asarray(-0.2), "logstd": jnp.asarray(0.3)}
    state = first_state(config, wrong)
    grads = {"mean": jnp.asarray(3.0), "logstd": jnp.asarray(4.0)}

    @jax.jit
    def added(step):
        inputs = part(jax.random.key(1)), jax.random.key(2)
        found, _ = corrector.correct(state.replace(step=step), grads, RIGHT, *inputs)
        return optax.global_norm(jax.tree.map(jnp.subtract, found, grads))

    assert added(2) == 0
    np.testing.assert_allclose(added(3), 2.5, rtol=1e-6)


DECAYING = {"decay": "cosine", "learning_rate": 0.01, "warmup_steps": 1}


def test_the_critics_learning_rate_decays_over_the_run():
    """Over all of its updates, of which each step has several."""
    rate = {f"train__corrector__optimizer__{key}": value for key, value in DECAYING.items()}
    config = settings("critic", train__steps=4, train__corrector__critic_steps=5, **rate)
    corrector = corrector_of(config)
    states = [first_state(config, {"mean": jnp.asarray(-0.2), "logstd": jnp.asarray(0.3)})]
    follow = jax.jit(lambda state, key: corrector.follow(state, RIGHT, part(key), key)[0])
    for index in range(4):
        states.append(follow(states[-1], jax.random.key(index)))
    means = np.array([state.critic.params["mean"] for state in states])
    assert abs(means[2] - means[1]) > 0.2 * abs(means[1] - means[0])


def test_microbatches_change_no_gradient_of_a_distance():
    """It is that of all samples seen so far, so the parts of a batch are independent."""
    found = []
    for count in (1, 4):
        config = settings("frechet", train__microbatches=count, train__batch_size=16)
        corrector = corrector_of(config)
        wrong = {"mean": jnp.asarray(-0.2), "logstd": jnp.asarray(0.3)}

        @jax.jit
        def step(state, corrector=corrector):
            state, _ = corrector.follow(state, RIGHT, part(SEEN), SEEN)
            ones = jax.tree.map(jnp.ones_like, RIGHT)
            state = state.replace(step=jnp.asarray(5))
            return corrector.correct(state, ones, RIGHT, part(SEEN), SEEN)

        found.append(step(first_state(config, wrong)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *found)


@pytest.mark.parametrize("kind", ["critic", "frechet"])
def test_what_follows_a_student_samples_it_in_parts(kind, monkeypatch):
    apply, seen, found = Student.apply, [], []

    def recorded(self, variables, x, t, condition):
        seen.append(len(x))
        return apply(self, variables, x, t, condition)

    monkeypatch.setattr(Student, "apply", recorded)
    for count in (1, 4):
        corrector = corrector_of(settings(kind, train__microbatches=count))
        state = first_state(
            corrector.config, {"mean": jnp.asarray(-0.2), "logstd": jnp.asarray(0.3)}
        )
        followed, _ = jax.jit(corrector.follow)(state, RIGHT, part(SEEN), SEEN)
        found.append(corrector.learned(followed))
    assert seen[0] == BATCH and set(seen) == {BATCH, BATCH // 4}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), *found)


def test_levels_are_stratified_between_their_ends_and_shifted_to_noise():
    config = settings("critic", train__corrector__levels=(0.1, 0.9), train__corrector__shift=3.0)
    corrector = corrector_of(config)
    drawn = corrector.draw(jax.random.key(0), jnp.zeros((BATCH, *SITES)))
    t = np.asarray(drawn["t"], np.float64)
    assert 0.1 <= t.min() < 0.11 and 0.89 < t.max() <= 0.9
    # The shift's inverse, uniform between the ends' own.
    tau = t / (3 - 2 * t)
    ends = np.array([0.1, 0.9]) / (3 - 2 * np.array([0.1, 0.9]))
    strata = np.floor(BATCH * (tau - ends[0]) / (ends[1] - ends[0]) + 1e-4)
    assert np.mean(np.abs(strata - np.arange(BATCH)) < 1.5) == 1
    assert drawn["mixed"].shape == (BATCH, *SITES) and abs(float(drawn["mixed"].mean())) < 0.05


def test_every_example_is_the_correctors_or_pi_ids():
    config = settings("critic", train__batch_size=12, train__corrector__share=1 / 3)
    theirs, ours = corrector_of(config, None).shares({"x": jnp.arange(12)})
    # Neighbours are divided, so that nothing moves between devices.
    np.testing.assert_array_equal(theirs["x"], [0, 3, 6, 9])
    np.testing.assert_array_equal(ours["x"], [1, 2, 4, 5, 7, 8, 10, 11])


# --- In the training step ----------------------------------------------------------------------


def stage(kind="critic", space=None, **changes):
    config = settings(kind, **changes)
    source = load_digits_source()
    systems = dataclasses.replace(Systems.of(config, DATA), space=space)
    params = jax.jit(systems.teacher_network.init)(jax.random.key(5))
    # A fresh network predicts zero.
    params = jax.tree.map(
        lambda a: a + 0.02 * jax.random.normal(jax.random.key(1), a.shape), params
    )
    return student_stage(systems, source, params, device_mesh())


def test_a_run_with_a_critic_continues_to_the_same_bits(tmp_path):
    options = {"log_every": 2, "checkpoint_every": 2, "keep_checkpoints": 2}
    made = stage(train__steps=4)
    whole = run_stage(made, tmp_path / "whole", **options)
    without_step(4, tmp_path / "whole", tmp_path / "parts")
    parts = run_stage(made, tmp_path / "parts", **options)
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    start = made.init_arguments[1]
    moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a - b)).max(), parts.critic.params, start)
    assert max(jax.tree.leaves(moved)) > 1e-5  # the critic has learned


@pytest.mark.parametrize(
    ("kind", "decay", "longer"),
    [("critic", "constant", True), ("critic", "cosine", False), ("policy", "constant", True)],
)
def test_a_run_is_prolonged_only_if_no_learning_rate_depends_on_its_steps(kind, decay, longer):
    changes = {"decay": decay, "warmup_steps": 2} if kind == "critic" else {}
    optimizer = {f"train__corrector__optimizer__{key}": of for key, of in changes.items()}
    made = stage(kind, **optimizer)
    assert ("train.steps" in made.extensible) == longer


@pytest.mark.slow
def test_microbatches_change_nothing_but_the_last_digits():
    found = []
    for count in (1, 2):
        made = stage(train__microbatches=count)
        state = jax.jit(made.init)(*made.init_arguments)
        batch = jax.tree.map(jnp.asarray, next(made.data))
        found.append(jax.jit(made.step)(state, *made.constants, batch))
    for name in found[0][1]:
        np.testing.assert_allclose(found[0][1][name], found[1][1][name], rtol=2e-3, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("network", ["flux", "qwen_image"])
def test_the_critic_of_a_student_with_adapters_is_adapters_too(network):
    changes = {"train__corrector__kind": "critic", "train__corrector__start": 0}
    config, source, data, teacher, student, params, trained = system(network, **changes)
    state = jax.jit(
        lambda trained, params: first_student_state(
            jax.random.key(1), config, student, trained, params
        )
    )(trained, params)
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert count(state.critic.params) < count(trained) < count(params)
    critic = student.of_velocities()
    batch = batch_of(source)
    x = jax.random.normal(jax.random.key(0), batch["x"].shape)
    inputs = x, jnp.linspace(0.2, 1.0, len(x)), batch["condition"]
    # It starts at the teacher: its fresh adapters add nothing.
    found = jax.jit(critic.apply)(critic.with_base(state.critic.params, params), *inputs)
    expected = jax.jit(teacher.apply)(params, *inputs)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    optimizer = make_optimizer(config.train.optimizer, config.train.steps)
    step = step_of(config, data, optimizer, student, teacher, source.null)
    after, metrics = jax.eval_shape(step, state, params, jax.random.key(3), batch)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert {"corrector_loss", "critic_loss"} <= metrics.keys()
    if network == "qwen_image":  # compiled where it is cheapest
        _, metrics = jax.jit(step)(state, params, jax.random.key(3), batch)
        assert np.isfinite(list(map(float, metrics.values()))).all()


def test_adapters_of_student_and_critic_are_drawn_apart():
    config, source, data, _, _, params, _ = system("flux", train__corrector__kind="critic")
    begun = student_stage(Systems.of(config, data, source.null), source, params, device_mesh())
    state = jax.jit(begun.init)(*begun.init_arguments)
    ours, critics = (
        {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(t)}
        for t in (state.params, state.critic.params)
    )
    drawn = [name for name in ours if "lora_a" in name]
    assert drawn and not any(np.array_equal(ours[name], critics[name]) for name in drawn)


def test_a_critic_lies_on_a_mesh_as_its_student():
    from piflow_jax.systems.shardings import student_shardings

    config = settings("critic")
    systems = Systems.of(config, DATA)
    student, teacher = systems.student_network, systems.teacher_network
    state = jax.eval_shape(
        lambda key, trained, params: first_student_state(key, config, student, trained, params),
        jax.random.key(0),
        abstract_variables(student),
        abstract_variables(teacher),
    )
    placed = student_shardings(config, device_mesh(devices=jax.devices()[:1]), state, student)
    flat = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.spec
        for path, leaf in jax.tree_util.tree_leaves_with_path(dataclasses.asdict(placed))
    }
    kernels = [name for name in flat if name.startswith("params/") and "blocks" in name]
    assert kernels
    for name in kernels:
        assert flat[f"critic/params/{name.removeprefix('params/')}"] == flat[name]


def test_features_of_a_batch_on_eight_devices_are_those_of_one():
    """Moments are of the whole batch, wherever its parts lie."""
    environment = os.environ | on_devices(8) | {"PYTHONPATH": str(Path(__file__).parents[2])}
    script = Path(__file__).with_name("split_features.py")
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["apart"] < 1e-4
    assert found["moved"][0] == 0 < found["moved"][1]  # the batch was split
