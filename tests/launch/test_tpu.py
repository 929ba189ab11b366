"""`launch/tpu.sh`: its dry runs, and whole runs against a fake gcloud."""

import shlex
import signal
import subprocess
import sys

import pytest

from tests.launch.fakes import (
    JOB,
    TPU,
    behave,
    calls,
    environment,
    launch,
    printed,
    processes,
    starts,
    until,
)


def remote(command):
    """The words of the program in the command that starts it on a worker."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars=";")
    lexer.whitespace_split = True
    words = list(lexer)
    at = words.index("piflow_jax.main")
    return words[at - 2 : words.index(";", at)]


def test_tpu_dry_run():
    options = ["--spot", "--project=p", "--delete", "--create-flag=--network=my net"]
    options += ["--setup=mount it", "--env=FLAGS=--a=1 --b", "--env=B=", "--dry-run"]
    done = launch("tpu.sh", "run", "pod", *TPU, *options, "--", *JOB)
    lines = printed(done.stdout)
    vm = ["gcloud", "compute", "tpus", "tpu-vm"]
    place = ["--zone=us-east5-a", "--project=p"]
    describe = [*vm, "describe", "pod", *place, "--format=value(state)"]
    assert lines[0][:2] == ["git", "-C"]
    assert lines[1] == describe
    assert lines[2] == [*vm, "create", "pod", *place, "--accelerator-type=v5litepod-16",
                        "--version=v2-alpha-tpuv5-lite", "--spot", "--network=my net"]  # fmt: skip
    assert lines[4][3:5] == ["tpu-vm", "scp"]
    assert lines[4][6] == "pod:piflow_code.tar.gz"
    assert lines[5][:-1] == [*vm, "ssh", "pod", *place, "--quiet", "--worker=all"]
    assert lines[5][-1].endswith(" -e '.[tpu]'; mount it")
    assert lines[6][:-1] == lines[5][:-1]
    assert "nohup env 'FLAGS=--a=1 --b' B= bash launch/worker.sh run" in lines[6][-1]
    assert remote(lines[6][-1]) == [
        "$HOME/piflow_env/bin/python", "-m", "piflow_jax.main", *JOB,
    ]  # fmt: skip
    assert lines[8] == describe
    assert lines[-1] == lines[-2] == [*vm, "delete", "pod", *place, "--quiet"]


def test_tpu_dry_run_queued():
    done = launch("tpu.sh", "run", "pod", *TPU, "--queued", "--dry-run", "--", *JOB)
    lines = printed(done.stdout)
    queue = ["gcloud", "compute", "tpus", "queued-resources"]
    assert [*queue, "describe", "pod", TPU[0], "--format=value(state.state)"] in lines
    assert [*queue, "create", "pod", TPU[0], "--node-id=pod", "--accelerator-type=v5litepod-16",
            "--runtime-version=v2-alpha-tpuv5-lite"] in lines  # fmt: skip
    assert [*queue, "delete", "pod", TPU[0], "--force", "--quiet"] in lines


@pytest.mark.parametrize(
    ("key", "extras"),
    [
        ("--workdir=gs://b/run", "gcs"),
        ("--config.data.data_dir=gs://b/set", "gcs"),
        ("--config.evaluation.loras=('gs://b/a.safetensors',)", "gcs"),
        ("--config.teacher.weights=gs://b/ema.pth", "gcs,torch"),
        ("--config.teacher.weights=/mnt/ema.pth@0.5", "torch"),
        ("--config.teacher.weights=hf:owner/name", "hub"),
        ("--config.model.flux.base_dtype=int8", "qwix"),
        ("--config.data.text_encoder=hf:owner/name", "hub,text"),
    ],
)
def test_tpu_workers_get_what_reads_the_files_of_the_run(key, extras):
    done = launch("tpu.sh", "run", "pod", *TPU, "--dry-run", "--", *JOB, key)
    assert printed(done.stdout)[5][-1].endswith(f" -e '.[tpu,{extras}]'")


@pytest.mark.parametrize(
    ("action", "verbs"),
    [("status", ["describe", "ssh"]), ("logs", ["ssh"]), ("stop", ["ssh"]), ("delete", ["delete"])],
)
def test_tpu_other_actions(action, verbs):
    done = launch("tpu.sh", action, "pod", "--zone=z", "--worker=3", "--dry-run")
    assert [line[4] for line in printed(done.stdout)] == verbs
    if action == "logs":
        assert "--worker=3" in printed(done.stdout)[0]


def tpu(fake, *options, job=JOB):
    return launch("tpu.sh", "run", "pod", *TPU, *options, "--", *job, fake=fake)


def test_tpu_runs_to_the_end(fake):
    behave(fake, "finish")
    done = tpu(fake)
    assert done.returncode == 0, done.stderr
    assert starts(fake) == {(w, "0"): ["-m", "piflow_jax.main", *JOB] for w in "01"}
    assert calls(fake, "create", "delete") == [("tpu-vm", "create")]
    # The worker's copy is the committed code.
    assert (fake / "worker1/piflow_code/setup.py").exists()
    assert set((fake / "slept").read_text().split()) == {"30"}
    assert not processes(fake)


def test_tpu_deletes_when_asked(fake):
    behave(fake, "finish")
    assert tpu(fake, "--delete").returncode == 0
    assert calls(fake, "create", "delete") == [("tpu-vm", "create"), ("tpu-vm", "delete")]


def test_tpu_restarts_after_a_preemption(fake):
    behave(fake, "preempt", "finish")
    done = tpu(fake)
    assert done.returncode == 0, done.stderr
    assert calls(fake, "create", "delete") == [
        ("tpu-vm", "create"),
        ("tpu-vm", "delete"),
        ("tpu-vm", "create"),
    ]
    assert starts(fake).keys() == {(w, a) for w in "01" for a in "01"}
    assert len({tuple(words) for words in starts(fake).values()}) == 1
    assert not processes(fake)


def test_tpu_takes_a_crash_before_a_preemption_for_one(fake):
    behave(fake, "fail", "finish")
    (fake / "late").touch()  # the TPU's state changes just after the workers' failure was seen
    done = tpu(fake)
    assert done.returncode == 0, done.stderr
    assert "preempted; restart 1" in done.stderr


def test_tpu_restarts_queued_resources(fake):
    behave(fake, "preempt", "finish")
    done = tpu(fake, "--queued")
    assert done.returncode == 0, done.stderr
    assert [group for group, _ in calls(fake, "create", "delete")] == ["queued-resources"] * 3


def test_tpu_gives_up_on_a_failed_request(fake):
    behave(fake, "finish")
    (fake / "grant").write_text("FAILED")
    done = tpu(fake, "--queued")
    assert done.returncode == 1
    assert "the queued resource pod failed" in done.stderr
    assert not starts(fake)


def test_tpu_restarts_on_the_same_machine(fake):
    """SIGTERM without a pre-emption: stopped is not finished."""
    behave(fake, "stop", "finish")
    done = tpu(fake)
    assert done.returncode == 0, done.stderr
    assert calls(fake, "create", "delete") == [("tpu-vm", "create")]
    assert len(starts(fake)) == 4


@pytest.mark.parametrize("behaviour", ["fail", "worker1:fail"])
def test_tpu_does_not_restart_a_failure(fake, behaviour):
    behave(fake, behaviour)
    done = tpu(fake)
    assert done.returncode == 1
    assert "the program failed on pod" in done.stderr
    assert starts(fake).keys() == {("0", "0"), ("1", "0")}
    assert calls(fake, "create", "delete") == [("tpu-vm", "create")]


def test_tpu_restarts_are_bounded(fake):
    behave(fake, "preempt")
    done = tpu(fake, "--max-restarts=2")
    assert done.returncode == 1
    assert "not restarted after 2 restarts" in done.stderr
    assert len(starts(fake)) == 6


def test_tpu_vanished_programs_are_bounded(fake):
    behave(fake, "vanish")
    done = tpu(fake)
    assert done.returncode == 1
    assert "vanished 4 times" in done.stderr
    assert len(starts(fake)) == 8


def test_tpu_capacity(fake):
    """Lacking at first, it is an error; lacking after a pre-emption, it is waited for."""
    behave(fake, "preempt", "finish")
    (fake / "capacity").write_text("0")
    done = tpu(fake)
    assert done.returncode == 1
    assert "cannot create pod" in done.stderr
    (fake / "capacity").write_text("1")
    done = tpu(fake, "--max-restarts=4")
    assert done.returncode == 1
    assert "not restarted after 4 restarts" in done.stderr
    assert calls(fake, "create").count(("tpu-vm", "create")) == 1 + 1 + 4


def test_tpu_a_deletion_that_fails_is_tried_again(fake):
    behave(fake, "preempt", "finish")
    (fake / "refuse.delete").write_text("2")
    done = tpu(fake)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("cannot delete pod") == 2
    assert [verb for _, verb in calls(fake, "create", "delete")] == [
        "create",
        *["delete"] * 3,
        "create",
    ]
    assert starts(fake).keys() == {(w, a) for w in "01" for a in "01"}


def test_tpu_deletions_that_fail_are_bounded(fake):
    """By the restarts, of which the pre-emption was the first."""
    behave(fake, "preempt")
    (fake / "refuse.delete").write_text("99")
    done = tpu(fake, "--max-restarts=3")
    assert done.returncode == 1
    assert "not restarted after 3 restarts" in done.stderr
    assert len(calls(fake, "delete")) == 3


@pytest.mark.parametrize(("refused", "code"), [(1, 0), (99, 1)])
def test_tpu_that_is_not_deleted_at_the_end_is_said_to_cost(fake, refused, code):
    behave(fake, "finish")
    (fake / "refuse.delete").write_text(str(refused))
    done = tpu(fake, "--delete")
    assert done.returncode == code, done.stderr
    assert len(calls(fake, "delete")) == (5 if code else 2)
    assert ("pod cannot be deleted and is paid for" in done.stderr) == bool(code)


@pytest.mark.parametrize(("refused", "code"), [(1, 0), (99, 1)])
def test_tpu_a_stopped_one_is_started(fake, refused, code):
    behave(fake, "finish")
    (fake / "vm").write_text("STOPPED")
    (fake / "refuse.start").write_text(str(refused))
    done = tpu(fake, "--max-restarts=2")
    assert done.returncode == code, done.stderr
    assert len(calls(fake, "start")) == (3 if code else 2)
    assert ("not restarted after 2 restarts" in done.stderr) == bool(code)
    assert not calls(fake, "create")


# Tests in the background ignore interrupts, and what they start would too.
INTERRUPTED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execvp(sys.argv[1], sys.argv[1:])
"""


def running(fake):
    """The script with a job, in the background."""
    words = [sys.executable, "-c", INTERRUPTED, "bash", str(fake / "checkout/launch/tpu.sh")]
    words += ["run", "pod", *TPU, "--", *JOB]
    streams = {"stdin": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, env=environment(fake), **streams)


def started_and_left(fake):
    """The same, until the program runs on both workers."""
    with running(fake) as first:
        until(lambda: len(starts(fake)) == 2)
        # Bash forgets an interrupt that it alone got while a program ran in its foreground.
        until(lambda: first.send_signal(signal.SIGINT) or first.poll() is not None)
        assert first.returncode == 130


def test_tpu_keeps_the_code_of_a_program_whose_worker_could_not_be_asked(fake):
    behave(fake, "wait", "finish")
    started_and_left(fake)
    mark = fake / "worker1/piflow_code/mark"
    mark.touch()
    asked = len(calls(fake, "ssh"))
    (fake / "refuse.ssh").write_text("1")
    with running(fake) as again:
        until(lambda: len(calls(fake, "ssh")) >= asked + 4)  # state, installation, start, log
        assert launch("tpu.sh", "stop", "pod", "--zone=z", fake=fake).returncode == 0
        assert again.wait(90) == 0
    assert mark.exists() and len(starts(fake)) == 2
    until(lambda: not processes(fake))


def test_tpu_is_watched_again_and_stopped(fake):
    behave(fake, "wait", "finish")
    started_and_left(fake)
    with running(fake) as again:
        lines = []
        while "running already" not in "".join(lines):
            lines.append(again.stderr.readline())
            assert lines[-1], lines
        status = launch("tpu.sh", "status", "pod", "--zone=z", fake=fake)
        assert status.stdout.split("\n")[:3] == ["READY", "worker: running", "worker: running"]
        assert launch("tpu.sh", "stop", "pod", "--zone=z", fake=fake).returncode == 0
        assert again.wait(90) == 0
        assert "stopped on request" in again.stderr.read()
    assert len(starts(fake)) == 2
    assert "saved" in (fake / "worker0/piflow_run/log").read_text()
    until(lambda: not processes(fake))
