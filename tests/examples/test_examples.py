"""The worked examples do what they say."""

import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import piflow_jax

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name):
    path = EXAMPLES / f"{name}.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) < 150
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_ddpm_of_flax_nnx_is_distilled():
    figures = load("nnx_teacher").main().figures
    # The data have variance 1: a student that learned nothing is about 2 away.
    assert figures["student, 1 evaluation"] < 0.05 < figures["teacher, 4 evaluations"]


SMALL = {"size": 8, "teacher_steps": 30, "student_steps": 40, "width": 8}
CHANGES = {
    "train.total_substeps": 16,
    "evaluation.num_samples": 24,
    "evaluation.batch_size": 24,
    "evaluation.every": 20,
    "evaluation.every_samples": 24,
    "log_every": 1,
    "checkpoint_every": 5,
}


@pytest.mark.slow
def test_a_unet_and_images_of_ones_own_are_distilled_killed_and_continued(tmp_path):
    rng = np.random.default_rng(0)
    for kind in ("dark", "light"):
        (tmp_path / "images" / kind).mkdir(parents=True)
        for index in range(20):
            pixels = rng.integers(0, 128, (8, 8, 3), np.uint8) + 127 * (kind == "light")
            Image.fromarray(pixels.astype(np.uint8)).save(
                tmp_path / "images" / kind / f"{index}.png"
            )
    example = load("own_unet")
    assert len((EXAMPLES / "own_unet.py").read_text().splitlines()) < 130

    def command(workdir):
        call = f"main({str(tmp_path / 'images')!r}, {str(workdir)!r}, **{SMALL | CHANGES!r})"
        code = (
            f"import sys; sys.path.insert(0, {str(EXAMPLES)!r}); from own_unet import main; {call}"
        )
        return subprocess.Popen([sys.executable, "-c", code])

    killed = tmp_path / "killed"
    process, metrics = command(killed), killed / "student" / "metrics.jsonl"
    while process.poll() is None:
        if metrics.exists() and len(metrics.read_text().splitlines()) >= 12:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.05)
    assert process.wait() == -signal.SIGKILL
    assert command(killed).wait() == 0
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [
        *range(1, 41)
    ]
    whole = example.main(tmp_path / "images", tmp_path / "whole", **SMALL, **CHANGES)
    continued = piflow_jax.load(killed, network=example.UNet(4 * 4, 2, 8))
    for a, b in zip(*map(jax.tree.leaves, (whole.params, continued.params)), strict=True):
        np.testing.assert_array_equal(a, b)
    report = json.loads((killed / "report.json").read_text())
    assert [row["nfe"] for row in report["rows"] if row["system"] == "student"] == [1]
    assert (killed / "samples.png").is_file()
    assert whole.sample(0, [0, 1]).shape == (2, 8, 8, 3)
