"""The kernel compiled for TPU slices ahead of time; it needs `libtpu`, and no TPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tpu_compiler

ROOT = Path(__file__).parents[2]


@pytest.mark.tpu
def test_it_compiles_for_every_chip():
    code = "\n".join(
        (
            "import json, sys",
            "from benchmarks.rollout_tpu import compile_for",
            "print(json.dumps([compile_for(name) for name in sys.argv[1:]]))",
        )
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "v5e:2x2", "v5p:2x2x1", "v6e:2x4"],
        cwd=ROOT,
        env=tpu_compiler.environment() | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr
    for found in json.loads(done.stdout.splitlines()[-1]):
        assert (found["kernels"], found["collectives"]) == (1, 0)
