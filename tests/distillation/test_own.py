"""`distill` and `train_teacher` with networks, teachers and data that are not ours."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import piflow_jax
from piflow_jax import Schedule, Teacher
from piflow_jax.config import ConfigError
from piflow_jax.data import ArraySource
from piflow_jax.distillation.bench import Bench
from piflow_jax.runs.checkpoint import CheckpointError
from piflow_jax.systems.own import own_network
from piflow_jax.systems.policies import POLICIES
from piflow_jax.systems.sampling import sampling_cautions
from piflow_jax.systems.shapes import DataShape
from tests.distillation.own import (
    CLASSES,
    IMAGES,
    POINTS,
    SOURCES,
    Small,
    config_of_teacher,
    exact,
    settings,
)


@pytest.mark.filterwarnings("error:Explicitly requested dtype")  # the poses are float64
@pytest.mark.parametrize(
    "name",
    [
        *("volumes", "mapping"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("points", "tokens", "labels")),
    ],
)
def test_a_run_of_any_sites_and_conditions_ends_continues_and_loads(name, tmp_path):
    x, condition = SOURCES[name]
    source = x if condition is None else (x, condition)
    teacher, params = exact()
    config, seen = settings(), []
    network = Small(piflow_jax.policy_outputs(config, x.shape[-1]))

    def run(workdir, steps, **more):
        config = settings(train__steps=steps)
        given = {"teacher": teacher, "teacher_params": params, "network": network} | more
        return piflow_jax.distill(config, workdir, source=source, **given)

    student = run(tmp_path / "whole", 3, on_metrics=lambda *line: seen.append(line))
    assert [(stage, step) for stage, step, _ in seen] == [("student", k) for k in (1, 2, 3)]
    assert all(np.isfinite(values["loss"]) for *_, values in seen)
    asked = {"labels": [0, 1, 1, 0], "mapping": {"pose": np.ones((4, 3), np.float32)}}.get(name, 4)
    samples = student.sample(0, asked)
    assert samples.shape == (4, *x.shape[1:]) and bool(jnp.isfinite(samples).all())
    assert (tmp_path / "whole" / "samples.png").is_file()
    loaded = piflow_jax.load(tmp_path / "whole", network=network)
    np.testing.assert_array_equal(loaded.sample(0, asked), samples)
    if name == "mapping":  # others go on in the tests of networks
        run(tmp_path / "parts", 2)
        again = run(tmp_path / "parts", 3)
        for a, b in zip(*map(jax.tree.leaves, (student.params, again.params)), strict=True):
            np.testing.assert_array_equal(a, b)


PREDICTIONS = [
    ("u", Schedule.straight()),
    ("u", Schedule.straight(data_at=1, time_scale=1000.0)),
    ("eps", Schedule.discrete(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))),
    ("x0", Schedule.variance_exploding()),
    ("v", Schedule.cosine(time_scale=7.0)),
]
POLICY = {
    "gm": {"policy__kind": "gm"},
    "grid": {"policy__kind": "dx", "policy__num_grid": 3, "train__gm_dropout": 0.0},
    "arc": {"policy__kind": "arc"},
}


@pytest.mark.parametrize("policy", POLICY)
@pytest.mark.parametrize(("prediction", "schedule"), PREDICTIONS)
def test_the_first_policy_is_the_teacher_whatever_that_predicts(policy, prediction, schedule):
    config = piflow_jax.config.parse(settings(**POLICY[policy]))
    data = DataShape(name="tokens", channels=2, sites=(5,))
    network = own_network("own", Small(2), data, None)
    variables = jax.jit(network.init)(jax.random.key(0))
    teacher = Teacher(
        predict=lambda params, z, s, cond: Small(2).apply({"params": params}, z, s),
        shape=(5, 2),
        prediction=prediction,
        schedule=schedule,
    )
    outputs = piflow_jax.policy_outputs(config, 2)
    student = own_network("own", Small(outputs), data, config.policy, teacher.as_asked())
    started = jax.jit(student.start_at)(jax.random.key(1), variables["params"])
    x = jax.random.normal(jax.random.key(2), (6, 5, 2))
    t = jnp.linspace(0.05, 0.95, 6)
    output = student.apply(student.with_base(started, ()), x, t, None)
    at = POLICIES[config.policy.kind].create(config.policy, config.train, output, x, t, 1e-6)
    expected = teacher.velocity(variables["params"], x, t)
    # Components are set apart by noise of 0.05 in what they predict, as in DESIGN 3.7.
    apart = 0.0 if policy == "grid" else 0.1
    slope = np.abs(teacher.as_velocity(1 + 0 * x, x, t) - teacher.as_velocity(0 * x, x, t))
    error = np.abs(at.velocity(x, t) - expected)
    assert np.all(error < 2e-3 * np.abs(expected) + 1e-3 + apart * slope)


class Averaging(nnx.Module):
    """Has running averages and a random stream."""

    def __init__(self, outputs, rngs):
        self.first = nnx.Linear(3, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.out = nnx.Linear(8, outputs, rngs=rngs)

    def __call__(self, x, t):
        h = self.norm(self.first(jnp.concatenate([x, t[:, None]], -1)))
        return self.out(self.dropout(jnp.tanh(h)))


class AveragingLinen(nn.Module):
    outputs: int

    @nn.compact
    def __call__(self, x, t):
        h = nn.Dense(8)(jnp.concatenate([x, t[:, None]], -1))
        h = nn.BatchNorm(use_running_average=not self.is_mutable_collection("batch_stats"))(h)
        return nn.Dense(self.outputs)(jnp.tanh(h))


def pair(outputs):
    def init(key):
        w, v = jax.random.split(key)
        return {"w": jax.random.normal(w, (3, 8)), "v": jax.random.normal(v, (8, outputs))}

    def apply(params, x, t):
        return jnp.tanh(jnp.concatenate([x, t[:, None]], -1) @ params["w"]) @ params["v"]

    return init, apply


NETWORKS = {
    "nnx": lambda outputs: Averaging(outputs, nnx.Rngs(0)),
    "linen": AveragingLinen,
    "pair": pair,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_any_making_keep_what_they_carry(name, tmp_path):
    teacher, params = exact()
    outputs = piflow_jax.policy_outputs(settings(), 2)
    given = {"teacher": teacher, "teacher_params": params, "source": POINTS}

    def run(workdir, steps):
        network = NETWORKS[name](outputs)  # another object of the same making
        return piflow_jax.distill(settings(train__steps=steps), workdir, network=network, **given)

    student = run(tmp_path / "whole", 3)
    run(tmp_path / "parts", 2)
    again = run(tmp_path / "parts", 3)
    for a, b in zip(*map(jax.tree.leaves, (student.params, again.params)), strict=True):
        np.testing.assert_array_equal(a, b)
    carried = jax.tree.leaves(student.params["carried"])
    assert bool(carried) == (name != "pair")
    if name == "linen":  # running averages have moved
        mean, variance = carried
        assert np.abs(mean).max() > 1e-3 and np.abs(variance - 1).max() > 1e-3
    loaded = piflow_jax.load(tmp_path / "whole", network=NETWORKS[name](outputs))
    np.testing.assert_array_equal(loaded.sample(0, 5), student.sample(0, 5))


def test_it_learns_what_the_teacher_knows(tmp_path):
    """The marginal of a normal distribution, from a network that starts afresh."""
    teacher, params = exact()
    config = settings(train__steps=400, train__batch_size=128, train__total_substeps=32)
    config.train.optimizer.learning_rate = 5e-3
    config.log_every = config.checkpoint_every = 200
    network = Small(piflow_jax.policy_outputs(config, 2))
    student = piflow_jax.distill(
        config, tmp_path, teacher=teacher, teacher_params=params, network=network, source=POINTS
    )
    noise = np.asarray(jax.random.normal(jax.random.key(7), (64, 2)))
    samples = student.sample(0, 64, noise=noise)
    # Of a normal distribution the flow is linear: the end is the noise times the deviation.
    assert float(jnp.abs(samples - 0.5 * noise).mean()) < 0.1
    assert float(jnp.abs(noise * 0.5).mean()) > 0.3


def test_a_teacher_is_trained_further(tmp_path):
    network, config = Small(2), config_of_teacher()
    config.teacher.steps, config.teacher.optimizer.learning_rate = 1, 1e-7
    first = jax.tree.map(np.asarray, network.init(jax.random.key(9), POINTS[:1], np.ones(1)))
    given = {"network": network, "source": POINTS}
    _, params = piflow_jax.train_teacher(config, tmp_path, initial_params=first, **given)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), params["params"], first["params"]
    )
    config.teacher.steps = 2
    for other in (None, jax.tree.map(lambda a: a + 1, first)):
        with pytest.raises(CheckpointError, match="initial_params"):
            piflow_jax.train_teacher(config, tmp_path, initial_params=other, **given)
    del first["params"]["out"]
    with pytest.raises(ConfigError, match=r"out/bias: the network has \[2\], the start has none"):
        piflow_jax.train_teacher(config, tmp_path / "other", initial_params=first, **given)


@pytest.mark.parametrize(
    "layer", [nn.Dropout(0.5, deterministic=False), nn.BatchNorm(use_running_average=False)]
)
def test_a_module_that_wants_keys_or_always_learns_is_refused(tmp_path, layer):
    class Wanting(nn.Module):
        @nn.compact
        def __call__(self, x, t):
            return layer.copy()(nn.Dense(2)(x))

    with pytest.raises(ConfigError, match="must run without random keys, and leave its state"):
        piflow_jax.train_teacher(config_of_teacher(), tmp_path, network=Wanting(), source=POINTS)


def test_without_data(tmp_path):
    teacher, params = exact()
    teacher = dataclasses.replace(teacher, shape=(2,))
    config = settings(train__data_free=True, train__nfe=2)
    network = Small(piflow_jax.policy_outputs(config, 2))
    given = {"teacher": teacher, "teacher_params": params, "network": network}
    student = piflow_jax.distill(config, tmp_path, **given)
    assert student.sample(0, 3).shape == (3, 2)
    with pytest.raises(ConfigError, match=r"without source, set config\.train\.data_free"):
        piflow_jax.distill(settings(), tmp_path / "other", **given)


@pytest.mark.slow
def test_images_are_measured_and_looked_at(tmp_path):
    source = (IMAGES, np.arange(64) % CLASSES)
    several = {"train__nfe_choices": (1, 2), "evaluation__teacher_steps": (1, 2)}
    config = settings(evaluation__every=2, evaluation__every_samples=16, **several)
    given = {"network": Small(3), "source": source}
    teacher, params = piflow_jax.train_teacher(config_of_teacher(), tmp_path, **given)
    outputs = piflow_jax.policy_outputs(config, 3)
    student = piflow_jax.distill(
        config,
        tmp_path,
        teacher=teacher,
        teacher_params=params,
        network=Small(outputs),
        source=source,
        initial_params=params,
    )
    report = json.loads((tmp_path / "report.json").read_text())
    systems = [(row["system"], row["nfe"]) for row in report["rows"]]
    assert systems[-2:] == [("student", 1), ("student", 2)]
    assert {system for system, _ in systems} == {"teacher", "student"}
    assert piflow_jax.load(tmp_path, network=Small(outputs)).settings.train.evaluations == (1, 2)
    assert "trained for 1 or 2 evaluations" in repr(student)
    assert not sampling_cautions(student.settings.train, nfe=2)
    (said,) = sampling_cautions(student.settings.train, nfe=4)
    assert "trained for nfe=1 or 2, which evaluates its network at t = 1, 0.5; nfe=4" in said
    lines = (tmp_path / "student" / "metrics.jsonl").read_text().splitlines()
    assert "eval_frechet" in json.loads(lines[1])
    found, found_params = piflow_jax.load_teacher(tmp_path, network=Small(3))
    x, t, labels = jnp.ones((2, 8, 8, 3)), jnp.full(2, 0.5), jnp.array([0, CLASSES])
    np.testing.assert_array_equal(
        found.velocity(found_params, x, t, labels), teacher.velocity(params, x, t, labels)
    )
    longer = config_of_teacher()
    longer.teacher.steps = 4  # with which the student could not go on
    with pytest.raises(CheckpointError, match="was taught by the teacher at step 3"):
        piflow_jax.train_teacher(longer, tmp_path, **given)


def test_training_images_of_a_report_are_spread_over_a_set_without_classes(tmp_path):
    x = np.sort(IMAGES, axis=0)
    source = ArraySource(name="mine", x=x, test=ArraySource(name="test", x=IMAGES[:32]))
    teacher, params = exact()
    measured = {}
    row = Bench.row
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Bench,
            "row",
            lambda self, system, nfe, images, *more: (
                measured.update({system: images}) or row(self, system, nfe, images, *more)
            ),
        )
        piflow_jax.distill(
            settings(train__steps=1),
            tmp_path,
            teacher=teacher,
            teacher_params=params,
            network=Small(piflow_jax.policy_outputs(settings(), 3)),
            source=source,
        )
    images = measured["training images"]
    places = [int(np.argmin(np.abs(x - image).sum((1, 2, 3)))) for image in images]
    assert len(images) == 16 and max(places) > 32


@pytest.mark.parametrize(
    "given", ["float32", "bfloat16", "others", "linen variables", "of train_teacher"]
)
def test_a_start_at_the_teacher_is_recognised(given, tmp_path, caplog):
    """By values, in whatever dtype; anything else is said to predict velocities."""
    theirs, schedule = Small(2), Schedule.cosine(time_scale=1000.0)
    params = theirs.init(jax.random.key(0), jnp.zeros((1, 2)), jnp.zeros(1))
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16).astype(jnp.float32), params)
    initial = params if given != "others" else jax.tree.map(lambda a: a + 1e-3, params)
    if given == "bfloat16":
        params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    teacher = Teacher(
        predict=lambda params, z, s, cond: theirs.apply(params, z, s),
        shape=(2,),
        prediction="eps",
        schedule=schedule,
    )
    config = settings(train__steps=1)
    network = Small(piflow_jax.policy_outputs(config, 2))
    if given == "of train_teacher":
        initial = {"params": params, "carried": ()}
    if given in ("linen variables", "of train_teacher"):
        example = jnp.zeros((1, 2)), jnp.zeros(1)
        network = (lambda key, module=network: module.init(key, *example), network.apply)
    student = piflow_jax.distill(
        config,
        tmp_path,
        teacher=teacher,
        teacher_params=params,
        network=network,
        source=POINTS,
        initial_params=initial,
    )
    asked = student.network.asked
    assert (asked is None) == (given == "others")
    assert ("initial_params are not teacher_params" in caplog.text) == (given == "others")


class Listed(nn.Module):
    """A network with a field that has no hash."""

    outputs: int
    widths: list

    @nn.compact
    def __call__(self, x, t):
        for width in self.widths:
            x = jnp.tanh(nn.Dense(width)(x))
        return nn.Dense(self.outputs)(x)


def test_a_network_with_a_list_among_its_fields_is_sampled():
    config = piflow_jax.config.parse(settings())
    data = DataShape(name="points", channels=2, sites=())
    network = own_network("own", Listed(9, [4]), data, config.policy)
    assert network == dataclasses.replace(network) and hash(network) == hash(network)
    other = own_network("own", Listed(9, [4]), data, config.policy)
    assert network != other  # lists may change
    same = [own_network("own", Small(9), data, config.policy) for _ in range(2)]
    assert same[0] == same[1] and hash(same[0]) == hash(same[1])


def test_an_nnx_teacher_with_random_state_is_given_as_its_state(tmp_path):
    model = Averaging(2, nnx.Rngs(0))
    model.eval()
    graph, state = nnx.split(model)
    teacher = Teacher(predict=lambda state, z, s, cond: nnx.merge(graph, state)(z, s), shape=(2,))
    config = settings(train__steps=1)
    network = Small(piflow_jax.policy_outputs(config, 2))
    student = piflow_jax.distill(
        config, tmp_path, teacher=teacher, teacher_params=state, network=network, source=POINTS
    )
    assert bool(jnp.isfinite(student.sample(0, 2)).all())
