"""The teacher's samples are made once, and again when anything that they depend on has changed."""

import contextlib
import shutil

import numpy as np
import pytest

from piflow_jax.config import parse
from piflow_jax.data import load_digits_source
from piflow_jax.distillation.bench import Bench, _read_samples
from piflow_jax.evaluation.kept import KeptFileError, read_kept
from piflow_jax.loading.runs import load_teacher
from piflow_jax.modes.evaluate import evaluate
from piflow_jax.runs.fingerprints import tree_fingerprint
from piflow_jax.systems.datasets import shape_of
from piflow_jax.systems.judges import open_judge, second_judge
from tests import tiny
from tests.saved_runs import save_run


def settings(**changes):
    config = tiny.get_config()
    config.update_from_flattened_dict(changes)
    return parse(config)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config, source = settings(), load_digits_source()
    return save_run(config, shape_of(config, source), tmp_path_factory.mktemp("run"))


@contextlib.contextmanager
def counted_samplers():
    """Of each sampler that runs meanwhile, its number."""
    asked, sample = [], Bench.sample

    def counted(self, sampler, params, name):
        asked.append(sampler)
        return sample(self, sampler, params, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bench, "sample", counted)
        yield asked


@pytest.fixture
def made():
    with counted_samplers() as asked:
        yield asked


@pytest.fixture(scope="module")
def evaluated(run):
    """The first evaluation's report, how many samplers ran, and the file that it leaves."""
    with counted_samplers() as asked:
        report = evaluate(settings(), run)
    return report, len(asked), (run / "teacher_samples.npz").read_bytes()


def test_a_second_judge_measures_pixels():
    """Real images as samples are at no distance; a shift by one deviation is one of every axis."""
    config, source = settings(), load_digits_source()
    data = shape_of(config, source)
    bench = Bench(config, source, data, open_judge(source, "", config.evaluation, "digits"))
    pixels = second_judge(source, object())
    labels = np.arange(len(source)) % 10
    bench._labels = labels
    assert bench.row("real", 0, source.x, 0.0, None).pixel_frechet < 1e-6
    halved = bench.row("halved", 0, source.x / 2, 0.0, None).pixel_frechet
    real = pixels.extract(source.x)
    # Features of halved images are `f / 2 - c`: means and deviations of every axis in closed form.
    moved = pixels.extract(source.x / 2).mean(axis=0) - real.mean(axis=0)
    expected = np.sum(moved**2) + real.shape[1] * (1 - 0.5) ** 2
    np.testing.assert_allclose(halved, expected, rtol=1e-3)


def test_samples_are_made_once(run, made, evaluated):
    first, count, _ = evaluated
    assert count == 3  # the teacher at 1 and 2 steps, and the student
    again = evaluate(settings(), run)
    assert len(made) == 2
    for one, other in zip(first.rows, again.rows, strict=True):
        assert (one.system, one.figures, one.endpoint_mse) == (
            *(other.system, other.figures, other.endpoint_mse),
        )
    assert first.find("teacher", 2) == again.find("teacher", 2)  # its seconds too


@pytest.mark.parametrize(
    "change",
    [
        {"evaluation.seed": 1},
        {"teacher.guidance_scale": 2.0},
        {"evaluation.teacher_steps": (1, 3)},
        {"evaluation.teacher_solver": "multistep"},
    ],
)
def test_other_samples_are_made_anew(run, made, evaluated, change):
    (run / "teacher_samples.npz").write_bytes(evaluated[-1])
    other = settings(**change)
    bench_rows = evaluate(other, run).rows
    assert len(made) == 3 and bench_rows[1].nfe == other.evaluation.teacher_steps[-1]


@pytest.mark.parametrize(
    ("solver", "evaluations", "paired"), [("heun", 2, True), ("sde", 1, False)]
)
def test_rows_of_a_teacher_count_its_evaluations(run, evaluated, solver, evaluations, paired):
    report = evaluate(settings(**{"evaluation.teacher_solver": solver}), run)
    (run / "teacher_samples.npz").write_bytes(evaluated[-1])
    rows = [row for row in report.rows if row.system in ("teacher", "student")]
    assert [row.nfe for row in rows] == [evaluations, 2 * evaluations, 1]
    assert report.protocol["teacher_solver"] == solver
    # The ends of an SDE are not where the student's paths should end.
    assert [row.endpoint_mse is not None for row in rows] == [paired, False, paired]


def test_a_report_has_the_steps_of_what_was_measured(run, evaluated, tmp_path, monkeypatch):
    """Not of a run that trains on meanwhile, and not of its teacher where another one is given."""
    shutil.copytree(run, tmp_path / "run")
    place = tmp_path / "run" / "student" / "checkpoints"

    def trained(bench):
        shutil.copytree(place / "1", place / "2")
        return []

    monkeypatch.setattr(Bench, "of_training_data", trained)
    report = evaluate(settings(**{"teacher.checkpoint": str(run)}), tmp_path / "run")
    assert report.protocol["steps"] == {"teacher": None, "student": 1}
    assert evaluated[0].protocol["steps"] == {"teacher": 1, "student": 1}


@pytest.mark.parametrize("same", [True, False])
def test_a_student_of_another_teacher_is_compared_with_a_warning(
    run, tmp_path, monkeypatch, caplog, same
):
    config, data = settings(), shape_of(settings(), load_digits_source())
    teacher = tree_fingerprint(load_teacher(config, data, run)) if same else 16 * "0"
    save_run(config, data, tmp_path, **{"teacher.parameters": f"fingerprint {teacher}"})
    monkeypatch.setattr("piflow_jax.modes.evaluate.compare", lambda *args, **options: None)
    evaluate(config, tmp_path)
    assert ("taught by another teacher" in caplog.text) == (not same)


def test_other_weights_make_others(made, evaluated, tmp_path):
    config, data = settings(), shape_of(settings(), load_digits_source())
    other = save_run(config, data, tmp_path)
    (tmp_path / "teacher_samples.npz").write_bytes(evaluated[-1])
    evaluate(config, other)
    assert len(made) == 2  # the same weights: taken
    with np.load(tmp_path / "teacher_samples.npz") as archive:
        arrays = dict(archive)
    arrays["made"] = np.array(str(arrays["made"]).replace('"weights": "', '"weights": "0'))
    np.savez(tmp_path / "teacher_samples.npz", **arrays)
    del made[:]
    evaluate(config, other)
    assert len(made) == 3


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", "nan"])
def test_damage_is_named(tmp_path, content):
    path = tmp_path / "teacher_samples.npz"
    if content == "nan":
        np.savez(path, made="{}", samples=np.full(3, np.nan), seconds=1.0)
    else:
        path.write_bytes(content)
    with pytest.raises(KeptFileError, match=r"teacher_samples\.npz is damaged .*; delete it"):
        read_kept(path, _read_samples)
