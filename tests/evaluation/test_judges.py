"""Which feature space a source gets, what is kept of it, and what is refused."""

import dataclasses
import re

import numpy as np
import pytest

from piflow_jax.config import ConfigError, EvaluationConfig
from piflow_jax.convert.inception import INCEPTION_FILE
from piflow_jax.data import ArraySource, load_captioned_digits_source, load_digits_source
from piflow_jax.evaluation import frechet_distance
from piflow_jax.evaluation.components import PrincipalComponents
from piflow_jax.evaluation.feature_training import Recipe, recipe_for
from piflow_jax.evaluation.features import FeatureNetwork
from piflow_jax.evaluation.kept import KeptFileError
from piflow_jax.systems import judges
from piflow_jax.systems.judges import described, open_judge, real_features, second_judge

PLAIN = EvaluationConfig()


def pictures(count=40, shape=(8, 8, 1), classes=0, seed=0):
    rng = np.random.default_rng(seed)
    x = np.tanh(rng.normal(size=(count, *shape))).astype(np.float32)
    labels = (np.arange(count) % classes).astype(np.int32) if classes else None
    return ArraySource(name="pictures", x=x, condition=labels, num_classes=classes)


@pytest.fixture
def short(monkeypatch):
    """Feature networks of few steps."""

    def recipe(shape):
        return dataclasses.replace(recipe_for(shape), steps=4)

    monkeypatch.setattr(judges, "recipe_for", recipe)


@pytest.fixture
def messages(monkeypatch):
    said = []
    monkeypatch.setattr(judges.logging, "info", lambda text, *values: said.append(text % values))
    return said


@pytest.mark.usefixtures("short")
def test_a_trained_space_is_kept_and_used_again(tmp_path, monkeypatch):
    source = load_digits_source()
    judge = open_judge(source, tmp_path / "run", PLAIN)
    assert isinstance(judge, FeatureNetwork) and judge.name == "a network trained on 'digits'"
    assert described(judge) == f"{judge.name}, sha256 {judge.digest[:12]}"
    features, labels = real_features(source, judge)
    np.testing.assert_array_equal(labels, source.condition)
    np.testing.assert_allclose(features.mean(axis=0), 0, atol=1e-3)
    np.testing.assert_allclose(features.std(axis=0), 1, atol=1e-3)

    monkeypatch.setattr(judges, "train_network", None)  # it is not called again
    again = open_judge(load_digits_source(), tmp_path / "run", PLAIN)
    assert (again.name, again.digest) == (judge.name, judge.digest)
    np.testing.assert_array_equal(again.extract(source.x[:9]), judge.extract(source.x[:9]))


def test_a_trained_space_tells_classes_apart_that_share_their_moments(tmp_path, monkeypatch):
    # Stripes up and down, or left and right, of any phase: means and variances of pixels are equal.
    rng = np.random.default_rng(0)
    labels = np.arange(512, dtype=np.int32) % 2
    phase = rng.uniform(0, 2 * np.pi, (512, 1, 1))
    line = np.arange(8) * np.pi / 2
    across = np.where(labels[:, None, None] == 1, line[:, None], line[None, :])
    x = (0.8 * np.sin(across + phase))[..., None].astype(np.float32)
    source = ArraySource(name="stripes", x=x, condition=labels, num_classes=2)
    monkeypatch.setattr(
        judges,
        "recipe_for",
        lambda shape: Recipe(strides=(2, 1), widths=(8, 16), max_shift=0.5, steps=60),
    )
    judge = open_judge(source, tmp_path, PLAIN)
    features, _ = real_features(source, judge)
    one, other = features[labels == 0], features[labels == 1]
    apart = frechet_distance(one, other)
    halves = frechet_distance(one[::2], one[1::2])
    assert apart > 10 * halves


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (pictures(40), "'pictures' has no classes"),
        (pictures(300, classes=1), "'pictures' has one class"),
        (pictures(300, (6, 9, 1), classes=2), "6 pixels a side, fewer than 8"),
        (pictures(255, classes=2), "255 images of 2 classes are too few, 256 are not"),
        (pictures(300, classes=40), "300 images of 40 classes are too few, 320 are not"),
        (
            ArraySource(name="pictures", x=pictures().x, condition={"text": np.zeros((40, 2))}),
            "'pictures' has no classes",
        ),
        (load_captioned_digits_source(), "the conditions of 'captioned_digits' are no labels"),
    ],
)
def test_without_a_network_there_are_principal_components(tmp_path, messages, source, words):
    judge = open_judge(source, tmp_path, PLAIN)
    assert isinstance(judge, PrincipalComponents)
    assert judge.name == "principal components of the pixels"
    assert any(words in text and judge.name in text for text in messages)
    assert messages[-1].endswith("figures compare only within these")
    assert judge.digest[:12] in messages[-1]
    again = open_judge(source, tmp_path, PLAIN)
    assert again.digest == judge.digest


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (ArraySource(name="points", x=np.zeros((30, 2), np.float32)), r"'points', \[2\], are no"),
        (pictures(30, (4, 4, 4)), "are no images"),
        (pictures(30, (4, 4, 4, 1)), "are no images"),
        (pictures(7), "has 7 images, figures need 8"),
        (dataclasses.replace(pictures(9), test=pictures(7)), "has 7 images, figures need 8"),
        (pictures(8, classes=8), "no class of 'pictures' has two images"),
        (
            ArraySource(name="loud", x=np.full((9, 4, 4, 1), 3, np.float32)),
            r"'loud' must lie in \[-1, 1\], they lie in \[3, 3\]",
        ),
    ],
)
def test_what_is_no_picture_has_no_judge(tmp_path, messages, source, words):
    assert open_judge(source, tmp_path, PLAIN) is None
    (said,) = messages
    assert said.startswith("no figures: ") and re.search(words, said)
    assert not list(tmp_path.iterdir())


def test_a_space_of_another_source_is_refused(tmp_path):
    open_judge(pictures(40), tmp_path, PLAIN)
    for other, words in (
        (pictures(41), "images 40 there, 41 here"),
        (pictures(40, (8, 9, 1)), r"shape \[8, 8, 1\] there, \[8, 9, 1\] here"),
        (pictures(40, classes=2), "classes 0 there, 2 here"),
        (pictures(40, seed=1), "digest '.*' there, '.*' here.*; pass another --workdir"),
    ):
        with pytest.raises(ConfigError, match=f"features.npz is the feature .*'pictures'.*{words}"):
            open_judge(other, tmp_path, PLAIN)


@pytest.mark.parametrize("damage", ["cut", "empty", "altered", "other"])
def test_a_damaged_space_is_refused(tmp_path, damage):
    path = tmp_path / "features.npz"
    open_judge(pictures(40), tmp_path, PLAIN)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-300])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "altered":
        arrays = dict(np.load(path))
        np.savez(path, **arrays | {"mean": arrays["mean"] + 1})
    else:
        np.savez(path, arr_0=np.zeros(3))
    with pytest.raises(KeptFileError, match=r"features.npz is damaged .*delete it"):
        open_judge(pictures(40), tmp_path, PLAIN)


def test_equal_pictures_are_refused_before_anything_is_written(tmp_path):
    source = ArraySource(name="blank", x=np.zeros((20, 4, 4, 3), np.float32))
    with pytest.raises(ConfigError, match="no features of 'blank': all images are the same"):
        open_judge(source, tmp_path, PLAIN)
    assert not (tmp_path / "features.npz").exists()


def test_a_shipped_space_is_for_its_own_shape(tmp_path):
    assert open_judge(load_digits_source(), tmp_path, PLAIN, "digits").name == "digits"
    with pytest.raises(ConfigError, match=r"'digits' is for images \[8, 8, 1\], those of 'pict"):
        open_judge(pictures(shape=(9, 8, 1)), tmp_path, PLAIN, "digits")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shape", [(8, 8, 1), (12, 9, 3)])
def test_inception_takes_pictures_of_any_size(tmp_path, monkeypatch, shape):
    seen = []

    class Network:
        digest = "ab" * 32

        def activations(self, images):
            seen.append(images)
            return type("Activations", (), {"pool": np.zeros((len(images), 3), np.float32)})

    monkeypatch.setattr(judges, "load_inception", lambda settings: Network())
    settings = EvaluationConfig(features=INCEPTION_FILE)
    source = pictures(shape=shape)
    judge = open_judge(source, tmp_path, settings, shipped="digits")
    assert (judge.name, judge.digest) == ("inception", "ab" * 32)
    assert real_features(source, judge)[0].shape == (40, 3)
    (images,) = seen
    assert images.shape == (40, *shape[:2], 3) and images.dtype == np.uint8
    np.testing.assert_allclose(
        images, np.broadcast_to(source.x * 127.5 + 127.5, images.shape), atol=1
    )
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_there_are_missed(tmp_path):
    settings = EvaluationConfig(features=str(tmp_path / "inception.pth"))
    with pytest.raises(FileNotFoundError, match="inception"):
        open_judge(pictures(), tmp_path, settings)


def test_large_pictures_are_averaged_before_their_features(tmp_path, monkeypatch):
    assert recipe_for((300, 100, 3)).sites == (64, 21)
    recipe = Recipe(strides=(2, 2), widths=(4, 4), max_shift=0.5, steps=2, sites=(8, 8))
    monkeypatch.setattr(judges, "recipe_for", lambda shape: recipe)
    source = pictures(256, (16, 16, 3), classes=2)
    judge = open_judge(source, tmp_path, PLAIN)
    assert judge.shape == (16, 16, 3) and judge.sites == (8, 8)
    # What averages do not see, features do not.
    checks = np.where(np.indices((16, 16)).sum(axis=0) % 2, 0.1, -0.1)[..., None]
    x = 0.5 * source.x[:5]
    np.testing.assert_allclose(judge.extract(x + checks), judge.extract(x), atol=1e-4)
    assert np.abs(judge.extract(x + 0.1) - judge.extract(x)).max() > 1e-2


def test_a_large_set_is_sampled_evenly(monkeypatch):
    monkeypatch.setattr(judges, "_MOST_REAL", 100)
    monkeypatch.setattr(judges, "_BATCH", 30)
    source = pictures(1000, (2, 2, 1), classes=10)
    identity = type("Judge", (), {"extract": staticmethod(lambda x: x.reshape(len(x), -1))})
    features, labels = real_features(source, identity)
    rows = [
        int(np.flatnonzero((source.x.reshape(1000, -1) == row).all(axis=1))[0]) for row in features
    ]
    assert len(set(rows)) == 100 and rows == sorted(rows)
    np.testing.assert_array_equal(labels, np.array(rows) % 10)
    assert 300 < np.mean(rows) < 700


def test_the_second_judge_is_of_the_pixels_of_what_figures_compare_with():
    """Of test images where there are any; not where the figures are of pixels already."""
    test, source = pictures(seed=1), pictures()
    source = dataclasses.replace(source, test=test)
    judge = second_judge(source, object())
    assert isinstance(judge, PrincipalComponents)
    real, _ = real_features(source, judge)
    np.testing.assert_allclose(np.mean(real, axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(np.cov(real.T), np.eye(real.shape[1]), atol=1e-3)
    assert second_judge(source, judge) is None
