"""Whole runs in a bucket: killed, delayed, refused, and with the bits of those on a disk."""

import json
import signal
import subprocess
import sys
import threading

import pytest

from piflow_jax.runs.workdir import user_path
from tests import tiny
from tests.buckets import names

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
