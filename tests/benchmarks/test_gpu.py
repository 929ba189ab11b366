"""`benchmarks/gpu.sh`: its steps on a CPU, and what it does when one of them fails."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
FAKE = """#!/usr/bin/env bash
if [[ $1 == - ]]; then exec {python} -; fi
echo "$@" >> {log}
[[ "$*" != *benchmarks.rollout* ]] || exit 3
"""


def run(*arguments, path=None, **environment):
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    before = [path] if path else []
    environment["PATH"] = os.pathsep.join([*map(str, before), *_with_python()])
    return subprocess.run(
        ["bash", SCRIPT, *arguments], env=environment, capture_output=True, text=True, timeout=900
    )


def _with_python():
    return [str(Path(sys.executable).parent), os.environ["PATH"]]


def test_shellcheck():
    checker = Path(sys.executable).parent / "shellcheck"
    checker = checker if checker.exists() else shutil.which("shellcheck")
    subprocess.run([checker, SCRIPT], check=True, timeout=60)


def test_nothing_is_missing_here():
    done = run("--missing")
    assert (done.returncode, done.stdout.strip()) == (0, "")


def test_unknown_options_are_refused():
    done = run("--small")
    assert done.returncode == 2 and "unknown option --small" in done.stderr


@pytest.fixture
def fake(tmp_path):
    """A Python of which `benchmarks.rollout` fails, and what it was asked for."""
    log, programs = tmp_path / "log", tmp_path / "bin"
    programs.mkdir()
    (programs / "python3").write_text(FAKE.format(python=sys.executable, log=log))
    (programs / "python3").chmod(0o755)
    return programs, log


def test_a_step_that_fails_does_not_stop_the_next(fake, tmp_path):
    programs, log = fake
    out = tmp_path / "out"
    out.mkdir()
    done = run(path=programs, OUT=str(out))
    assert done.returncode == 1 and "failed: rollout (3)" in done.stderr
    asked = [line.split()[1] for line in log.read_text().splitlines()]
    assert (
        asked
        == ["pytest", *(f"benchmarks.{b}" for b in ("rollout", "sampler"))]
        + ["benchmarks.train_step"] * 2
    )
    assert sorted(path.name for path in out.iterdir()) == [
        *("rollout.json", "sampler.json", "train_step.json")
    ]


def test_what_is_missing_is_named_before_anything_runs(fake, tmp_path, monkeypatch):
    programs, log = fake
    (programs / "python3").write_text('#!/usr/bin/env bash\ncat > /dev/null\necho "flax optax"\n')
    done = run(path=programs)
    assert done.returncode == 2 and "missing here: flax optax" in done.stderr
    assert not log.exists()


@pytest.mark.slow
def test_every_step_runs_on_a_cpu():
    results = ROOT / "benchmarks" / "results"
    before = {path: path.read_bytes() for path in results.iterdir()}
    done = run("--dry")
    assert done.returncode == 0, done.stderr + done.stdout
    assert done.stdout.count(": status 0 after") == 5
    assert before == {
        path: path.read_bytes() for path in (ROOT / "benchmarks" / "results").iterdir()
    }
