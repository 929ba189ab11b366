"""Pictures of teacher and student to one report; what is missing or odd is named."""

import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from piflow_jax.config import ConfigError, base_config, parse
from piflow_jax.evaluation import frechet_distance
from piflow_jax.evaluation.image_sets import centre_patch, resized
from piflow_jax.modes import evaluate_prompts
from piflow_jax.modes.command import MODES

PAIRS = [(place, seed) for place in range(4) for seed in range(3)]
PROMPTS = [f"prompt {i}" for i in range(4)]


def picture(name, place, seed):
    key = hashlib.sha256(f"{name} {place} {seed}".encode()).digest()
    rng = np.random.default_rng(list(key))
    colours = rng.integers(0, 256, (6, 8, 3), np.uint8)
    return colours.repeat(50, axis=0).repeat(50, axis=1)  # 300x400


class Inception:
    """Stands for the network: mean and variance of each channel."""

    digest, published = "of the network", False

    def activations(self, images):
        assert images.dtype == np.uint8 and images.shape[1:] == (299, 299, 3)
        wide = images.astype(np.float64) / 50
        pool = np.concatenate([wide.mean(axis=(1, 2)), wide.std(axis=(1, 2))], axis=1)
        return type("Activations", (), {"pool": pool})


class Clip:
    """Stands for CLIP: a picture's corner, and numbers of a prompt."""

    name, digest, reads_text = "clip small", "of clip", True

    def image_features(self, images):
        features = np.stack([image[0, 0] + 1.0 for image in images])
        return features / np.linalg.norm(features, axis=1, keepdims=True)

    def text_features(self, prompts):
        features = np.array([[1.0, float(prompt[-1]), 2.0] for prompt in prompts])
        return features / np.linalg.norm(features, axis=1, keepdims=True)


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate_prompts, "load_inception", lambda _: Inception())
    monkeypatch.setattr(evaluate_prompts, "load_image_network", lambda folder: Clip())
    for name in ("student", "teacher"):
        (tmp_path / name).mkdir()
        for place, seed in PAIRS:
            path = tmp_path / name / f"{place}-{seed}.png"
            Image.fromarray(picture(name, place, seed)).save(path)
    (tmp_path / "list.txt").write_text("\n".join(PROMPTS))
    made = base_config()
    made.data.name = "prompts"
    made.model.network = "flux"
    made.model.flux.rope_axes = (8, 4, 4)
    made.data.prompts = str(tmp_path / "list.txt")
    made.evaluation.images = str(tmp_path / "student")
    made.evaluation.teacher_images = str(tmp_path / "teacher")
    made.evaluation.features = "inception"
    made.evaluation.clip = "clip"
    return made


def pictures(name):
    return [picture(name, *pair) for pair in PAIRS]


def test_the_report_has_all_figures(config, tmp_path):
    MODES["evaluate"].run(parse(config), tmp_path)
    report = json.loads((tmp_path / "text_report.json").read_text())
    for figure, view in (("teacher_fid", resized), ("patch_fid", centre_patch)):
        features = [
            Inception().activations(np.stack([view(image) for image in pictures(name)])).pool
            for name in ("student", "teacher")
        ]
        expected = frechet_distance(*(f.astype(np.float32) for f in features))
        np.testing.assert_allclose(report[figure], expected, rtol=1e-6)
    assert report["teacher_fid"] != report["patch_fid"]
    for name, prefix in (("student", ""), ("teacher", "teacher_")):
        features = Clip().image_features(pictures(name))
        texts = Clip().text_features([PROMPTS[place] for place, _ in PAIRS])
        np.testing.assert_allclose(
            report[f"{prefix}clip"], np.sum(features * texts, axis=1).mean(), rtol=1e-6
        )
        groups = features.reshape(4, 3, 3)
        pairs = [1 - g[i] @ g[j] for g in groups for i in range(3) for j in range(i)]
        np.testing.assert_allclose(report[f"{prefix}diversity"], np.mean(pairs), rtol=1e-5)
    protocol = report["protocol"]
    assert (protocol["pictures"], protocol["prompts"], protocol["seeds"]) == (12, 4, 3)
    assert protocol["inception"]["sha256"] == "of the network"
    assert protocol["clip"] == {"network": "clip small", "sha256": "of clip"}


def test_features_are_kept_and_figures_can_be_left_out(config, tmp_path, monkeypatch):
    first = evaluate_prompts.evaluate_images(parse(config), tmp_path)

    def never(*_):
        raise AssertionError("the features are there")

    monkeypatch.setattr(Inception, "activations", never)
    monkeypatch.setattr(Clip, "image_features", never)
    again = evaluate_prompts.evaluate_images(parse(config), tmp_path)
    assert again == first and again.table().count("\n") == 5
    assert again.table().splitlines()[0].startswith("teacher Frechet distance ")
    first.protocol["inception"]["published"] = True
    assert first.table().splitlines()[1].startswith("teacher patch FID ")
    config.evaluation.features = config.evaluation.teacher_images = ""
    alone = evaluate_prompts.evaluate_images(parse(config), tmp_path)
    assert alone.teacher_fid is None and alone.clip == first.clip
    assert alone.table().splitlines()[0].startswith("CLIP similarity")


def test_one_seed_has_no_diversity(config, tmp_path):
    for name in ("student", "teacher"):
        for path in (tmp_path / name).glob("*-[12].png"):
            path.unlink()
    report = evaluate_prompts.evaluate_images(parse(config), tmp_path)
    assert report.diversity is None and report.clip is not None


def lack(tmp_path, config):
    (tmp_path / "teacher" / "2-1.png").unlink()


def shorten(tmp_path, config):
    (tmp_path / "list.txt").write_text("\n".join(PROMPTS[:3]))


def shrink(tmp_path, config):
    Image.fromarray(np.zeros((200, 300, 3), np.uint8)).save(tmp_path / "student" / "0-0.png")


def keep_one(tmp_path, config):
    for place, seed in PAIRS[1:]:
        for name in ("student", "teacher"):
            (tmp_path / name / f"{place}-{seed}.png").unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _, c: c.evaluation.update(images=""), r"config\.evaluation\.images must name"),
        (lambda _, c: c.evaluation.update(features="", clip=""), "nothing to measure"),
        (lambda _, c: c.evaluation.update(teacher_images=""), "need config.evaluation.teacher_im"),
        (lambda _, c: c.data.update(prompts=""), r"clip needs config\.data\.prompts"),
        (lack, "teacher_images lacks the picture of prompt 2 with seed 1, and 0 others"),
        (keep_one, r"config\.evaluation\.images must have two pictures or more"),
        (shorten, "has 3 prompts, but there is a picture of prompt 3"),
        (shrink, "a patch of 299 pixels does not fit into 200x300"),
    ],
)
def test_what_is_missing_or_odd_is_named(config, tmp_path, change, message):
    change(tmp_path, config)
    with pytest.raises(ConfigError, match=message):
        evaluate_prompts.evaluate_images(parse(config), tmp_path)
