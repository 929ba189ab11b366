"""The marginal corrector on Gaussian data, where samples and velocities are known, and in steps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from piflow_jax.config import parse
from piflow_jax.data import load_digits_source
from piflow_jax.distillation.stages import student_stage
from piflow_jax.flow.policies import GMOutput
from piflow_jax.flow.teacher import Teacher
from piflow_jax.parallel import device_mesh
from piflow_jax.runs.loop import run_stage
from piflow_jax.systems.assembly import Systems
from piflow_jax.systems.conditioning import Unconditional
from piflow_jax.systems.network import Network
from piflow_jax.systems.networks import abstract_variables
from piflow_jax.systems.shapes import DataShape
from piflow_jax.training.corrector import make_corrector
from piflow_jax.training.optimizer import make_optimizer
from piflow_jax.training.step import first_student_state
from tests import gaussian, tiny
from tests.steps import step_of
from tests.training.test_text_step import batch_of, system

DATA = DataShape(name="digits", sample_size=8, channels=1, num_classes=10)
SITES, BATCH = (4, 4, 1), 512


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


def settings(kind, **changes):
    config = tiny.get_config()
    config.train.corrector.kind = kind
    config.train.corrector.start = 0
    config.train.optimizer.grad_clip = 0.0
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return parse(config)


def part(key):
    noise = jax.random.normal(key, (BATCH, *SITES))
    return {"noise": noise, "condition": None}


@pytest.mark.parametrize("kind", ["critic", "policy"])
def test_a_student_that_is_right_gets_no_gradient(kind):
    corrector = make_corrector(settings(kind), Student(), TEACHER)
    state = first_student_state(jax.random.key(0), corrector.config, Student(), RIGHT, RIGHT)
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


@pytest.mark.parametrize("kind", ["critic", "policy"])
def test_the_fixed_point_is_the_teachers_marginal(kind):
    """From another mean and scale, by the corrector's gradient alone, at nfe = 1."""
    config = settings(
        kind,
        train__corrector__critic_steps=4,
        train__corrector__optimizer__learning_rate=0.03,
        train__corrector__optimizer__warmup_steps=0,
    )
    corrector = make_corrector(config, Student(), TEACHER)
    wrong = {"mean": jnp.asarray(-0.2), "logstd": jnp.asarray(0.3)}
    state = first_student_state(jax.random.key(0), config, Student(), wrong, RIGHT)

    @jax.jit
    def run(state):
        def step(state, index):
            keys = jax.random.split(jax.random.fold_in(jax.random.key(1), index), 3)
            inputs = part(keys[0])
            drawn = inputs | corrector.draw(keys[1], inputs["noise"])
            critic = state.critic.params if kind == "critic" else ()
            rate = 0.4 * 0.99**index
            grads = jax.grad(corrector.loss)(state.params, critic, (), RIGHT, drawn)
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
    corrector = make_corrector(config, Student(), TEACHER)
    wrong = {"mean": jnp.asarray(-0.2), "logstd": jnp.asarray(0.3)}
    state = first_student_state(jax.random.key(0), config, Student(), wrong, RIGHT)
    grads = {"mean": jnp.asarray(3.0), "logstd": jnp.asarray(4.0)}

    @jax.jit
    def added(step):
        inputs = part(jax.random.key(1)), jax.random.key(2)
        found, _ = corrector.correct(state.replace(step=step), grads, RIGHT, *inputs)
        return optax.global_norm(jax.tree.map(jnp.subtract, found, grads))

    assert added(2) == 0
    np.testing.assert_allclose(added(3), 2.5, rtol=1e-6)


def test_levels_are_stratified_between_their_ends_and_shifted_to_noise():
    config = settings("critic", train__corrector__levels=(0.1, 0.9), train__corrector__shift=3.0)
    corrector = make_corrector(config, Student(), TEACHER)
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
    theirs, ours = make_corrector(config, Student()).shares({"x": jnp.arange(12)})
    # Neighbours are divided, so that nothing moves between devices.
    np.testing.assert_array_equal(theirs["x"], [0, 3, 6, 9])
    np.testing.assert_array_equal(ours["x"], [1, 2, 4, 5, 7, 8, 10, 11])


# --- In the training step ----------------------------------------------------------------------


def stage(tmp_path=None, **changes):
    config = settings("critic", **changes)
    source = load_digits_source()
    systems = Systems.of(config, DATA)
    params = jax.jit(systems.teacher_network.init)(jax.random.key(5))
    # A fresh network predicts zero.
    params = jax.tree.map(
        lambda a: a + 0.02 * jax.random.normal(jax.random.key(1), a.shape), params
    )
    return student_stage(systems, source, params, device_mesh())


def test_a_run_with_a_critic_continues_to_the_same_bits(tmp_path):
    options = {"log_every": 2, "checkpoint_every": 2, "keep_checkpoints": 2}
    whole = run_stage(stage(train__steps=4), tmp_path / "whole", **options)
    run_stage(stage(train__steps=2), tmp_path / "parts", **options)
    parts = run_stage(stage(train__steps=4), tmp_path / "parts", **options)
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    start = stage().init_arguments[1]
    moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a - b)).max(), parts.critic.params, start)
    assert max(jax.tree.leaves(moved)) > 1e-5  # the critic has learned


def test_microbatches_change_nothing_but_the_last_digits():
    found = []
    for count in (1, 2):
        made = stage(train__microbatches=count)
        state = jax.jit(made.init)(*made.init_arguments)
        batch = jax.tree.map(jnp.asarray, next(made.data))
        found.append(jax.jit(made.step)(state, *made.constants, batch))
    for name in found[0][1]:
        np.testing.assert_allclose(found[0][1][name], found[1][1][name], rtol=2e-3, err_msg=name)


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
    step = jax.jit(step_of(config, data, optimizer, student, teacher, source.null))
    state, metrics = step(state, params, jax.random.key(3), batch)
    assert np.isfinite(list(map(float, metrics.values()))).all()
    assert {"corrector_loss", "critic_loss"} <= metrics.keys()


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
