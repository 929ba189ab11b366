"""A teacher is sampled before its student is trained."""

import shutil

import jax
import pytest
from PIL import Image

from piflow_jax.config import parse
from piflow_jax.modes.export import export
from piflow_jax.modes.sample import sample
from piflow_jax.runs.checkpoint import CheckpointError
from piflow_jax.systems.networks import teacher_network
from piflow_jax.systems.shapes import DataShape
from piflow_jax.systems.spec import teacher_spec
from tests import tiny
from tests.saved_runs import save_run, save_stage

DATA = DataShape(name="images", sample_size=8, channels=3, num_classes=2)


def settings(**changes):
    config = tiny.get_config()
    config.data.name, config.data.image_size = "images", 8
    config.evaluation.system = "teacher"
    config.update_from_flattened_dict(changes)
    return parse(config)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A work directory whose teacher of pictures is trained, and nothing else."""
    workdir, config = tmp_path_factory.mktemp("run"), settings()
    network = teacher_network(config.model, DATA)
    save_stage(
        workdir, "teacher", jax.jit(network.init)(jax.random.key(0)), teacher_spec(config, DATA)
    )
    return workdir


def test_its_own(run):
    path = sample(settings(), run)
    assert path.name == "teacher.png" and Image.open(path).size[0] > 480


def test_one_that_is_given(run, tmp_path):
    sample(settings(**{"teacher.checkpoint": str(run)}), tmp_path)
    assert (tmp_path / "teacher.png").is_file()


def test_none(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*teacher"):
        sample(settings(), tmp_path)


def test_one_that_never_saved_is_not_exported(tmp_path):
    """A start leaves its folder that ended before its first checkpoint."""
    config = settings(**{"evaluation.system": "student"})
    save_run(config, DATA, tmp_path)
    shutil.rmtree(tmp_path / "teacher" / "checkpoints" / "1")
    assert [path.name for path in export(config, tmp_path)] == ["student.safetensors"]
