"""The corrector by a distance of features: its space and statistics, in steps and in whole runs."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from piflow_jax.config import ConfigError, parse
from piflow_jax.data import ArraySource, load_digits_source
from piflow_jax.data.images import mirrored
from piflow_jax.distillation.bench import Bench
from piflow_jax.distillation.stages import student_stage
from piflow_jax.evaluation import (
    Figures,
    Report,
    Row,
    frechet_distance_from_statistics,
    load_features,
)
from piflow_jax.loading.runs import spaces_of
from piflow_jax.modes.train import train
from piflow_jax.parallel import device_mesh
from piflow_jax.runs.loop import run_stage
from piflow_jax.systems.assembly import Systems
from piflow_jax.systems.correctors import CORRECTOR_KINDS
from piflow_jax.systems.judges import is_judge_of
from piflow_jax.systems.shapes import DataShape
from piflow_jax.systems.spaces import SPACES, open_space
from piflow_jax.systems.spec import updated_settings
from piflow_jax.training.corrector import CORRECTORS
from tests import tiny
from tests.settings import refusal
from tests.steps import without_step

DATA = DataShape(name="digits", sample_size=8, channels=1, num_classes=10)
OPTIONS = {"log_every": 1, "checkpoint_every": 2, "keep_checkpoints": 2}


def settings(space="judge", **changes):
    config = tiny.get_config()
    config.train.corrector.kind = "frechet"
    config.train.corrector.start = 1
    config.train.corrector.space = space
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return parse(config)


def opened(workdir, space="judge", **changes):
    return open_space(settings(space, **changes), load_digits_source(), workdir, "digits")


def stage(workdir, mesh=None, trained_in=(), **changes):
    config, source = settings(**changes), load_digits_source()
    systems = Systems.of(config, DATA)
    systems = dataclasses.replace(systems, space=open_space(config, source, workdir, "digits"))
    params = jax.jit(systems.teacher_network.init)(jax.random.key(5))
    # A fresh network predicts zero.
    params = jax.tree.map(
        lambda a: a + 0.02 * jax.random.normal(jax.random.key(1), a.shape), params
    )
    return student_stage(systems, source, params, mesh or device_mesh(), trained_in=trained_in)


def test_every_kind_and_every_space_can_be_asked_for():
    fields = {field.name: field for field in dataclasses.fields(type(settings().train.corrector))}
    assert {"", *CORRECTORS} == {"", *CORRECTOR_KINDS} == set(fields["kind"].metadata["choices"])
    assert [*SPACES] == list(fields["space"].metadata["choices"])


def test_statistics_are_those_of_the_training_data_and_kept(tmp_path, monkeypatch):
    space = opened(tmp_path)
    features = load_features("digits").extract(load_digits_source().x).astype(np.float64)
    np.testing.assert_allclose(space.mean, features.mean(0), atol=1e-6)
    np.testing.assert_allclose(space.covariance, np.cov(features.T), atol=1e-6)
    np.testing.assert_allclose(space.root @ space.root, space.covariance, atol=1e-12)
    monkeypatch.setattr("piflow_jax.systems.spaces.Moments", None)  # nothing is computed again
    again = opened(tmp_path)
    np.testing.assert_array_equal(again.covariance, space.covariance)
    with pytest.raises(AttributeError):  # but for another space it is
        opened(tmp_path, "pixels")


@pytest.mark.parametrize("space", ["judge", "pixels"])
def test_features_inside_a_program_are_the_judges_with_derivatives(tmp_path, space):
    images = load_digits_source().x[:6] * 0.9
    features = opened(tmp_path, space).features
    found = jax.jit(features.features)(jnp.asarray(images))
    np.testing.assert_allclose(found, features.extract(images), rtol=1e-5, atol=2e-5)
    grads = jax.jit(jax.grad(lambda x: jnp.sum(features.features(x))))(jnp.asarray(images))
    assert np.isfinite(grads).all() and (np.abs(np.asarray(grads)).max(axis=(1, 2, 3)) > 0).all()


@pytest.mark.parametrize(("space", "seen"), [("judge", True), ("pixels", False)])
def test_a_judge_knows_the_spaces_that_it_measures_in(tmp_path, space, seen):
    assert is_judge_of(load_features("digits"), [opened(tmp_path, space).name]) == seen


def test_a_network_of_its_own_is_no_judge(tmp_path, monkeypatch):
    from piflow_jax.systems import judges

    seeds = []

    def quickly(source, recipe, seed, on_step):
        seeds.append(seed)
        return whole(source, dataclasses.replace(recipe, steps=2), seed)

    whole = judges.train_network
    monkeypatch.setattr(judges, "train_network", quickly)
    space = opened(tmp_path, "network")
    judge = judges.open_judge(load_digits_source(), tmp_path)  # no space ships with this source
    assert seeds == [1, 0] and space.features.digest != judge.digest
    assert not is_judge_of(judge, [space.name])
    assert opened(tmp_path, "network").features.digest == space.features.digest
    assert seeds == [1, 0]


NO_CLASSES = ArraySource(name="mine", x=np.zeros((300, 8, 8, 1), np.float32))


@pytest.mark.parametrize(
    ("source", "space", "words"),
    [
        (
            ArraySource(name="points", x=np.zeros((20, 2), np.float32)),
            "pixels",
            "config.train.corrector.kind = 'frechet' measures pictures, but the states of "
            "'points', [2], are no images [H, W, 1] or [H, W, 3]: give 'critic'",
        ),
        (
            NO_CLASSES,
            "network",
            "config.train.corrector.space = 'network' needs a feature network, and none can be "
            "trained: 'mine' has no classes; give 'pixels'",
        ),
    ],
)
def test_data_without_such_a_space_are_refused(tmp_path, source, space, words):
    with pytest.raises(ConfigError) as error:
        open_space(settings(space), source, tmp_path)
    assert str(error.value) == words


class Mirrored(ArraySource):
    draw = staticmethod(mirrored)


def test_statistics_are_of_what_training_draws(tmp_path):
    x = load_digits_source().x
    plain = open_space(settings("pixels"), ArraySource(name="mine", x=x), tmp_path)
    # Not the statistics that are there.
    space = open_space(settings("pixels"), Mirrored(name="mine", x=x), tmp_path)
    halves = [plain.features.extract(images) for images in (x, x[:, :, ::-1])]
    means, errors = (np.stack([f(half, axis=0) for half in halves]) for f in (np.mean, np.std))
    error = (errors / np.sqrt(len(x))).mean(axis=0)
    assert np.max(np.abs(space.mean - means.mean(axis=0)) / error) < 5
    assert np.max(np.abs(plain.mean - means.mean(axis=0)) / error) > 15


def test_test_images_without_figures_have_no_space(tmp_path):
    few = ArraySource(name="test", x=np.zeros((5, 8, 8, 1), np.float32))
    with pytest.raises(ConfigError, match=r"'judge' .* 'test' has 5 images, .*; give"):
        open_space(settings("judge"), load_digits_source(), tmp_path, test_source=few)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {
                "model__network": "qwen_image",
                "data__name": "prompts",
                "model__qwen_image__rope_axes": (4, 6, 6),
            },
            "config.train.corrector.kind = 'frechet' measures pictures, but the states of "
            "config.data.name = 'prompts' are latents; give 'critic'",
        ),
        (
            {"train__corrector__levels": (0.1, 0.9)},
            "config.train.corrector.levels is for config.train.corrector.kind = 'critic' or "
            "'policy' and must be its default with 'frechet'",
        ),
        (
            {"train__corrector__kind": "critic", "train__corrector__space": "pixels"},
            "config.train.corrector.space is for config.train.corrector.kind = 'frechet' and must "
            "be its default with 'critic'",
        ),
        (
            {"train__corrector__start": 0},
            "config.train.corrector.start must be at least 1 with config.train.corrector.kind = "
            "'frechet', which first has to see samples",
        ),
        *(
            (
                {"train__corrector__share": share, "train__batch_size": 4},
                f"config.train.corrector.share = {share} leaves the corrector or pi-ID without "
                "examples with config.train.batch_size = 4: raise the batch size",
            )
            for share in (0.01, 0.9)
        ),
    ],
)
def test_settings_that_do_not_apply_are_refused(changes, words):
    assert words in refusal(**{"train__corrector__kind": "frechet"} | changes)


def test_elsewhere_than_in_training_it_is_refused():
    systems = Systems.of(settings(), DATA)
    params = jax.eval_shape(systems.teacher_network.init, jax.random.key(0))
    with pytest.raises(ConfigError, match=r"is for --mode=train and piflow_jax.distill, which"):
        student_stage(systems, load_digits_source(), params, device_mesh())


@pytest.mark.slow
def test_a_run_continues_to_the_same_bits_and_names_its_spaces(tmp_path):
    before = {"trained_in": ("a, sha256 0",)}
    made = stage(tmp_path, train__steps=4, **before)
    whole = run_stage(made, tmp_path / "whole", **OPTIONS)
    without_step(4, tmp_path / "whole", tmp_path / "parts")
    parts = run_stage(made, tmp_path / "parts", **OPTIONS)
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    assert int(parts.moments.batches) == 4 and np.any(np.asarray(parts.moments.second))
    lines = (tmp_path / "whole/student/metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert {"corrector_loss", "corrector_frechet"} <= last.keys()
    # What is logged is the distance between the data and the samples that were seen.
    space = opened(tmp_path)
    mean, covariance = map(np.asarray, parts.moments.gaussian())
    theirs = np.zeros(len(space.mean)), space.covariance
    expected = frechet_distance_from_statistics((mean, (covariance + covariance.T) / 2), theirs)
    np.testing.assert_allclose(last["corrector_frechet"], expected, rtol=1e-4)
    found = spaces_of(epath.Path(tmp_path / "whole"))
    assert found == ("a, sha256 0", space.name)


def test_the_best_checkpoint_is_not_chosen_by_the_distance_trained_on(tmp_path):
    config = settings(evaluation__every=2, evaluation__checkpoint="best")
    with pytest.raises(ConfigError, match=r"checkpoint = 'best' would be chosen by a distance in"):
        train(config, tmp_path)
    assert not (tmp_path / "teacher" / "checkpoints").exists()  # before anything is trained


def test_a_run_knows_the_data_of_its_space(tmp_path):
    found = [stage(tmp_path, space=space).config for space in ("judge", "pixels", "judge")]
    key = "train.corrector.data"
    assert found[0][key] == found[2][key] != found[1][key]


@pytest.mark.parametrize(
    ("space", "figure", "head"),
    [
        ("judge", "frechet", "| Frechet (trained on) |"),
        ("pixels", "pixel_frechet", "| Frechet of pixels (trained on) |"),
    ],
)
def test_a_report_says_which_distances_the_student_was_trained_on(tmp_path, space, figure, head):
    names, source = [opened(tmp_path, space).name], load_digits_source()
    bench = Bench(settings(space), source, DATA, load_features("digits"), names)
    protocol = bench.protocol()
    assert protocol["trained_in"] == names and protocol["trained_on"] == [figure]
    figures = Figures(frechet=1.0, precision=0.5, recall=0.5, diversity=1.0)
    row = Row(system="student", nfe=1, figures=figures, endpoint_mse=None, seconds=0.0)
    rows = {"rows": [row], **bench.of_data()}
    table = Report(**rows, protocol=protocol).table()
    assert head in table and table.count("trained on") == 2 and names[0] in table
    others = Bench(settings(space), source, DATA, load_features("digits")).protocol()
    assert not {"trained_in", "trained_on"} & others.keys()
    assert "trained on" not in Report(**rows, protocol=others).table()


@pytest.mark.parametrize("kind", ["critic", ""])
def test_runs_before_features_go_on(kind):
    """Their settings lack the keys of features, which runs without a corrector never record."""
    saved = {"train.steps": 3} | ({"train.corrector.kind": kind} if kind else {})
    found = {key: value for key, value in updated_settings(saved).items() if "corrector." in key}
    added = {"train.corrector.space": "network", "train.corrector.population": 50_000}
    assert found == ({"train.corrector.kind": kind} | added if kind else {})
