"""A run of images without a space of their own: `--mode=features`, training, the report."""

import json
from pathlib import Path

import numpy as np
import pytest

from piflow_jax.data.images import ImagesPlan, prepare_images
from piflow_jax.data.picture_sets import LabelledPicture

TINY = Path(__file__).parents[1] / "tiny.py"
COUNT = 40


def prepared(directory, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (COUNT, 8, 8, 3), np.uint8)
    plan = ImagesPlan(
        source=f"pictures {seed}",
        num_examples=COUNT,
        shard_size=COUNT,
        class_names=("one", "other"),
        image_size=8,
        channels=3,
    )
    pictures = [LabelledPicture(pixels[i], i % 2, f"{i}.png") for i in range(COUNT)]
    prepare_images(directory, plan, pictures)
    return directory


@pytest.fixture
def command(command, tmp_path):
    """The tiny job's command line, with the work directory `run`."""

    def run(*arguments, images=None):
        given = (f"--config={TINY}", f"--workdir={tmp_path / 'run'}", *arguments)
        if images is not None:
            given += ("--config.data.name=images", f"--config.data.data_dir={images}")
        return command(*given)

    return run


@pytest.mark.slow
def test_training_makes_a_space_first_and_measures_in_it(tmp_path, command):
    images = prepared(tmp_path / "images", 0)
    status, said = command("--config.evaluation.every=3", images=images)
    assert status == 0, said
    space = "features: principal components of the pixels, sha256 "
    assert 0 < said.index(space) < said.index("teacher  ")
    protocol = json.loads((tmp_path / "run" / "report.json").read_text())["protocol"]
    assert protocol["features"] == "principal components of the pixels"
    assert protocol["comparable"] == "figures of equal features_sha256"
    digest = protocol["features_sha256"]
    assert f"{space}{digest}; figures compare only within these" in said  # under the table
    looks = [line for line in said.splitlines() if "look at step" in line]
    assert looks and all(f"sha256 {digest[:12]}" in line for line in looks)

    kept = (tmp_path / "run" / "features.npz").stat().st_mtime_ns
    status, said = command("--mode=features", images=images)
    assert status == 0 and f"{space}{digest[:12]}" in said
    assert (tmp_path / "run" / "features.npz").stat().st_mtime_ns == kept

    others = prepared(tmp_path / "others", 1)
    for mode in ("features", "evaluate", "train"):
        status, said = command(f"--mode={mode}", images=others)
        assert status == 2 and "features.npz is the feature space of another source" in said


def test_the_mode_opens_a_space_that_ships(tmp_path, command):
    status, said = command("--mode=features")
    assert status == 0 and "features: digits, sha256 25ea0571cf5b" in said
    assert not (tmp_path / "run" / "features.npz").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config.data.name=latents"], "--mode=features is for images in pixels"),
        (["--config.evaluation.features=/nowhere.pth"], "/nowhere.pth"),
    ],
)
def test_what_has_no_space_is_refused(command, arguments, words):
    status, said = command("--mode=features", *arguments)
    assert status == 2 and words in said


def test_missing_weights_of_inception_are_said_before_training(tmp_path, command):
    status, said = command("--config.evaluation.features=/nowhere.pth")
    assert status == 2 and "/nowhere.pth" in said
    assert not (tmp_path / "run" / "teacher").exists()
