"""The step compiled for TPU slices that are not here; in a process of its own, for libtpu."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from piflow_jax.config import ConfigError, parse
from piflow_jax.stages import compile_step

ROOT = Path(__file__).parents[2]


def test_an_unknown_slice_is_refused_before_anything_else(tmp_path):
    with pytest.raises(ConfigError, match=r"config.topology: unknown topology ''; it is a chip"):
        compile_step(parse(tiny.get_config()), tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_a_small_step_compiles_for_a_slice(tmp_path):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    arguments = (
        f"--config={ROOT / 'tests' / 'tiny.py'}",
        f"--workdir={tmp_path}",
        "--mode=compile",
        "--config.topology=v5e:2x2",
        "--config.train.microbatches=2",
    )
    done = subprocess.run(
        [sys.executable, "-m", "piflow_jax.main", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "compile_v5e_2x2.json").read_text())
    assert (report["devices"], report["batch_per_device"]) == (4, 2)
    # A little below 1: the first layer needs no gradient of its input.
    assert 0.9 < report["flops"]["ratio"] < 1.15
    assert 0 < report["memory_bytes"]["peak"] < report["memory_bytes"]["chip"]
    assert "fits" in done.stderr

    arguments = [*arguments[:-1], "--config.train.microbatches=8"]
    refused = subprocess.run(
        [sys.executable, "-m", "piflow_jax.main", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert refused.returncode == 2
    assert "config.train.microbatches times the 4 devices of v5e:2x2" in refused.stderr
