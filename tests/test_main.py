"""The command as a user types it: the whole job at toy size, its errors, a kill in the middle."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import piflow_jax
import piflow_jax.runs.checkpoint as checkpoint
from piflow_jax.origin import commit

ROOT = Path(__file__).parents[1]
CONFIG = Path(__file__).parent / "tiny.py"


def command(workdir, *arguments):
    return [
        sys.executable,
        "-m",
        "piflow_jax.main",
        f"--config={CONFIG}",
        f"--workdir={workdir}",
        *arguments,
    ]


def run(workdir, *arguments, check=True, path=""):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{path}{ROOT}"}
    done = subprocess.run(
        command(workdir, *arguments),
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def final_params(workdir):
    """All arrays of the student's last checkpoint, by name."""
    meta = checkpoint.ocp  # Orbax, through our module: read without a template
    directory = Path(workdir) / "student" / "checkpoints"
    step = max(int(p.name) for p in directory.iterdir() if p.name.isdigit())
    with meta.Checkpointer(meta.PyTreeCheckpointHandler()) as reader:
        tree = reader.restore(directory / str(step) / "state")
    return step, tree


def assert_same(a, b):
    """The same arrays, bit by bit, in the same places."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        np.testing.assert_array_equal(a, b)


# Enough steps for a kill at any of many of them.
STEPS = 60
OFTEN = (f"--config.train.steps={STEPS}", "--config.checkpoint_every=3", "--config.log_every=1")


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    # Digits need neither: what imports one ends the process.
    trap = tmp_path_factory.mktemp("trap")
    for name in ("tensorflow", "tensorflow_datasets"):
        (trap / f"{name}.py").write_text("import os\nos._exit(99)\n")
    cache = f"--config.compilation_cache={workdir / 'compiled'}"
    return workdir, run(workdir, *OFTEN, cache, path=f"{trap}{os.pathsep}")


def test_job_writes_report_picture_and_metrics(whole_run):
    workdir, done = whole_run
    report = json.loads((workdir / "report.json").read_text())
    systems = [(row["system"], row["nfe"]) for row in report["rows"]]
    assert systems == [("teacher", 1), ("teacher", 2), ("student", 1)]
    assert report["protocol"]["features_sha256"] and report["protocol"]["samples"] == 20
    assert report["rows"][-1]["endpoint_mse"] > 0
    assert report["protocol"]["steps"] == {"teacher": 6, "student": STEPS}
    assert report["protocol"]["version"] == piflow_jax.__version__
    assert report["protocol"]["commit"] == commit()
    assert Image.open(workdir / "samples.png").size[0] > 480
    assert Image.open(workdir / "nearest.png").size[0] > 480
    assert "Are they copies?" in (workdir / "report.html").read_text()
    assert "Loss of the student" in (workdir / "report.html").read_text()
    for stage, steps in (("teacher", 6), ("student", STEPS)):
        lines = [json.loads(x) for x in (workdir / stage / "metrics.jsonl").open()]
        assert [line["step"] for line in lines] == list(range(1, steps + 1))
        expected = {"loss", "grad_norm", "step_seconds", "examples_per_second", "flops_per_second"}
        assert expected <= set(lines[-1])
        assert list((workdir / stage).glob("events.out.tfevents.*"))
    assert "| student " in done.stderr and "half against half" in done.stderr


def test_programs_are_kept_for_a_restart(whole_run):
    # JAX keeps those that took it a second or more.
    names = [path.name for path in (whole_run[0] / "compiled").iterdir()]
    assert any(name.startswith("jit_step") for name in names), names


def test_console_is_for_people(whole_run):
    _, done = whole_run
    for noise in ("Traceback", "Warning", "WARNING", "oneDNN", "orbax", "backend", "E0000"):
        assert noise not in done.stderr, done.stderr
    assert re.search(rf"student +{STEPS}/{STEPS} +loss \d.*ms/step", done.stderr)


def test_console_says_what_is_done_and_what_comes_next(whole_run):
    workdir, done = whole_run
    lines = iter(done.stderr.splitlines())
    for expected in (
        rf"piflow_jax {re.escape(piflow_jax.__version__)}.*, jax .*, 1 device \(cpu\)",
        rf"work directory: {workdir} \(no checkpoint yet\)",
        r"parameters of the dit: teacher 10,100, student 10,449",
        rf"makes: teacher \(6 steps\), student \({STEPS} steps\), figures and samples",
        r"teacher: 6 steps; compiling",
        r"teacher  step compiled in",
        r"teacher  checkpoint of step 3",
        rf"student: {STEPS} steps; compiling",
        rf"student  checkpoint of step {STEPS}",
        r"evaluation: 3 systems, 20 samples each",
        r"teacher, 2 NFE: compiling",
        r"student, 1 NFE: compiling",
        rf"next: look at {workdir}/.*piflow_jax\.load\('{workdir}'\)",
    ):
        assert any(re.match(expected, line) for line in lines), (expected, done.stderr)


@pytest.fixture
def here(command):
    """The same in this process: `(exit status, what it says)`."""
    return lambda workdir, *arguments: command(
        f"--config={CONFIG}", f"--workdir={workdir}", *arguments
    )


def test_sampling_again_needs_only_the_student(whole_run, here):
    workdir, _ = whole_run
    assert here(workdir, "--mode=sample", "--config.evaluation.grid_samples=3")[0] == 0
    assert (workdir / "student.png").exists()


def test_the_teacher_can_be_looked_at_as_well(whole_run, here):
    workdir, _ = whole_run
    options = ("--config.evaluation.grid_samples=3", "--config.evaluation.system=teacher")
    assert here(workdir, "--mode=sample", *options)[0] == 0
    assert (workdir / "teacher.png").exists()


def test_contradicting_settings_are_refused_before_anything_runs(whole_run, here):
    workdir, _ = whole_run
    status, said = here(workdir, "--mode=sample", "--config.policy.num_components=3")
    assert status == 1
    assert "config.policy.num_components: the checkpoint has 2, asked for 3" in said


def test_a_teacher_that_has_a_student_is_not_trained_further(whole_run, here, tmp_path):
    copy = shutil.copytree(whole_run[0], tmp_path / "copy")
    status, said = here(copy, *OFTEN, "--config.teacher.steps=12")
    assert status == 1
    assert f"the student in {copy / 'student'} was taught by the teacher at step 6" in said
    assert (copy / "teacher" / "checkpoints" / "6").exists()


def test_corrupt_checkpoint_is_not_taken_for_none(whole_run, tmp_path):
    workdir, _ = whole_run
    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    for data in (copy / "student" / "checkpoints" / str(STEPS) / "state" / "d").iterdir():
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    done = run(copy, check=False)
    assert done.returncode == 1
    # Orbax's readers may complain on their own threads; the last word is ours.
    error = done.stderr[done.stderr.rindex("error: ") :]
    assert str(copy / "student" / "checkpoints") in error and "--workdir" in error


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.train.nfe=0", "config.train.nfe must be at least 1, got 0"),
        ("--config.train.window_substeps=9", r"window_substeps must be in \[0, 8\]"),
        ("--config.train.stepz=3", "stepz"),
    ],
)
def test_bad_overrides_name_the_key(tmp_path, override, message, here):
    status, said = here(tmp_path, override)
    assert status != 0
    assert re.search(message, said)
    assert not list(tmp_path.iterdir())


def test_a_directory_that_cannot_be_made_is_named(tmp_path, here):
    (tmp_path / "file").touch()
    status, said = here(tmp_path / "file" / "run")
    assert status == 1
    assert re.search(f"error: cannot write to {tmp_path}/file .*--workdir", said)


def test_a_full_disk_ends_the_run_with_its_last_good_step(whole_run, tmp_path):
    """A limit on the size of files stands in for it: 20 kB hold the metrics, no checkpoint."""
    workdir, _ = whole_run
    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    (copy / "student" / "metrics.jsonl").unlink()  # longer than that already
    limited = ["bash", "-c", 'ulimit -f 20; trap "" XFSZ; exec "$@"', "-"]
    done = subprocess.run(
        [*limited, *command(copy, f"--config.train.steps={STEPS + 3}")],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    error = done.stderr[done.stderr.rindex("error: ") :]
    assert "cannot save" in error and "free space" in error, done.stderr
    # Nothing that was there is lost, and a run goes on from it as from a kill.
    assert_same(final_params(copy), final_params(workdir))


def test_killed_run_ends_bit_identical(whole_run, tmp_path):
    """SIGKILL at a random moment of the student's training, then the same command again."""
    reference, killed = whole_run[0], tmp_path / "killed"
    more = (*OFTEN, f"--config.teacher.checkpoint={reference / 'teacher' / 'checkpoints'}")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command(killed, *more), cwd=ROOT, env=environment, stderr=subprocess.DEVNULL
    )
    metrics = killed / "student" / "metrics.jsonl"
    target = np.random.default_rng().integers(4, 30)  # truly random: any step must do
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and metrics.read_text().count("\n") >= target:
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it was killed"
    assert not (killed / "report.json").exists()
    run(killed, *more)
    assert final_params(killed)[0] == STEPS
    assert_same(final_params(killed), final_params(reference))
    steps = [json.loads(line)["step"] for line in metrics.open()]
    assert steps == list(range(1, STEPS + 1)), f"killed after about step {target}"
