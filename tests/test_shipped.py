"""Students that come with the package: how they are made, named and found, and what they give."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from etils import epath

import piflow_jax
from piflow_jax import loading
from piflow_jax.config import parse
from piflow_jax.convert import open_weights, write_safetensors
from piflow_jax.loading import shipped, shipped_names
from piflow_jax.modes.export import export
from piflow_jax.systems.shapes import DataShape
from tests import tiny
from tests.modules import load_module
from tests.saved_runs import save_run, save_stage

ROOT = Path(__file__).parents[1]
DATA = DataShape(name="digits", sample_size=8, channels=1, num_classes=10)
ship = load_module(ROOT / "tools" / "ship.py")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that was exported, with a report."""
    settings = parse(tiny.get_config())
    workdir = save_run(settings, DATA, tmp_path_factory.mktemp("run"))
    export(settings, workdir)
    figures = {"frechet": 1.25, "precision": 0.5, "recall": 0.75, "diversity": 4.0}
    systems = (("teacher", 64), ("student", 1), ("training images", 0))
    rows = [{"system": system, "nfe": nfe, "figures": figures} for system, nfe in systems]
    protocol = {"seed": 3, "samples": 5000, "real_images": 10_000, "real_split": "test"}
    report = {"rows": rows, "protocol": protocol | {"features_sha256": "ab" * 32}}
    (workdir / "report.json").write_text(json.dumps(report))
    return workdir


@pytest.fixture(scope="module")
def continued(run, tmp_path_factory):
    """A run that was continued from the first: another student, and other figures."""
    workdir = tmp_path_factory.mktemp("continued")
    weights = open_weights(run / "student.safetensors")
    arrays = {name: np.asarray(leaf) + 1 for name, leaf in weights.items()}
    write_safetensors(workdir / "student.safetensors", arrays, weights.metadata)
    text = (run / "report.json").read_text()
    (workdir / "report.json").write_text(text.replace("1.25", "1.125"))
    return workdir


@pytest.fixture
def package(run, continued, tmp_path, monkeypatch):
    """Where the package keeps its students, with those of the run; a path may have brackets."""
    monkeypatch.setattr(shipped, "_FOLDER", type(shipped._FOLDER)(tmp_path / "[shipped]"))
    other = f"--student=corrected={continued}"
    ship.main([str(run), "fashion_mnist", "--to", str(tmp_path / "[shipped]"), other])
    return tmp_path / "[shipped]" / "fashion_mnist"


def rounded(params):
    return jax.tree.map(
        lambda a: np.asarray(a).astype(ml_dtypes.bfloat16).astype(np.float32), params
    )


def test_a_name_loads_the_rounded_weights_of_its_run(run, package):
    assert shipped_names() == ("fashion_mnist", "fashion_mnist_corrected")
    student, original = piflow_jax.load("fashion_mnist"), piflow_jax.load(run)
    jax.tree.map(np.testing.assert_array_equal, student.params, rounded(original.params))
    for one in ("model", "policy", "data"):
        assert getattr(student.settings, one) == getattr(original.settings, one)
    (teacher, params), (other, weights) = map(piflow_jax.load_teacher, ("fashion_mnist", run))
    jax.tree.map(np.testing.assert_array_equal, params, rounded(weights))
    x, t, labels = jnp.ones((2, 8, 8, 1)), jnp.full(2, 0.5), jnp.arange(2)
    found = (one.velocity(params, x, t, labels) for one in (teacher, other))
    np.testing.assert_array_equal(*found)


def test_students_of_one_teacher_are_told_apart(continued, package):
    student = piflow_jax.load("fashion_mnist_corrected")
    original = piflow_jax.load(continued / "student.safetensors")
    jax.tree.map(np.testing.assert_array_equal, student.params, rounded(original.params))
    both = [piflow_jax.load_teacher(name)[1] for name in shipped_names()]
    jax.tree.map(np.testing.assert_array_equal, *both)


def test_a_teachers_file_is_loaded_as_its_run_is(run):
    _, params = piflow_jax.load_teacher(run / "teacher.safetensors")
    jax.tree.map(np.testing.assert_array_equal, params, piflow_jax.load_teacher(run)[1])


def test_a_network_of_ones_own_is_in_no_file(run):
    with pytest.raises(ValueError, match=r"student\.safetensors: network= is for a run"):
        piflow_jax.load(run / "student.safetensors", network=object())


@pytest.mark.parametrize("place", [".", "teacher", "teacher/checkpoints", "teacher/checkpoints/1"])
def test_a_teacher_is_guided_as_its_student_was_taught_wherever_it_is_found(tmp_path, place):
    for stage in ("teacher", "student"):
        save_stage(tmp_path, stage, {"a": np.ones(1)}, {}, {"teacher.guidance_scale": 2.5})
    assert loading._guidance(epath.Path(tmp_path / place)) == {"guidance_scale": 2.5}


def test_the_card_says_what_was_measured(package):
    card = (package / "README.md").read_text()
    assert "| student | 1 | 1.250 | 0.500 | 0.750 | 4.000 |" in card
    assert "| student, corrected | 1 | 1.125 | 0.500 | 0.750 | 4.000 |" in card
    assert 'corrected = piflow_jax.load("fashion_mnist_corrected")' in card
    assert "by `--config=configs/fashion_mnist.py:gm_corrected`" in card
    assert "| training images | - |" in card and "5,000 samples against 10,000 test" in card
    assert "MIT licence" in card and "seed 3." in card


def test_what_lies_in_the_current_directory_comes_first(run, package, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run, "fashion_mnist")
    own = piflow_jax.load("fashion_mnist")
    jax.tree.map(np.testing.assert_array_equal, own.params, piflow_jax.load(run).params)


def test_what_is_neither_a_path_nor_a_name_is_said(package, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for load, kind in ((piflow_jax.load, "student"), (piflow_jax.load_teacher, "teacher")):
        with pytest.raises(FileNotFoundError, match=rf"no shipped {kind} .*\(fashion_mnist, "):
            load("fashion-mnist")


def test_a_file_that_is_no_teachers_of_ours_is_refused(run):
    with pytest.raises(ValueError, match=r"student\.safetensors: .*teacher"):
        piflow_jax.load_teacher(run / "student.safetensors")


def test_weights_are_small_enough_to_ship(run, tmp_path, monkeypatch):
    monkeypatch.setattr(ship, "LIMIT", 1000)
    with pytest.raises(SystemExit, match=r"student\.safetensors has more than"):
        ship.main([str(run), "fashion_mnist", "--to", str(tmp_path)])


@pytest.mark.parametrize("name", shipped_names())
def test_shipped_students_give_what_their_teachers_give(name):
    """One evaluation is nearer to the teacher's images of many than the teacher's own one is."""
    student, (teacher, params) = piflow_jax.load(name), piflow_jax.load_teacher(name)
    assert len(set(student.class_names)) == student.settings.data.num_classes
    assert "class 0" not in student.class_names
    labels = np.arange(8) % student.settings.data.num_classes
    noise = np.random.default_rng(0).normal(size=(8, *teacher.shape)).astype(np.float32)

    def velocity(x, t):
        return teacher.velocity(params, x, t, labels)

    warp = piflow_jax.TimeWarp(student.settings.train.shift)
    ends = {steps: piflow_jax.ode_sample(velocity, noise, steps, warp) for steps in (1, 32)}
    own = student.sample(0, labels, noise=noise)
    errors = [np.mean((np.asarray(one) - ends[32]) ** 2) for one in (own, ends[1])]
    assert errors[0] < 0.5 * errors[1]
    weights = open_weights(shipped.weights_path(name, "student"))
    assert all(weights[key].dtype == ml_dtypes.bfloat16 for key in weights)
