"""Simulated devices: a batch that is split over them stays where it is; its program is kept."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

from tests.compiled import on_devices

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def run(script, devices, *arguments, **environment):
    environment |= on_devices(devices) | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, HERE / script, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_split_batch_stays_split():
    found = run("split_rollouts.py", 8)
    assert found["moved"] == {} and found["split"]
    assert found["jit"] < 1e-5 and found["shard_map"] < 1e-5


def test_a_split_rollouts_program_is_found_by_the_next_process(tmp_path):
    keep_all = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    first, second = (run("kept_rollouts.py", 2, tmp_path, **keep_all) for _ in range(2))
    assert first["by_address"] == 1 and (first["hits"], second["hits"]) == (0, 1)
    assert first["end"] == second["end"]
    # By the sources of the kernels, of which nothing else is in the program.
    sources = sorted((ROOT / "piflow_jax" / "kernels").glob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    assert first["names"] == [f"mixture_rollout_{digest[:12]}"]
