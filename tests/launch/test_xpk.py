"""`launch/xpk.sh`: its dry runs, and whole runs against a fake xpk."""

import os
import shlex
import signal
import subprocess
from pathlib import Path

import pytest

from tests.launch.fakes import (
    JOB,
    XPK,
    behave,
    environment,
    launch,
    printed,
    processes,
    recorded,
    until,
)


def test_xpk_submits_the_committed_code(fake):
    (fake / "checkout/scratch").touch()
    done = launch("xpk.sh", "run", "pod", *XPK, "--num-slices=2", "--zone=z", "--max-restarts=5",
                  "--xpk-flag=--storage=my disk", "--", *JOB, fake=fake)  # fmt: skip
    assert done.returncode == 0, done.stderr
    (words,) = recorded(fake, "xpk")
    assert words[:8] == [
        "workload", "create", "--workload=pod", "--cluster=c", "--tpu-type=v5litepod-16",
        "--num-slices=2", "--max-restarts=5", "--termination-grace-period-seconds=180",
    ]  # fmt: skip
    assert words[8:10] == ["--zone=z", "--base-docker-image=python:3.12"]
    stage = words[10].removeprefix("--script-dir=")
    assert not Path(stage).exists(), "the staged code is removed"
    assert (fake / "image/launch/worker.sh").exists()
    assert not (fake / "image/scratch").exists()
    assert "warning: changes that are not committed" in done.stderr
    command = words[11].removeprefix("--command=")
    start = [
        "pip",
        "install",
        "-q",
        "-e",
        ".[tpu]",
        "&&",
        "exec",
        "bash",
        "launch/worker.sh",
        "run",
    ]
    assert shlex.split(command) == [*start, "python", "-m", "piflow_jax.main", *JOB]
    assert words[12:] == ["--storage=my disk"]


def test_xpk_dry_run_and_a_ready_image():
    done = launch("xpk.sh", "run", "pod", *XPK, "--image=gcr.io/p/i", "--dry-run", "--", *JOB)
    (words,) = printed(done.stdout)
    assert words[:5] == ["xpk", "workload", "create", "--workload=pod", "--cluster=c"]
    assert "--docker-image=gcr.io/p/i" in words
    assert shlex.split(words[-1].removeprefix("--command="))[-4:] == JOB
    done = launch("xpk.sh", "run", "pod", *XPK, "--dry-run", "--", *JOB)
    assert [words[0] for words in printed(done.stdout)] == ["mkdir", "git", "tar", "xpk"]
    done = launch("xpk.sh", "run", "pod", *XPK, "--dry-run", "--", JOB[0], "--workdir=gs://b/run")
    assert "pip install -q -e '.[tpu,gcs]'" in printed(done.stdout)[-1][-1]


@pytest.mark.parametrize(
    ("action", "start"),
    [
        ("status", "xpk workload list --cluster=c --filter-by-job=pod"),
        ("delete", "xpk workload delete --workload=pod --cluster=c --force"),
        (
            "logs",
            "kubectl logs --follow --all-containers --selector=jobset.sigs.k8s.io/jobset-name=pod",
        ),
    ],
)
def test_xpk_other_actions(action, start):
    done = launch("xpk.sh", action, "pod", "--cluster=c", "--dry-run")
    assert done.returncode == 0 and done.stdout.startswith(start)


def test_xpk_container_status_decides_about_the_restart(fake):
    """xpk restarts on 42 and 127 to 255, so a stop must be 143 and an error stay what it is."""
    assert launch("xpk.sh", "run", "pod", *XPK, "--", *JOB, fake=fake).returncode == 0
    command = recorded(fake, "xpk")[0][-1].removeprefix("--command=")
    behave(fake, "finish", "fail", "wait")
    # As in the container: SIGTERM goes to the subshell only.
    shell = f"({command}) & child=$!; echo $child >$FAKE/child; wait $child"
    container = {"cwd": fake / "image", "env": environment(fake) | {"HOME": "/worker0"}}
    assert subprocess.run(["bash", "-c", shell], **container).returncode == 0
    assert subprocess.run(["bash", "-c", shell], **container).returncode == 1
    with subprocess.Popen(["bash", "-c", shell], **container) as pod:
        until((fake / "start.0.2").exists)
        os.kill(int((fake / "child").read_text()), signal.SIGTERM)
        assert pod.wait(30) == 143
    assert not processes(fake)
