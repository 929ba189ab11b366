"""How systems sample: what files say of it, and that it is one mechanism."""

import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax.config import parse
from piflow_jax.flow.sampling import ode_sample
from piflow_jax.flow.schedule import TimeWarp
from piflow_jax.flow.teacher import Teacher
from piflow_jax.modes import adm, sample_prompts
from piflow_jax.systems.sampling import (
    TEACHER_SOLVERS,
    sampling_record,
    student_times,
    teacher_sampler,
)
from piflow_jax.systems.shapes import DataShape
from tests import gaussian, tiny

DATA = DataShape(name="digits", sample_size=8, channels=1, num_classes=10)
# A setting, another value of it, and its name in files.
SETTINGS = (
    ("evaluation.seed", 5, "seed"),
    ("evaluation.nfe", 3, "nfe"),
    ("train.nfe", 3, "nfe"),
    ("train.final_step_size_scale", 0.5, "final_step_size_scale"),
    ("train.shift", 3.2, "shift"),
    ("evaluation.substeps", 77, "substeps"),
    ("evaluation.solver", "multistep", "solver"),
    ("evaluation.temperature", 0.5, "temperature"),
    ("model.dtype", "bfloat16", "dtype"),
)


def changed(key, value):
    config = tiny.get_config()
    config.evaluation.solver = "euler"
    group, name = key.split(".")
    config[group][name] = value
    return parse(config)


@pytest.mark.parametrize(("key", "value", "name"), SETTINGS)
def test_what_files_say_of_samples_follows_each_setting(key, value, name):
    config = changed(key, value)
    plain, found = sampling_record(changed("evaluation.seed", 0)), sampling_record(config)
    assert found[name] == value != plain[name]
    assert {key for key in plain if plain[key] != found[key]} == {name}
    named = types.SimpleNamespace(identity="vae", digest="ab", path=Path("reference.npz"))
    said = adm.protocol(config, DATA, named, named, named, 10)
    of_picture = sample_prompts._settings(config, DATA, 0)
    assert str(value) in str(getattr(said, name, value))
    assert value in [v for k, v in of_picture.items() if k.endswith(f".{name}")]


SOLVERS = [("euler", 7), ("heun", 14), ("multistep", 7), ("sde", 7)]


@pytest.mark.parametrize(("solver", "nfe"), SOLVERS)
def test_a_teacher_is_said_to_be_sampled_as_it_is(solver, nfe):
    config = tiny.get_config()
    config.evaluation.update({"teacher_solver": solver, "teacher_steps": (2, 7)})
    config.evaluation.system = "teacher"
    config.teacher.guidance_scale = 2.4
    config = parse(config)
    named = types.SimpleNamespace(identity="vae", digest="ab", path=Path("reference.npz"))
    said = adm.protocol(config, DATA, named, named, named, 10, "teacher")
    assert (said.nfe, said.substeps, said.solver, said.guidance) == (nfe, 7, solver, 2.4)
    of_picture = sample_prompts._settings(config, DATA, 0)
    # What was drawn before there was a choice stays as it is.
    assert of_picture.get("evaluation.teacher_solver", "euler") == solver


@pytest.mark.parametrize("solver", [solver for solver, _ in SOLVERS])
def test_a_sample_of_a_teacher_depends_on_its_own_noise_alone(solver):
    teacher = Teacher(predict=lambda params, x, t, c: gaussian.velocity(x, t), shape=(2, 1))
    sample = teacher_sampler(teacher, 2.0, 6, solver)
    noise = np.random.default_rng(0).normal(size=(3, 2, 1)).astype(np.float32)
    whole = np.asarray(sample(None, jnp.asarray(noise), None))
    last = np.asarray(sample(None, jnp.asarray(noise[2:]), None))
    np.testing.assert_allclose(last[0], whole[2], rtol=1e-5, atol=1e-6)
    flow = np.asarray(ode_sample(gaussian.velocity, jnp.asarray(noise), 6, TimeWarp(2.0)))
    follows = TEACHER_SOLVERS[solver].follows_flow
    assert (np.abs(whole - flow).max() < 0.2) == follows
    assert follows or np.unique(whole - flow).size == whole.size  # each draws noise of its own


@pytest.mark.parametrize(("nfe", "scale", "wanted"), [(3, 0.5, (1, 0.6, 0.2)), (1, 0.5, (1,))])
def test_times_are_those_of_the_segments(nfe, scale, wanted):
    times = student_times(changed("train.final_step_size_scale", scale).train, nfe)
    np.testing.assert_allclose(times.src, wanted, rtol=1e-12)
