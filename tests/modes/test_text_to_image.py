"""Text to image at toy size, end to end: prompts, official weights, a student, its pictures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import piflow_jax
from piflow_jax.config import ConfigError, parse
from piflow_jax.convert import open_weights, to_torch_state, write_safetensors
from piflow_jax.data import load_captioned_digits_source, load_edited_digits_source, stacked
from piflow_jax.data.prompt_lists import Prompt
from piflow_jax.data.prompts import load_prompts_source
from piflow_jax.data.text_encoders import WordEncoder
from piflow_jax.models.vae import AutoencoderKL
from piflow_jax.modes import sample_prompts
from piflow_jax.modes.export import export
from piflow_jax.modes.prepare_prompts import encode_prompts
from piflow_jax.modes.sample import sample
from piflow_jax.modes.sample_prompts import find_prompts
from piflow_jax.modes.train import train
from piflow_jax.systems.networks import teacher_network
from piflow_jax.systems.shapes import DataShape
from tests import tiny_text

PROMPTS = [
    Prompt(f"{'very ' * (i % 3)}red fox {i}", aspect) for i, aspect in enumerate([1, 2, 1, 2])
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Cached prompts, and a config that names them."""
    root = tmp_path_factory.mktemp("prompts")
    encoder = WordEncoder(12, 10)
    encode_prompts(PROMPTS, encoder, root / "cache", source="foxes", image_size=64, shard_size=3)
    (root / "list.txt").write_text("red fox 3\nred fox 0\n")
    config = tiny_text.get_config("flux")
    config.data.name = "prompts"
    config.data.data_dir = str(root / "cache")
    config.data.prompts = str(root / "list.txt")
    config.train.batch_size = 2
    config.evaluation.batch_size = 2
    config.train.steps = 3
    return root, config


def test_prompts_without_embeddings_are_refused_with_what_makes_them(prepared):
    root, config = prepared
    source = load_prompts_source(root / "cache")
    found = find_prompts(source, [Prompt("red fox 3", 2)], 64, "cache")
    assert [source.prompts[i] for i in found] == ["red fox 3"]
    (root / "other.txt").write_text("red fox 0\na blue fox\n")
    config = config.copy_and_resolve_references()
    config.data.prompts = str(root / "other.txt")
    with pytest.raises(
        ConfigError, match=r"1 of the prompts, the first is 'a blue fox'; .*prepare"
    ):
        sample(parse(config), root)


def test_a_prompt_is_found_in_the_shape_of_the_list(tmp_path, caplog):
    prompts = [Prompt("a", 1), Prompt("a", 2), Prompt("b", 2)]
    encode_prompts(prompts, WordEncoder(12, 10), tmp_path, source="letters", image_size=64)
    source = load_prompts_source(tmp_path)

    def shapes(*wanted):
        found = find_prompts(source, wanted, 64, "cache")
        assert [source.prompts[i] for i in found] == [prompt.text for prompt in wanted]
        return [source.buckets[source.bucket(i)] for i in found]

    square, (height, width) = shapes(Prompt("a", 1), Prompt("a", 2))
    assert square == (8, 8) and width == 2 * height
    assert "other shapes" not in caplog.text
    assert shapes(Prompt("b", 1), Prompt("a", 1)) == [(height, width), square]
    assert "1 prompts, the first is 'b', have other shapes in cache" in caplog.text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("teacher.guidance_interval", (0.2, 0.6)),
        ("teacher.orthogonal_guidance", 0.5),
        ("model.flux.base_dtype", "int8"),
        ("teacher.guidance_scale", 2.0),
    ],
)
def test_a_picture_of_the_teacher_records_what_it_depends_on(key, value):
    source = load_captioned_digits_source()
    data = DataShape.of("captioned_digits", source)
    config = tiny_text.get_config("flux")
    config.evaluation.system = "teacher"
    before = sample_prompts._settings(parse(config), data, 0)
    config.update_from_flattened_dict({key: value})
    after = sample_prompts._settings(parse(config), data, 0)
    assert before.keys() == after.keys() and before != after
    json.dumps(after)


@pytest.mark.slow
def test_official_weights_to_pictures_and_adapters(prepared, tmp_path):
    root, config = prepared
    data = DataShape.of("prompts", load_prompts_source(root / "cache"))
    module = teacher_network(parse(config).model, data)
    teacher = jax.jit(lambda: module.init(jax.random.key(0)))()
    config.teacher.weights = str(root / "teacher.safetensors")
    write_safetensors(config.teacher.weights, to_torch_state(module.module, teacher))
    vae = AutoencoderKL(channels=(32, 32, 32, 32), layers_per_block=1, latent_channels=16)
    params = jax.jit(vae.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    write_safetensors(root / "vae.safetensors", to_torch_state(vae, params))

    # Two shapes of batches, each with a program of its own.
    train(parse(config), tmp_path)
    checkpoint = tmp_path / "student" / "checkpoints" / "3"
    assert checkpoint.is_dir() and not (tmp_path / "teacher").exists()

    latents = sample(parse(config), tmp_path)
    assert [path.name for path in latents] == ["00000-0.npy", "00001-0.npy"]
    config.data.vae = str(root / "vae.safetensors")
    pictures = sample(parse(config), tmp_path)
    shapes = [np.load(path).shape for path in latents]
    for path, (height, width, _), prompt in zip(
        pictures, shapes, ("red fox 3", "red fox 0"), strict=True
    ):
        with Image.open(path) as image:
            assert image.size == (8 * width, 8 * height)
            assert image.text["prompt"] == prompt
            made = json.loads(image.text["piflow_jax"])
            assert (made["evaluation.nfe"], made["train.shift"], made["place"]) == (
                *(2, 3.2, int(path.stem.split("-")[0])),
            )
    assert shapes[0] != shapes[1]

    # The teacher's pictures of the same noise, for an evaluation to compare with.
    config.evaluation.system, config.evaluation.teacher_steps = "teacher", (1, 3)
    others = sample(parse(config), tmp_path)
    assert {path.parent.name for path in others} == {"teacher_samples"}
    with Image.open(others[0]) as image, Image.open(pictures[0]) as ours:
        assert json.loads(image.text["piflow_jax"])["evaluation.teacher_steps"] == 3
        assert image.size == ours.size and image.tobytes() != ours.tobytes()
    config.evaluation.system = "student"

    # What was exported samples as what was trained.
    files = export(parse(config), tmp_path)
    adapter = tmp_path / "adapter" / "diffusion_pytorch_model.safetensors"
    assert {adapter, adapter.with_name("config.json")} < set(files)
    weights = open_weights(adapter)
    assert json.loads(weights.metadata["policy_config"]) == {"type": "GMFlow"}
    assert "transformer_blocks.0.ff.net.2.lora_B.weight" in weights
    in_a_notebook(root, config, tmp_path, files, [np.load(path) for path in latents])
    config.data.vae, config.evaluation.weights = "", str(adapter)
    other = tmp_path / "other"
    other.mkdir()
    again = sample(parse(config), other)
    for one, two in zip(latents, again, strict=True):
        np.testing.assert_allclose(np.load(two), np.load(one), atol=1e-5)


def in_a_notebook(root, config, workdir, files, latents):
    """Every way to load the student samples what the command did."""
    told = load_prompts_source(root / "cache").embedded(["red fox 3", "red fox 0"])
    teacher = config.teacher.weights
    adapter = next(path for path in files if path.suffix == ".safetensors")
    with pytest.raises(ValueError, match="no teacher: pass teacher="):
        piflow_jax.load(workdir)
    with pytest.raises(ValueError, match="an adapter: pass teacher="):
        piflow_jax.load(adapter)
    for student in (
        piflow_jax.load(workdir, teacher=teacher),
        piflow_jax.load(adapter, teacher=teacher),
        piflow_jax.load(workdir / "student.safetensors"),
    ):
        for i, expected in enumerate(latents):
            found = student.sample(config.evaluation.seed, told, size=expected.shape[:2])
            np.testing.assert_allclose(found[i], expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "variant"),
    [
        *(("flux", "runlocal"), ("qwen_image", "runlocal")),
        *(("flux", "kontext_runlocal"), ("qwen_image", "edit_runlocal"), ("flux2", "runlocal")),
    ],
)
def test_the_miniature_beats_its_teacher_at_equal_evaluations(network, variant, tmp_path):
    """The endpoint error of the student is half its teacher's at most, by the command line."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "piflow_jax.main", f"--workdir={tmp_path}"),
            f"--config={root / 'configs' / network}.py:{variant}",
        ],
        cwd=root,
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    errors = {(row["system"], row["nfe"]): row["endpoint_mse"] for row in rows}
    assert 2 * errors["student", 4] <= errors["teacher", 4]
    student = piflow_jax.load(tmp_path)
    if student.network.conditioning.references:
        check_edits(student)


def check_edits(student):
    """Prompts are followed: drawn digits are nearer to the right ones than the references are."""
    source = load_edited_digits_source()
    examples = [source[index] for index in range(7, len(source), 89)]
    right = np.stack([example["x"] for example in examples])
    condition = stacked([example["condition"] for example in examples])
    drawn = student.sample(0, condition, size=right.shape[1:3])
    error = np.mean((drawn - right) ** 2)
    assert 2 * error < np.mean((condition["references"][0] - right) ** 2)
    assert 2 * error < right.var()
