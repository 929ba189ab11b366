"""`launch/gpu.sh`: its dry runs, and whole runs against a fake Slurm."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.fakes import JOB, behave, environment, install, launch, recorded, starts


def submit(fake, *options):
    done = launch("gpu.sh", f"--logs={fake / 'my logs'}", *options, "--", *JOB, fake=fake)
    assert done.returncode == 0, done.stderr
    assert "job 7;" in done.stderr
    (words,) = recorded(fake, "sbatch")
    return words


def slurm(fake, restarts=0):
    """Runs the batch script as Slurm does; returns its status and output."""
    variables = {"SLURM_JOB_ID": "7"} | ({"SLURM_RESTART_COUNT": str(restarts)} if restarts else {})
    done = subprocess.run(
        ["bash", str(fake / "batch")],
        env=environment(fake) | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout


def test_gpu_dry_run_is_what_is_submitted(fake):
    options = ["--nodes=2", "--gpus-per-node=4", "--cpus-per-task=12", "--time=1-0", "--qos=q",
               "--grace=60", "--job-name=job", "--sbatch-flag=--comment=a b"]  # fmt: skip
    words = submit(fake, *options)
    logs = fake / "my logs"
    assert words == [
        "--parsable", "--job-name=job", "--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4",
        "--signal=TERM@60", "--requeue", "--open-mode=append", f"--output={logs}/%x-%j.log",
        "--time=1-0", "--qos=q", "--comment=a b", "--cpus-per-task=12",
    ]  # fmt: skip
    dry = launch("gpu.sh", f"--logs={logs}", *options, "--dry-run", "--", *JOB, fake=fake).stdout
    mkdir, sbatch, script = dry.split("\n", 2)
    assert shlex.split(mkdir) == ["mkdir", "-p", str(logs)]
    assert shlex.split(sbatch) == ["sbatch", *words, "<<END_OF_BATCH_SCRIPT"]
    assert script == (fake / "batch").read_text() + "END_OF_BATCH_SCRIPT\n"
    (line,) = re.findall(r"^srun .*", script, flags=re.M)
    assert shlex.split(line)[:12] == [
        "srun", "--kill-on-bad-exit=1", "--label", "--cpus-per-task=12", "bash", "launch/worker.sh",
        "run", "--dir=$status", "python", "-m", "piflow_jax.main", JOB[0],
    ]  # fmt: skip
    assert shlex.split(line)[11:15] == JOB


def test_gpu_batch_script_passes_shellcheck(fake):
    submit(fake)
    checker = Path(sys.executable).parent / "shellcheck"
    checker = checker if checker.exists() else shutil.which("shellcheck")
    done = subprocess.run(
        [checker, "--exclude=SC2016", fake / "batch"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_gpu_finishes(fake):
    submit(fake, "--setup=export SET_UP=1")
    behave(fake, "finish")
    code, output = slurm(fake)
    assert code == 0 and "launch: finished" in output
    assert starts(fake) == {(w, "0"): ["-m", "piflow_jax.main", *JOB] for w in "01"}
    assert not recorded(fake, "scontrol")


def test_gpu_goes_back_into_the_queue(fake):
    submit(fake)
    behave(fake, "stop", "finish")
    assert slurm(fake)[0] == 0
    assert recorded(fake, "scontrol") == [["requeue", "7"]]
    code, output = slurm(fake, restarts=1)
    assert code == 0 and "launch: finished" in output
    assert len(recorded(fake, "scontrol")) == 1
    assert starts(fake).keys() == {(w, a) for w in "01" for a in "01"}


def test_gpu_does_not_restart_a_failure(fake):
    submit(fake)
    behave(fake, "worker1:fail")
    (fake / "bin/srun").write_text(  # as --kill-on-bad-exit does
        (fake / "bin/srun").read_text().replace(
            "sys.exit(", "import time\nwhile ranks[1].poll() is None: time.sleep(.05)\n"
            "ranks[0].terminate()\nsys.exit("
        )
    )  # fmt: skip
    code, output = slurm(fake)
    assert code == 1 and "not restarted" in output
    assert not recorded(fake, "scontrol")


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING", ""])
def test_gpu_leaves_a_cancelled_job_alone(fake, state):
    submit(fake)
    behave(fake, "stop")
    (fake / "slurm").write_text(state)
    assert slurm(fake)[0] == 0
    assert not recorded(fake, "scontrol")


def test_gpu_restarts_are_bounded(fake):
    submit(fake, "--max-restarts=2")
    behave(fake, "stop")
    assert slurm(fake, restarts=1)[0] == 0
    assert len(recorded(fake, "scontrol")) == 1
    code, output = slurm(fake, restarts=2)
    assert code == 1 and "not restarted after 2 restarts" in output
    assert len(recorded(fake, "scontrol")) == 1


def test_gpu_needs_the_processes_statuses(fake):
    submit(fake)
    install(fake / "bin/srun", "#!/bin/sh\nexit 0\n")
    code, output = slurm(fake)
    assert code == 1 and "no process left its status" in output
