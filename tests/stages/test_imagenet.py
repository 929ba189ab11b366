"""ImageNet at toy size, end to end: images, autoencoder, official teacher, a student."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

from piflow_jax.config import ConfigError, parse
from piflow_jax.convert import to_torch_state, write_safetensors
from piflow_jax.data.latents import LatentsError
from piflow_jax.models.vae import AutoencoderKL
from piflow_jax.stages import evaluate, prepare_latents, train
from piflow_jax.stages.systems import load_teacher
from piflow_jax.training.networks import DataShape, init_params, teacher_network

DATA = DataShape(name="imagenet", sample_size=32, channels=4, num_classes=2)


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
    config.data.name = "imagenet"
    config.data.images = str(root / "images")
    config.data.vae = str(root / "vae.safetensors")
    config.data.data_dir = str(root / "latents")
    config.model.patch_size = 8
    config.train.batch_size = 4
    config.train.steps = 3
    config.teacher.weights = str(root / "teacher.safetensors")
    module = teacher_network(parse(config).model, DATA)
    teacher = init_params(module, jax.random.key(1))
    write_safetensors(config.teacher.weights, to_torch_state(module, teacher))
    prepare_latents(parse(config), root)
    return root, config, teacher


def test_a_student_of_official_weights_trains_on_prepared_latents(folder, tmp_path):
    _, config, teacher = folder
    settings = parse(config)
    loaded = load_teacher(settings, DATA, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, loaded, teacher)
    train(settings, tmp_path)
    assert (tmp_path / "student" / "checkpoints" / "3").is_dir()
    assert not (tmp_path / "teacher").exists()
    with pytest.raises(ConfigError, match=r"no report for config.data.name = 'imagenet'"):
        evaluate(settings, tmp_path)


def test_what_does_not_fit_is_named(folder, tmp_path):
    root, config, _ = folder
    other = config.copy_and_resolve_references()
    other.model.depth = 2
    with pytest.raises(ConfigError, match=r"config.teacher.weights = .*depth: given 2"):
        load_teacher(parse(other), DATA, tmp_path)
    other = config.copy_and_resolve_references()
    other.data.vae = config.teacher.weights
    with pytest.raises(ConfigError, match=r"config.data.vae = .*does not fit an autoencoder"):
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
