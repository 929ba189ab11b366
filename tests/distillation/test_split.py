"""`distill` on a mesh and in several processes: the result of one device."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.compiled import on_devices
from tests.distillation import split_runs
from tests.parallel.launched import ROOT, finish, started


def losses(workdir, stage="student"):
    lines = (workdir / stage / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("one")
    return split_runs.run(workdir, 1), workdir


def assert_same(found, workdir, one):
    expected, place = one
    for stage in ("teacher", "student"):
        np.testing.assert_allclose(losses(workdir, stage), losses(place, stage), rtol=1e-4)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=1e-3)
    assert (workdir / "report.json").is_file() and (workdir / "samples.png").is_file()


@pytest.mark.slow
def test_parameters_split_over_a_mesh(one, tmp_path):
    environment = os.environ | on_devices(4) | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, split_runs.__file__, tmp_path, "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert_same(json.loads(done.stdout.splitlines()[-1]), tmp_path, one)


@pytest.mark.parametrize(
    "place", ["disk", pytest.param("bucket", marks=pytest.mark.slow)], indirect=True
)
def test_two_processes(one, place, tmp_path):
    workdir, logs = place / "run", tmp_path / "logs"
    command = [sys.executable, split_runs.__file__, str(workdir), "2"]
    with started(None, logs, 2, command=command) as running:
        codes, said = finish(running, logs)
    assert codes == [0, 0], "\n".join(said)
    for log in said:
        assert_same(json.loads(log.splitlines()[-1]), workdir, one)
