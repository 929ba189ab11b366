"""ImageNet at toy size, end to end: images, autoencoder, official teacher, a student."""

import dataclasses
import json
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from piflow_jax.config import ConfigError, parse
from piflow_jax.convert import to_torch_state, write_safetensors
from piflow_jax.data.latents import LatentsError
from piflow_jax.data.shards import RefusedError
from piflow_jax.evaluation.adm import write_samples
from piflow_jax.loading.runs import load_teacher
from piflow_jax.models.inception import InceptionV3
from piflow_jax.models.vae import AutoencoderKL
from piflow_jax.modes import adm
from piflow_jax.modes import prepare as prepare_mode
from piflow_jax.modes.autoencoder import Autoencoder
from piflow_jax.modes.evaluate import evaluate
from piflow_jax.modes.export import export
from piflow_jax.modes.prepare import prepare_latents
from piflow_jax.modes.sample import sample
from piflow_jax.modes.train import train
from piflow_jax.systems.networks import NETWORKS, teacher_network
from tests import tiny

DATA = dataclasses.replace(NETWORKS["dit"].official, num_classes=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures, the autoencoder's and the teacher's weights under official names, and a config."""
    root = tmp_path_factory.mktemp("imagenet")
    rng = np.random.default_rng(0)
    for name in ("n01440764", "n01443537"):
        (root / "images" / name).mkdir(parents=True)
        for i in range(2):
            pixels = rng.integers(0, 256, (260, 300, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "images" / name / f"{name}_{i}.JPEG")
    vae = AutoencoderKL(channels=(32, 32, 32, 32), layers_per_block=1)
    params = jax.jit(vae.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    write_safetensors(root / "vae.safetensors", to_torch_state(vae, params))

    config = tiny.get_config()
    config.data.name = "latents"
    config.data.images = str(root / "images")
    config.data.vae = str(root / "vae.safetensors")
    config.data.image_size = 256
    config.data.data_dir = str(root / "latents")
    config.model.dit.patch_size = 8
    config.train.batch_size = 4
    config.train.steps = 3
    config.teacher.weights = str(root / "teacher.safetensors")
    module = teacher_network(parse(config).model, DATA)
    teacher = jax.jit(lambda: module.init(jax.random.key(1)))()
    write_safetensors(config.teacher.weights, to_torch_state(module.module, teacher))
    prepare_latents(parse(config), root)
    return root, config, teacher


@pytest.mark.slow
def test_a_student_of_official_weights_trains_on_prepared_latents(folder, tmp_path):
    _, config, teacher = folder
    settings = parse(config)
    loaded = load_teacher(settings, DATA, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, loaded, teacher)
    train(settings, tmp_path)
    assert (tmp_path / "student" / "checkpoints" / "3").is_dir()
    assert not (tmp_path / "teacher").exists()


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """The work directory of a run that looked at its student, and its settings."""
    root, config, _ = folder
    config = config.copy_and_resolve_references()
    config.evaluation.num_samples = 10
    config.evaluation.batch_size = 4
    config.evaluation.substeps = 8
    config.evaluation.grid_classes = (1, 0)
    config.evaluation.grid_samples = 2
    config.evaluation.every = 2
    workdir = tmp_path_factory.mktemp("run")
    train(parse(config), workdir)
    config.evaluation.features = str(root / "inception.safetensors")
    config.evaluation.reference = str(root / "reference.npz")
    return workdir, config


@pytest.fixture(scope="module")
def measurable(trained):
    """The same, with Inception's weights and the statistics of the images in their files."""
    workdir, config = trained
    inception = InceptionV3()
    state = to_torch_state(inception, init_inception(inception))
    write_safetensors(config.evaluation.features, state)
    adm.write_reference(parse(config), workdir)
    return workdir, config


def init_inception(module):
    """Weights small enough for the features of random networks to stay finite."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 299, 299, 3), jnp.uint8))
    rng = np.random.default_rng(0)

    def leaf(path, shape):
        name = path[-1].key
        if name in ("scale", "variance"):
            return np.ones(shape.shape, np.float32)
        fan = int(np.prod(shape.shape[:-1])) or 1
        scale = np.sqrt(2 / fan) if name.endswith("kernel") else 0.01
        return rng.normal(0, scale, shape.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


@pytest.mark.slow
def test_a_look_leaves_a_picture_and_latents_without_a_measure_no_best(trained):
    workdir, _ = trained
    events = list((workdir / "student").glob("events.out.tfevents.*"))
    assert b"student" in b"".join(path.read_bytes() for path in events)
    assert not (workdir / "student" / "best" / "best.json").exists()


def test_samples_are_decoded_into_a_grid_of_the_classes(trained):
    workdir, config = trained
    path = sample(parse(config), workdir)
    pixels = np.asarray(Image.open(path))
    assert pixels.shape[0] > 2 * 256 and pixels.shape[1] > 2 * 256
    other = config.copy_and_resolve_references()
    other.evaluation.grid_classes = (2,)
    with pytest.raises(ConfigError, match="grid_classes must be below 2, got 2"):
        sample(parse(other), workdir)
    other.evaluation.grid_classes = (1, 0)
    other.data.vae = ""
    with pytest.raises(ConfigError, match=r"config.data.vae must name"):
        sample(parse(other), workdir)


def test_statistics_leave_out_pictures_that_cannot_be_read(tmp_path, monkeypatch):
    images = tmp_path / "images"
    images.mkdir()
    for index in range(4):
        Image.new("RGB", (9, 8), (index, 0, 0)).save(images / f"{index}.png")
    for index in (1, 3):
        (images / f"{index}.png").write_text("hello")
    batches = []

    def activations(batch):
        batches.append(batch[:, 0, 0, 0].tolist())
        features = np.random.default_rng(0).normal(size=(len(batch), 2048)).astype(np.float32)
        return types.SimpleNamespace(pool=features, spatial=features[:, :2023])

    network = types.SimpleNamespace(batch_size=2, digest="abc", activations=activations)
    monkeypatch.setattr(adm, "load_inception", lambda _: network)
    monkeypatch.setattr(adm, "write_statistics", lambda *_, **how: batches.append(how["count"]))
    config = tiny.get_config()
    config.data.images, config.data.image_size = str(images), 8
    config.evaluation.reference = str(tmp_path / "a folder" / "that is not there" / "reference.npz")
    with pytest.raises(
        RefusedError, match=r"1\.png is not .*\n.*3\.png is not .*\n2 pictures were"
    ):
        adm.write_reference(parse(config), tmp_path)
    config.data.skip_refused = True
    adm.write_reference(parse(config), tmp_path)
    assert batches == [[0, 2], 2]
    assert (tmp_path / "a folder" / "that is not there").is_dir()
    (images / "2.png").write_text("hello")
    with pytest.raises(ConfigError, match="has 1 images that can be read, too few"):
        adm.write_reference(parse(config), tmp_path)
    config.evaluation.reference = str(images / "0.png" / "reference.npz")
    del batches[:]
    with pytest.raises(
        OSError, match=r"cannot write to .*, or name another config\.evaluation\.ref"
    ):
        adm.write_reference(parse(config), tmp_path)
    assert not batches


def test_figures_are_said_to_be_of_the_sampler_that_made_them():
    config = tiny.get_config()
    config.evaluation.nfe = 3
    config.evaluation.solver = "multistep"
    config.evaluation.temperature = 0.5
    named = types.SimpleNamespace(identity="vae", digest="ab", path=Path("reference.npz"))
    found = adm.protocol(parse(config), DATA, named, named, named, 10)
    assert (found.nfe, found.solver, found.temperature) == (3, "multistep", 0.5)
    # A student of one scale takes none; one of a range has the teacher's by default.
    config.teacher.guidance_scale = 3.2
    scales = []
    for bounds, asked in (((), 0.0), ((1.0, 4.0), 0.0), ((1.0, 4.0), 2.0)):
        config.teacher.guidance_range, config.evaluation.guidance = bounds, asked
        scales.append(adm.protocol(parse(config), DATA, named, named, named, 10).guidance)
    assert scales == [1.0, 3.2, 2.0]


@pytest.mark.slow
def test_an_evaluation_needs_the_autoencoder(measurable):
    workdir, config = measurable
    other = config.copy_and_resolve_references()
    other.data.vae = ""
    with pytest.raises(ConfigError, match=r"config.data.vae must name"):
        evaluate(parse(other), workdir)


@pytest.mark.slow
def test_figures_are_those_of_the_file_however_it_came_about(measurable, tmp_path, monkeypatch):
    workdir, config = measurable
    monkeypatch.setattr(adm, "_SHARD", 4)
    monkeypatch.setattr(adm, "write_samples", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(parse(config), workdir)
    monkeypatch.undo()
    monkeypatch.setattr(adm, "_SHARD", 4)
    shards = sorted((workdir / "samples").glob("*.npy"))
    assert [path.name for path in shards] == ["00000.npy", "00001.npy", "00002.npy"]
    times = [path.stat().st_mtime_ns for path in shards[::2]]
    shards[1].unlink()  # as if killed before it
    kept = []

    def note_and_write(*args):
        kept.extend(path.stat().st_mtime_ns for path in shards[::2])
        write_samples(*args)

    monkeypatch.setattr(adm, "write_samples", note_and_write)
    figures = evaluate(parse(config), workdir)
    assert kept == times
    with np.load(workdir / "samples" / "samples.npz") as archive:
        images, labels = archive["arr_0"], archive["arr_1"]
    assert images.shape == (10, 256, 256, 3) and images.dtype == np.uint8
    np.testing.assert_array_equal(labels, np.arange(10) % 2)
    assert not list((workdir / "samples").glob("*.npy"))
    # No figure of features that are not the published ones is called FID.
    assert figures.names[0].startswith("Frechet distance of features")
    written = json.loads((workdir / "adm.json").read_text())
    assert written["frechet"] == figures.frechet and written["protocol"]["samples"] == 10

    # Exported weights, without the run and its latents, in another batch size, make the same.
    export(parse(config), workdir)
    other = config.copy_and_resolve_references()
    other.evaluation.weights = str(workdir / "student.safetensors")
    other.evaluation.batch_size = 5
    other.data.data_dir = "nowhere"
    monkeypatch.setattr(adm, "write_samples", write_samples)
    monkeypatch.setattr(adm, "measure_adm", lambda *_: figures)  # the slow part, shown above
    monkeypatch.setitem(NETWORKS, "dit", dataclasses.replace(NETWORKS["dit"], official=DATA))
    evaluate(parse(other), tmp_path)
    with np.load(tmp_path / "samples" / "samples.npz") as archive:
        assert np.abs(archive["arr_0"].astype(int) - images).max() <= 1

    # What lies there is not taken for samples of other settings.
    other.evaluation.seed = 1
    with pytest.raises(ConfigError, match=r"samples of other settings \(seed was 0, is 1\)"):
        evaluate(parse(other), tmp_path)


def killed(*args):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("run", "key", "value", "error", "message"),
    [
        (
            "trained",
            "features",
            "",
            ConfigError,
            r"config.evaluation.features must name pt_inception",
        ),
        (
            "trained",
            "features",
            "nowhere.pth",
            FileNotFoundError,
            "no Inception weights at nowhere.pth",
        ),
        pytest.param(
            *(
                "measurable",
                "reference",
                "",
                ConfigError,
                r"config.evaluation.reference must name ADM's",
            ),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *(
                "measurable",
                "reference",
                "nowhere.npz",
                FileNotFoundError,
                "no reference statistics at nowhere.npz",
            ),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_missing_file_is_named_before_anything_is_sampled(
    request, run, key, value, error, message
):
    workdir, config = request.getfixturevalue(run)
    other = config.copy_and_resolve_references()
    other.evaluation[key] = value
    for mode in (evaluate, train):
        with pytest.raises(error, match=message):
            mode(parse(other), workdir)


def test_latents_of_another_autoencoder_are_refused(trained, tmp_path):
    workdir, config = trained
    other = config.copy_and_resolve_references()
    other.data.vae = str(tmp_path / "vae.safetensors")
    vae = AutoencoderKL(channels=(32, 32, 32, 32), layers_per_block=1)
    params = jax.jit(vae.init)(jax.random.key(1), jnp.zeros((1, 32, 32, 3)))
    write_safetensors(other.data.vae, to_torch_state(vae, params))
    for mode in (sample, train):
        with pytest.raises(ConfigError, match=r"but these latents were made by"):
            mode(parse(other), workdir)


def test_what_does_not_fit_is_named(folder, tmp_path, monkeypatch):
    root, config, _ = folder
    other = config.copy_and_resolve_references()
    other.model.dit.depth = 2
    with pytest.raises(ConfigError, match=r"config.teacher.weights = .*depth: given 2"):
        load_teacher(parse(other), DATA, tmp_path)
    other = config.copy_and_resolve_references()
    other.data.vae = config.teacher.weights
    with pytest.raises(ConfigError, match=r"config.data.vae = .*weights of a dit, not of a vae"):
        prepare_latents(parse(other), root)
    flux2 = AutoencoderKL(channels=(8, 8), norm_groups=8, latent_scale=((1.0,) * 4,) * 2)
    with monkeypatch.context() as patch:
        patch.setattr(prepare_mode, "load_autoencoder", lambda *_: Autoencoder(flux2, {}, "abc"))
        with pytest.raises(ConfigError, match=r"config.data.vae = .* by place \(FLUX.2\).*another"):
            prepare_latents(parse(other), root)
    other.data.vae = ""
    with pytest.raises(ConfigError, match=r"--mode=prepare needs config.data.vae"):
        prepare_latents(parse(other), root)
    other.data.data_dir = str(tmp_path)
    with pytest.raises(LatentsError, match="there are no latents"):
        train(parse(other), tmp_path)


def test_two_teachers_are_refused(folder):
    _, config, _ = folder
    other = config.copy_and_resolve_references()
    other.teacher.checkpoint = "somewhere"
    with pytest.raises(ConfigError, match="are both given"):
        parse(other)
