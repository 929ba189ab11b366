"""Whole runs in a bucket, by one process and by two: killed, delayed, refused; the same bits."""

import json
import signal
import subprocess
import sys
import threading

import pytest

from piflow_jax.runs.workdir import user_path
from piflow_jax.whole_files import copy_file
from tests import buckets, tiny
from tests.buckets import names
from tests.compiled import on_devices
from tests.parallel.launched import CONFIG, by_hand, finish, started

pytestmark = pytest.mark.slow

RUN = "gs://bucket/run"
KEPT = ("step", "stage", "loss", "grad_norm")


def command(workdir, *words):
    words = ("piflow_jax.main", f"--config={tiny.__file__}", f"--workdir={workdir}", *words)
    return subprocess.Popen([sys.executable, "-m", *words], stderr=subprocess.PIPE, text=True)


def finished(process):
    said = process.communicate(timeout=900)[1]
    assert process.returncode == 0, said
    return said


def figures(workdir, stage):
    """Lines of metrics without what depends on the clock, and fingerprints of the last step."""
    lines = (user_path(workdir) / stage / "metrics.jsonl").read_text().splitlines()
    lines = [{k: v for k, v in json.loads(line).items() if k in KEPT} for line in lines]
    step = user_path(workdir) / stage / "checkpoints" / "6"
    return lines, json.loads((step / "meta" / "metadata").read_text())["meta"]["leaves"]


def assert_same(workdir, other, *stages):
    for stage in stages or ("teacher", "student"):
        assert figures(workdir, stage) == figures(other, stage)
    assert {"report.json", "samples.png"} < set(names(workdir))


def kill_at(service, name, running):
    """Kills a process when it is about to write an object, which is not written."""

    def kill(written):
        if written == f"run/{name}" and running and running[-1].poll() is None:
            running[-1].send_signal(signal.SIGKILL)
            return True
        return False

    service.written = kill


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("disk")
    finished(command(workdir))
    return workdir


def test_a_run_killed_in_the_middle_of_saves_goes_on_to_the_same_bits(service, disk):
    service.refuse_every = 10
    for last in (
        "teacher/checkpoints/6/commit_success.txt",
        "teacher/checkpoints.json",  # between the stages
        "student/checkpoints/4/state/_METADATA",
    ):
        running = []
        kill_at(service, last, running)
        running.append(run := command(RUN))
        run.communicate(timeout=900)
        assert run.returncode == -signal.SIGKILL
        service.written = lambda name: False
    cache = "--config.compilation_cache=gs://bucket/cache"
    said = finished(command(RUN, cache))
    assert "student: continuing from" not in said and "teacher: already trained to step 6" in said
    assert_same(RUN, disk)
    assert names("gs://bucket/cache")
    for mode, made in (("sample", "student.png"), ("export", "student.safetensors")):
        for workdir in (disk, RUN):
            finished(command(workdir, f"--mode={mode}"))
        here, there = (user_path(workdir) / made for workdir in (disk, RUN))
        assert here.read_bytes() == there.read_bytes()


def test_answers_that_take_a_second_change_nothing(service, disk):
    service.delay = 1.0
    finished(command(RUN, f"--config.teacher.checkpoint={disk / 'teacher' / 'checkpoints'}"))
    service.delay = 0.0
    assert_same(RUN, disk, "student")


def test_two_runs_at_once_are_refused(service):
    held = threading.Event()
    service.written = lambda name: name == "run/run.lock" and bool(held.set())
    first = command(RUN)
    assert held.wait(100)
    while not names(RUN):
        assert first.poll() is None
    second = command(RUN)
    said = second.communicate(timeout=900)[1]
    assert second.returncode == 1
    assert f"error: {RUN} is in use by process {first.pid} on" in said
    finished(first)
    assert "run.lock" not in names(RUN)


def two(workdir, logs, *words, start=lambda running: None):
    """Two processes; returns their exit statuses, and what they said."""
    main = [sys.executable, "-m", "piflow_jax.main", f"--config={CONFIG}"]
    job = [*main, f"--workdir={workdir}", *words]
    with started(None, logs, 2, command=job, launcher=by_hand) as running:
        start(running)
        return finish(running, logs, timeout=900)


def copied(source, target):
    """A copy of all that lies in a directory, on a disk or in a bucket."""
    source, target = map(user_path, (source, target))
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        (copied if path.is_dir() else copy_file)(path, target / path.name)
    return target


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """What two processes left in a bucket, one of which was killed in the middle of a save."""
    service, folder = buckets.service(), tmp_path_factory.mktemp("killed")
    service.reset()
    service.refuse_every, both = 10, []
    kill_at(service, "student/checkpoints/6/state/ocdbt.process_1/manifest.ocdbt", both)
    soon = "--config.processes.heartbeat_seconds=5"  # a busy machine may answer later than that
    codes, said = two(RUN, folder / "logs", soon, start=lambda running: both.append(running[1]))
    assert codes[1] == -signal.SIGKILL and codes[0] == 1, "\n".join(said)
    assert "lost another one" in said[0]
    return copied(RUN, folder / "run")


def test_two_processes_end_what_two_and_one_of_two_devices_began(
    service, killed, tmp_path, monkeypatch
):
    """With the bits of two processes on a disk that nobody stopped."""
    copied(killed, RUN)
    service.refuse_every, running = 10, []
    kill_at(service, "student/checkpoints/6/commit_success.txt", running)
    with monkeypatch.context() as patch:
        patch.setenv("XLA_FLAGS", on_devices(2)["XLA_FLAGS"])
        running.append(run := command(RUN))
        said = run.communicate(timeout=900)[1]
    assert run.returncode == -signal.SIGKILL and "student: continuing from step 4" in said
    service.written = lambda name: False
    codes, said = two(RUN, tmp_path / "logs")
    assert codes == [0, 0], "\n".join(said)
    assert "student: continuing from step 4" in said[0]
    codes, said = two(tmp_path / "disk", tmp_path / "logs")
    assert codes == [0, 0], "\n".join(said)
    assert_same(RUN, tmp_path / "disk")


def test_one_process_ends_what_two_began_as_on_a_disk(service, killed, tmp_path):
    service.refuse_every = 10
    copied(killed, RUN)
    copied(killed, tmp_path)
    # On a disk what is unfinished has another name.
    (user_path(tmp_path) / "student" / "checkpoints" / "6").rmtree()
    for place in (tmp_path, RUN):
        assert "student: continuing from step 4" in finished(command(place))
    assert_same(RUN, tmp_path)
