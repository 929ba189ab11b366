"""How systems sample: what files say of it, and that it is one mechanism."""

import types
from pathlib import Path

import numpy as np
import pytest

from piflow_jax.config import parse
from piflow_jax.modes import adm, sample_prompts
from piflow_jax.systems.sampling import sampling_record, student_times
from piflow_jax.systems.shapes import DataShape
from tests import tiny

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


@pytest.mark.parametrize(("nfe", "scale", "wanted"), [(3, 0.5, (1, 0.6, 0.2)), (1, 0.5, (1,))])
def test_times_are_those_of_the_segments(nfe, scale, wanted):
    times = student_times(changed("train.final_step_size_scale", scale).train, nfe)
    np.testing.assert_allclose(times.src, wanted, rtol=1e-12)
