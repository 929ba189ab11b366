"""What `distill` and `train_teacher` refuse of networks, teachers and data that are not ours."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import piflow_jax
from piflow_jax.config import ConfigError
from piflow_jax.runs.checkpoint import CheckpointError
from piflow_jax.systems.own import own_network
from piflow_jax.systems.shapes import DataShape
from tests.distillation.own import (
    CLASSES,
    LABELLED,
    POINTS,
    SOURCES,
    TOKENS,
    Small,
    config_of_teacher,
    exact,
    settings,
)
from tests.saved_runs import save_stage


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two steps, and what it was given."""
    teacher, params = exact()
    workdir = tmp_path_factory.mktemp("finished")
    network = Small(piflow_jax.policy_outputs(settings(), 2))
    given = {"teacher": teacher, "teacher_params": params, "network": network, "source": LABELLED}
    student = piflow_jax.distill(settings(train__steps=2), workdir, **given)
    return workdir, given, student


CHANGES = {
    "teacher's weights": (lambda: {"teacher_params": exact(0.4)[1]}, "teacher.parameters"),
    "source": (lambda: {"source": (POINTS[::-1].copy(), LABELLED[1])}, "config.source"),
    "network": (lambda: {"network": Small(9, 7)}, "params/network/Dense_0"),
    "prediction": (
        lambda: {"teacher": dataclasses.replace(exact()[0], prediction="eps")},
        "teacher.description",
    ),
    "guidance": (
        lambda: {"teacher": dataclasses.replace(exact()[0], guidance_scale=2.0, null_cond=CLASSES)},
        "teacher.guidance_scale",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_goes_on_with_what_it_began(change, finished, tmp_path):
    workdir, given, _ = finished
    shutil.copytree(workdir, tmp_path / "run")
    make, key = CHANGES[change]
    given = given | make()
    with pytest.raises(CheckpointError, match=key.replace(".", r"\.")):
        piflow_jax.distill(settings(train__steps=3), tmp_path / "run", **given)


def test_a_run_does_not_go_on_with_another_start(finished, tmp_path):
    workdir, given, student = finished
    shutil.copytree(workdir, tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"initial_params: .* trained with; .* has 'none'"):
        piflow_jax.distill(
            settings(train__steps=2), tmp_path / "run", **given, initial_params=student
        )


def test_a_teacher_that_has_a_student_is_not_trained_further(tmp_path):
    for stage in ("teacher", "student"):
        save_stage(tmp_path, stage, {"w": np.zeros(1)}, {})
    with pytest.raises(CheckpointError, match="was taught by the teacher at step 1"):
        piflow_jax.train_teacher(config_of_teacher(), tmp_path, network=Small(2), source=POINTS)


def test_a_student_starts_where_another_ended(finished, tmp_path):
    _, given, first = finished
    config = settings(train__steps=1)
    config.train.optimizer.learning_rate = 1e-12
    trained = dataclasses.replace(first.settings, trained_in=("a, sha256 0",))
    first = dataclasses.replace(first, settings=trained)
    student = piflow_jax.distill(config, tmp_path, **given, initial_params=first)
    loaded = piflow_jax.load(tmp_path, network=given["network"])
    assert student.settings.trained_in == loaded.settings.trained_in == ("a, sha256 0",)
    for a, b in zip(*map(jax.tree.leaves, (student.params, first.params)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


class Outside:
    """A source with a label that it has no class for."""

    name, shape, num_classes = "mine", (2,), CLASSES

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"x": POINTS[index], "condition": np.int32(index % (CLASSES + 1))}


class Nested(Outside):
    """A source whose conditions are mappings of mappings."""

    def __getitem__(self, index):
        return {"x": POINTS[index], "condition": {"a": {"b": np.float32(1)}}}


REFUSED = {
    "nested conditions": (
        lambda: ({}, {"source": Nested()}),
        "a condition must be an array of numbers, or a mapping of such arrays: a is of dtype",
    ),
    "key": (lambda: ({"model__dit__hidden": 32}, {}), r"config\.model\.dit\.hidden has no meaning"),
    "outputs": (lambda: ({}, {"network": Small(4)}), "it must make .*: 9 per site"),
    "kind": (lambda: ({}, {"network": 3}), "not a flax.linen.Module, a flax.nnx.Module or a pair"),
    "sign": (
        lambda: ({}, {"teacher": dataclasses.replace(exact()[0], predict=negated)}),
        "with the opposite sign",
    ),
    "shape": (
        lambda: ({}, {"teacher": dataclasses.replace(exact()[0], shape=(3,))}),
        r"samples of arrays are \[2\], the teacher's \[3\]",
    ),
    "start": (lambda: ({}, {"initial_params": {"a": np.zeros(3)}}), "a: nothing in the network"),
    "test": (
        lambda: ({}, {"test_source": TOKENS}),
        r"samples of test are \[5, 2\], those of arrays \[2\]",
    ),
    "test without conditions": (
        lambda: ({}, {"source": SOURCES["mapping"], "test_source": POINTS}),
        r"examples of test have no conditions, those of arrays {'pose': \[3\]}: samples for",
    ),
    "test with labels": (
        lambda: ({}, {"source": POINTS, "test_source": LABELLED}),
        r"examples of test have {'condition': \[\]}, those of arrays none",
    ),
    "label": (
        lambda: ({}, {"source": Outside()}),
        r"mine: example 2: its label must be an integer in \[0, 2\), got 2",
    ),
    "label of a test": (lambda: ({}, {"test_source": Outside()}), "mine: example 2: its label"),
    "no bias": (
        lambda: ({}, {"network": Unbiased(9), "initial_params": started(Unbiased(2))}),
        "the layer that predicts has no bias, so all components stay equal",
    ),
    "window": (lambda: ({"train__window_substeps": 9}, {}), r"window_substeps must be in \[0, 8\]"),
    "corrector": (
        lambda: ({"train__corrector__kind": "policy", "train__nfe": 2}, {}),
        "follows one policy from noise to data and needs config.train.nfe = 1",
    ),
}


class Unbiased(nn.Module):
    """A network whose last layer has no bias."""

    outputs: int

    @nn.compact
    def __call__(self, x, t, labels=None):
        return nn.Dense(self.outputs, use_bias=False)(x)


def started(module):
    return module.init(jax.random.key(0), jnp.zeros((1, 2)), jnp.zeros(1))["params"]


def negated(params, z, s, cond=None):
    return -exact()[0].predict(params, z, s)


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_said_before_anything_is_trained(what, finished, tmp_path):
    make, words = REFUSED[what]
    changes, given = make()
    with pytest.raises(ValueError, match=words):
        piflow_jax.distill(settings(**changes), tmp_path, **(finished[1] | given))
    assert not list(tmp_path.glob("student/checkpoints/*"))


def test_a_teacher_is_not_trained_on_what_is_no_source(tmp_path):
    with pytest.raises(ValueError, match="mine: example 2: its label"):
        piflow_jax.train_teacher(config_of_teacher(), tmp_path, network=Small(2), source=Outside())
    assert not list(tmp_path.iterdir())


class Pair(nn.Module):
    """A network that returns more than its prediction."""

    @nn.compact
    def __call__(self, x, t, labels=None):
        return nn.Dense(9)(x), {}


def test_what_a_network_is_given_and_makes(finished):
    config = piflow_jax.config.parse(settings())
    data = DataShape(name="points", channels=2, sites=())
    with pytest.raises(ConfigError, match=r"own made a tuple, it must make one array \[1, 9\]"):
        own_network("own", Pair(), data, config.policy).check_start()
    workdir, given, student = finished
    x = jnp.zeros((2, 2))
    for label in (-1, CLASSES + 1):
        with pytest.raises(ValueError, match=rf"labels must be in \[0, {CLASSES}\], got {label}"):
            student.policy(x, 1.0, np.array([0, label]))
    np.testing.assert_array_equal(
        student.policy(x, 1.0, [0, 1]).velocity(x, jnp.full(2, 0.5)),
        student.policy(x, 1.0, np.array([0, 1])).velocity(x, jnp.full(2, 0.5)),
    )
    with pytest.raises(ValueError, match="a network of your own computes in its own dtype"):
        piflow_jax.load(workdir, network=given["network"], dtype="bfloat16")
