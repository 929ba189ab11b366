"""All launch scripts: their arguments and dry runs, and `worker.sh`."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch.fakes import (
    JOB,
    LAUNCH,
    ROOT,
    SCRIPTS,
    SLOW_TO_LEAVE,
    TPU,
    XPK,
    behave,
    environment,
    install,
    launch,
    processes,
    until,
)


def test_shellcheck():
    checker = Path(sys.executable).parent / "shellcheck"
    checker = checker if checker.exists() else shutil.which("shellcheck")
    assert checker, "pip install -e '.[test]' brings shellcheck"
    files = sorted(map(str, LAUNCH.glob("*.sh")))
    assert len(files) == 5
    done = subprocess.run([checker, *files], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_strict_and_executable(script):
    path = LAUNCH / script
    assert os.access(path, os.X_OK)
    assert "\nset -euo pipefail\n" in path.read_text()


@pytest.mark.parametrize("script", [*SCRIPTS, "worker.sh"])
def test_help(script):
    done = launch(script, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: ")
    assert not done.stderr


BAD_FOR_ALL = [
    (["--nonsense", "--", *JOB], "unknown argument '--nonsense'"),
    ([], "no arguments of the run"),
    (["--"], "no --config"),
    (["--", JOB[0]], "no --workdir"),
    (["--", JOB[1]], "no --config"),
    (["--", "--config=", JOB[1]], "no --config"),
    (["--", *JOB, "stray"], "'stray' is no argument"),
    (["--", *JOB, "--config.a=1\n2"], "line break"),
    (["--max-restarts=many", "--", *JOB], "--max-restarts must be a whole number, got 'many'"),
]
BAD = [
    *(
        (script, [*start, *bad], why)
        for script, start in SCRIPTS.items()
        for bad, why in BAD_FOR_ALL
    ),
    ("tpu.sh", [], "the first argument must be"),
    ("tpu.sh", ["fly", "pod"], "not 'fly'"),
    ("tpu.sh", ["run", *TPU, "--", *JOB], "no name"),
    ("tpu.sh", ["run", "a", "b", *TPU, "--", *JOB], "two names, 'a' and 'b'"),
    ("tpu.sh", ["run", "Pod", *TPU, "--", *JOB], "the name must be lower-case"),
    ("tpu.sh", ["run", "pod", *TPU[1:], "--", *JOB], "no --zone"),
    ("tpu.sh", ["run", "pod", *TPU[::2], "--", *JOB], "no --type"),
    ("tpu.sh", ["run", "pod", *TPU[:2], "--", *JOB], "no --version"),
    ("tpu.sh", ["run", "pod", *TPU, "--", JOB[0], "--workdir=runs/a"], "must be absolute"),
    ("tpu.sh", ["run", "pod", *TPU, "--poll=0", "--", *JOB], "--poll must be at least 1"),
    (
        "tpu.sh",
        ["run", "pod", *TPU, "--env=1A=b", "--", *JOB],
        "--env must be NAME=VALUE, got '1A=b'",
    ),
    ("tpu.sh", ["delete", "pod"], "no --zone"),
    ("tpu.sh", ["stop", "pod", "--zone=z", "--", *JOB], "stop takes no arguments of a run"),
    ("gpu.sh", ["--nodes=0", "--", *JOB], "must be at least 1"),
    ("gpu.sh", ["--gpus-per-node=", "--", *JOB], "--gpus-per-node must be a whole number"),
    ("gpu.sh", ["--job-name=a b", "--", *JOB], "--job-name may have"),
    ("xpk.sh", [], "the first argument must be"),
    ("xpk.sh", ["run", "pod", XPK[1], "--", *JOB], "no --cluster"),
    ("xpk.sh", ["run", "pod", XPK[0], "--", *JOB], "no --tpu-type"),
    (
        "xpk.sh",
        ["run", "pod", *XPK, "--image=a", "--base-image=b", "--", *JOB],
        "exclude each other",
    ),
    ("xpk.sh", ["run", "pod", *XPK, "--", *JOB, "--config.a=$(HOME)"], "Kubernetes would change"),
    ("xpk.sh", ["logs", "pod", "--cluster=c", "--", *JOB], "logs takes no arguments of a run"),
    ("worker.sh", ["run"], "no command"),
    ("worker.sh", ["state"], "no --dir"),
    ("worker.sh", ["fly"], "not 'fly'"),
]


@pytest.mark.parametrize(("script", "arguments", "why"), BAD)
def test_bad_arguments(script, arguments, why):
    done = launch(script, *arguments)
    assert done.returncode == 2
    assert not done.stdout
    first, usage = done.stderr.split("\n", 1)
    assert first.startswith(f"{script}: ") or "line break" in why
    assert why in done.stderr
    assert "usage: " in usage


@pytest.mark.parametrize("script", SCRIPTS)
def test_dry_run_runs_nothing(script, fake):
    done = launch(script, *SCRIPTS[script], "--dry-run", "--", *JOB, fake=fake)
    assert done.returncode == 0
    assert not done.stderr
    assert not (fake / "calls").exists() and not list(fake.glob("*.0"))


# --- worker.sh


def test_worker_says_how_it_ended(fake):
    def worker(behaviour, *options):
        behave(fake, behaviour)
        (fake / "attempt.0").unlink(missing_ok=True)
        words = ["bash", str(LAUNCH / "worker.sh"), "run", *options, str(fake / "bin/python")]
        home = environment(fake) | {"HOME": "/worker0"}
        return subprocess.run(words, env=home, capture_output=True, timeout=60).returncode

    assert worker("finish") == 0
    assert worker("stop") == 143
    assert worker("fail") == 1
    notes = fake / "notes"
    for behaviour, status, line in [
        ("finish", 0, "finished"),
        ("stop", 0, "stopped"),
        ("fail", 1, "failed 1"),
    ]:
        assert worker(behaviour, f"--dir={notes}") == status
        assert (notes / "0").read_text() == f"{line}\n"
        assert launch("worker.sh", "state", f"--dir={notes}").stdout == f"worker: {line}\n"


def test_a_worker_that_ends_while_it_is_looked_at_is_not_lost(fake):
    notes = fake / "notes"
    notes.mkdir()
    (notes / "0.pid").write_text("1\n")
    install(fake / "bin/ps", '#!/usr/bin/env bash\necho stopped >"$FAKE/notes/0"\n')
    assert launch("worker.sh", "state", f"--dir={notes}", fake=fake).stdout == "worker: stopped\n"


def test_a_second_sigterm_does_not_end_the_wait(fake):
    """Clusters signal the supervisor and the program; neither may leave the other behind."""
    program = fake / "slow"
    install(program, SLOW_TO_LEAVE)
    words = ["bash", str(LAUNCH / "worker.sh"), "run", str(program), str(fake / "up")]
    with subprocess.Popen(words, env=environment(fake)) as worker:
        until((fake / "up").exists)
        worker.terminate()
        time.sleep(0.2)
        worker.terminate()
        assert worker.wait(30) == 143
    assert not processes(fake)
