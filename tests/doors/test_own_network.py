"""A network of the user's own: trained, continued, loaded, and what is refused of it."""

import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import piflow_jax
from piflow_jax.config import ConfigError, PolicyConfig
from piflow_jax.systems.own import own_network
from piflow_jax.systems.policies import POLICIES
from piflow_jax.systems.shapes import DataShape

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "tiny.py"
DATA = DataShape(name="digits", sample_size=4, channels=2, num_classes=3)
POLICY = {
    "gm": PolicyConfig(kind="gm", num_components=3),
    "dx": PolicyConfig(kind="dx", num_grid=3),
    "arc": PolicyConfig(kind="arc", num_components=3),
}


class Small(nn.Module):
    """As little as tells states, times and labels apart."""

    outputs: int
    labels: int = 4
    middle: int = 5

    @nn.compact
    def __call__(self, x, t, labels):
        told = nn.Embed(self.labels, self.middle)(labels) + nn.Dense(self.middle)(t[:, None])
        h = jnp.tanh(nn.Dense(self.middle)(x) + told[:, None, None, :])
        return nn.Dense(self.outputs, name="out")(h)


def small(outputs, shape, num_classes):
    return Small(outputs, num_classes + 1)


def wide(outputs, shape, num_classes):
    """A student wider than its teacher."""
    return Small(outputs, num_classes + 1, middle=5 if outputs == shape[-1] else 6)


def without_null(outputs, shape, num_classes):
    return Small(outputs, num_classes)


def too_many(outputs, shape, num_classes):
    return Small(outputs + 1, num_classes + 1)


def no_module(outputs, shape, num_classes):
    return lambda x, t, labels: x


class Averaging(nn.Module):
    """Has running averages."""

    outputs: int

    @nn.compact
    def __call__(self, x, t, labels):
        return nn.Dense(self.outputs)(nn.BatchNorm(use_running_average=False)(x))


def averaging(outputs, shape, num_classes):
    return Averaging(outputs)


@pytest.mark.parametrize("kind", list(POLICY))
def test_a_student_of_ones_own_network_starts_at_its_teacher(kind):
    policy = POLICY[kind]
    teacher = own_network("small", small, DATA, None)
    student = own_network("small", small, DATA, policy)
    variables = jax.jit(teacher.init)(jax.random.key(0))
    started = jax.jit(lambda v: student.start(jax.random.key(1), teacher, v))(variables)
    x = jax.random.normal(jax.random.key(2), (5, 4, 4, 2))
    t, labels = jnp.linspace(0.1, 1.0, 5), jnp.arange(5) % 4
    expected = Small(2).apply({"params": variables["params"]}, x, t, labels)
    config = piflow_jax.config.parse(piflow_jax.config.base_config(), None)
    output = jax.jit(student.apply)(student.with_base(started, ()), x, t, labels)
    policy_at = POLICIES[kind].create(policy, config.train, output, x, t, 1e-6)
    velocity = policy_at.velocity(x, t)
    # Components are set apart by 0.05 of noise, of which the mean is what is seen.
    np.testing.assert_allclose(velocity, expected, atol=1e-4 if kind == "dx" else 0.15)
    if kind == "gm":
        bias = started["network"]["out"]["bias"]
        given = variables["params"]["out"]["bias"]
        np.testing.assert_allclose(bias[:6].reshape(3, 2), np.tile(given, (3, 1)), atol=0.2)
        np.testing.assert_array_equal(bias[6:], 0)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (without_null, r"not finite for the null label, 3: embed num_classes \+ 1 = 4 labels"),
        (too_many, r"made \[1, 4, 4, 3\] of states .*must make \[1, 4, 4, 2\]: 2 per site"),
        (no_module, "what here:make made is a function, not a flax.linen.Module"),
    ],
)
def test_a_network_that_cannot_be_trained_is_refused(make, words):
    with pytest.raises(ConfigError, match=words):
        own_network("here:make", make, DATA, None).check()


def test_parameters_at_which_a_student_cannot_start_are_listed():
    teacher = own_network("here:wide", wide, DATA, None)
    with pytest.raises(ConfigError) as refusal:
        own_network("here:wide", wide, DATA, POLICY["gm"]).check(teacher)
    assert "Dense_1/bias: the network has [6], the start has [5]" in str(refusal.value)
    assert "out/bias" not in str(refusal.value)


@pytest.fixture
def command(command, monkeypatch):
    """The tiny job's command line, where the examples are found."""
    monkeypatch.syspath_prepend(ROOT)
    return functools.partial(command, f"--config={TINY}")


ADAMW = ("--config.teacher.optimizer.kind=adamw", "--config.train.optimizer.kind=adamw")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--config.model.network=nowhere:unet"], "No module named 'nowhere'.*package.module:fun"),
        (["--config.model.network=examples.unet:nothing"], "no attribute 'nothing'"),
        (["--config.model.network=diit"], "did you mean 'dit'"),
        (
            ["--config.model.network=examples.unet:unet", "--config.train.optimizer.kind=muon"],
            "config.train.optimizer.kind = 'muon' is for the matrices of a DiT's blocks",
        ),
        (
            ["--config.model.network=examples.unet:unet", "--config.teacher.weights=x"],
            "config.teacher.weights must be empty",
        ),
        (
            ["--config.model.network=examples.unet:unet", "--mode=rivals"],
            "--mode=rivals is for networks of this package",
        ),
        (
            ["--config.model.network=examples.unet:unet", "--mode=export"],
            "--mode=export is for networks of this package",
        ),
    ],
)
def test_what_cannot_be_done_with_it_is_said(command, tmp_path, flags, words):
    status, said = command(f"--workdir={tmp_path}", *ADAMW, *flags)
    assert status == 2, said
    assert re.search(words, said), said


@pytest.mark.slow
def test_the_example_is_trained_continued_measured_and_loaded(command, tmp_path):
    from examples.unet import unet

    once = "--config.evaluation.teacher_steps=(1,)"
    run = [f"--workdir={tmp_path}", "--config.model.network=examples.unet:unet", *ADAMW, once]
    status, said = command(*run, "--config.train.steps=4")
    assert status == 0, said
    first = json.loads((tmp_path / "report.json").read_text())
    status, said = command(*run, "--config.train.steps=6")
    assert status == 0, said
    metrics = (tmp_path / "student" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in metrics] == [2, 4, 6]  # nothing twice
    report = json.loads((tmp_path / "report.json").read_text())
    assert report != first
    assert (tmp_path / "samples.png").is_file()

    with pytest.raises(ValueError, match="pass network=, that module or function"):
        piflow_jax.load(tmp_path)
    student = piflow_jax.load(tmp_path, network=unet)
    samples = student.sample(0, [1, 2, 3])
    assert samples.shape == (3, 8, 8, 1) and bool(jnp.isfinite(samples).all())
    teacher, params = piflow_jax.load_teacher(tmp_path, network=unet)
    x = jnp.zeros((2, 8, 8, 1))
    assert teacher.velocity(params, x, jnp.ones(2), jnp.array([1, 10])).shape == x.shape
