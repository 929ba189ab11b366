"""Editing from the command line: lists with references, cached pairs, a run, its pictures."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from piflow_jax.config import ConfigError, parse
from piflow_jax.convert import open_weights, to_torch_state, write_safetensors
from piflow_jax.data import batches
from piflow_jax.data.prompt_lists import Prompt, read_prompts
from piflow_jax.data.prompts import PromptsError, load_prompts_source
from piflow_jax.data.reference_sizes import (
    flux2_scale,
    flux2_size,
    kontext_size,
    qwen_edit_size,
)
from piflow_jax.data.text_encoders import WordEncoder
from piflow_jax.models.vae import AutoencoderKL, picture_encoder
from piflow_jax.modes import run
from piflow_jax.modes.autoencoder import load_autoencoder
from piflow_jax.modes.prepare_prompts import (
    _count_cut_off,
    encode_prompts,
    prepare_prompts,
)
from piflow_jax.modes.sample import sample
from piflow_jax.modes.train import train
from piflow_jax.systems.networks import teacher_network
from piflow_jax.systems.shapes import DataShape
from tests import released, tiny_text

# Height and width of pictures, and their sizes as references of FLUX.1 at a side of 64.
SIZES = {"wide.png": (90, 180), "tall.png": (200, 150), "square.png": (40, 40)}
AT_64 = {"wide.png": (48, 96), "tall.png": (80, 48), "square.png": (64, 64)}
ENTRIES = [
    {"prompt": "make it red", "references": ["wide.png"]},
    {"prompt": "join them", "references": ["wide.png", "tall.png"], "aspect": "1:1"},
    {"prompt": "make it red", "references": "square.png"},
    {"prompt": "a red fox"},
    {"prompt": "make it red", "references": ["tall.png"], "height": 90, "width": 180},
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Pictures, their autoencoder, and a list."""
    root = tmp_path_factory.mktemp("editing")
    rng = np.random.default_rng(0)
    for name, size in SIZES.items():
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(root / name)
    vae = AutoencoderKL(
        channels=(4,) * 4, layers_per_block=1, latent_channels=4, norm_groups=2, latent_scale=0.5
    )
    params = jax.jit(vae.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    (root / "vae").mkdir()
    write_safetensors(root / "vae" / "vae.safetensors", to_torch_state(vae, params))
    (root / "vae" / "config.json").write_text('{"scaling_factor": 0.5, "norm_num_groups": 2}')
    write_list(root, ENTRIES)
    return root, picture_encoder(vae, params)


def write_list(folder, entries, name="list.jsonl"):
    (folder / name).write_text("\n".join(map(json.dumps, entries)))


def config(root, references=2, **data):
    made = tiny_text.get_config("flux")
    made.model.flux.references = references
    made.data.name = "prompts"
    made.data.update(
        {
            "prompts": str(root / "list.jsonl"),
            "text_encoder": "words:12:10",
            "data_dir": str(root / "set"),
            "image_size": 64,
            "vae": str(root / "vae"),
        }
        | data
    )
    made.train.batch_size, made.train.steps, made.evaluation.batch_size = 2, 2, 2
    return made


@pytest.fixture(scope="module")
def prepared(root):
    folder, encode = root
    prepare_prompts(parse(config(folder)), folder)
    return folder, encode, load_prompts_source(folder / "set")


def test_references_become_latents_of_their_own_size(prepared):
    folder, encode, source = prepared
    assert len(source) == 5 and source.references == 2 and source.latent_channels == 0
    found = {int(source[i]["index"]): (i, source[i]) for i in range(5)}
    for place, entry in enumerate(ENTRIES):
        index, example = found[place]
        names = entry.get("references", [])
        names = [names] if isinstance(names, str) else names
        assert source.reference_names(index) == tuple(names)
        references = example["condition"].get("references", ())
        assert len(references) == len(names)
        for name, latents in zip(names, references, strict=True):
            height, width = AT_64[name]
            assert latents.shape == (height // 8, width // 8, 4) and latents.dtype == np.float16
            picture = Image.open(folder / name).resize((width, height), Image.Resampling.LANCZOS)
            image = np.asarray(picture, np.float32)[None] / 127.5 - 1
            np.testing.assert_allclose(latents, encode(image)[0], atol=2e-3)
    # Without a shape in the list, that of the last reference; without references, a square.
    shapes = [found[place][1]["x"].shape[:2] for place in range(5)]
    assert shapes == [(6, 12), (8, 8), (8, 8), (8, 8), (6, 12)]


def test_references_of_flux2_are_cut_and_not_stretched(root):
    """As its pipelines do, with a square of 64 where these have one of 1,024."""
    pytest.importorskip("diffusers")
    from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor

    folder, encode = root
    options = {"source": "list", "image_size": 64, "image_folder": folder}
    options |= {"reference_size": flux2_size, "reference_scale": flux2_scale}
    prompts = read_prompts(folder / "list.jsonl")
    autoencoder = load_autoencoder(parse(config(folder)))
    encoder = WordEncoder(12, 10)
    encode_prompts(prompts, encoder, folder / "cut", autoencoder=autoencoder, **options)
    source, processor = load_prompts_source(folder / "cut"), Flux2ImageProcessor()
    for i in range(len(source)):
        names, condition = source.reference_names(i), source[i]["condition"]
        for name, latents in zip(names, condition.get("references", ()), strict=True):
            picture = processor._resize_if_exceeds_area(Image.open(folder / name), 64 * 64)
            width, height = (side - side % 16 for side in picture.size)
            cut = processor._resize_and_crop(picture, width, height)
            image = np.asarray(cut, np.float32)[None] / 127.5 - 1
            np.testing.assert_allclose(latents, encode(image)[0], atol=2e-3)
    assert flux2_size(1024, 1000, 1024) == (1024, 992) and flux2_size(3, 9, 64) == (16, 16)


@pytest.mark.parametrize(
    ("picture", "words"),
    [
        (np.zeros((1, 16, 16, 3), np.uint8), r"images must be about \[-1, 1\], got uint8"),
        (np.zeros((16, 16, 3)), r"images must be \[B, H, W, 3\] in \[-1, 1\], got \[16, 16, 3\]"),
        (np.zeros((1, 16, 16, 1)), r"\[B, H, W, 3\] .* got \[1, 16, 16, 1\]"),
        (np.zeros((1, 16, 16, 4)), r"\[B, H, W, 3\] .* got \[1, 16, 16, 4\]"),
    ],
    ids=["pixels", "no batch", "grey", "alpha"],
)
def test_pictures_that_have_no_latents_are_refused(root, picture, words):
    with pytest.raises(ValueError, match=words):
        root[1](picture)


def test_a_batch_has_references_of_one_size(prepared):
    *_, source = prepared
    seen = set()
    for seed in range(12):
        batch = next(batches(source, batch_size=2, seed=seed))
        references = batch["condition"].get("references", ())
        seen.add((batch["x"].shape, *(reference.shape for reference in references)))
    assert ((2, 8, 8, 0), (2, 6, 12, 4), (2, 10, 6, 4)) in seen and len(seen) > 2


def test_a_prompt_is_found_with_its_references(prepared):
    *_, source = prepared
    one = source.embedded(["make it red"], [["tall.png"]])
    assert [r.shape for r in one["references"]] == [(1, 10, 6, 4)]
    again = source.embedded(["make it red"], ["tall.png"])
    np.testing.assert_array_equal(again["references"][0], one["references"][0])
    two = source.embedded(["make it red"] * 2, [["wide.png"]] * 2)
    assert [r.shape for r in two["references"]] == [(2, 6, 12, 4)]
    with pytest.raises(PromptsError, match="no embeddings of 'make it red'"):
        source.embedded(["make it red"], [["other.png"]])
    with pytest.raises(PromptsError, match=r"differ in number or size.*one size at a time"):
        source.embedded(["make it red", "join them"])


class Seeing(WordEncoder):
    """Hashed words, moved by the mean of the pictures that the prompt edits.

    A picture takes the place of four words.
    """

    sees_references = True

    def tokens(self, prompts, sizes=None):
        sizes = [()] * len(prompts) if sizes is None else sizes
        pairs = zip(sizes, prompts, strict=True)
        return super().tokens(["picture " * 4 * len(own) + prompt for own, prompt in pairs])

    def __call__(self, prompts, pictures=None):
        made = super().__call__(prompts)
        for one, seen in zip(made, pictures or [], strict=pictures is not None):
            one["text"] = one["text"] + sum(float(pixels.mean()) for pixels in seen) / 100
        return made


def test_pictures_count_among_the_tokens_of_a_prompt():
    prompts = [Prompt("make it red", references=("a.png",)), Prompt("make it blue")]
    sizes = [[(8, 8)], []]
    assert _count_cut_off(prompts, Seeing(12, 10, 8), sizes) == 0
    assert _count_cut_off(prompts, Seeing(12, 10, 6), sizes) == 1
    with pytest.raises(ConfigError, match=r"text_length: the references of prompt number 0.*raise"):
        _count_cut_off(prompts, Seeing(12, 10, 5), sizes)


PAIRS = [
    {"prompt": "make it red", "references": ["wide.png"], "image": "square.png"},
    {"prompt": "join them all", "references": ["square.png", "tall.png"], "image": "wide.png"},
    {"prompt": "make it red", "references": ["wide.png"], "image": "tall.png"},
]


@pytest.fixture(scope="module")
def pairs(root):
    folder, _ = root
    write_list(folder, PAIRS, "pairs.jsonl")
    autoencoder = load_autoencoder(parse(config(folder)))
    options = {"source": "pairs", "image_size": 64, "reference_size": qwen_edit_size}
    prompts = read_prompts(folder / "pairs.jsonl")
    encoder = Seeing(12, 10)
    encode_prompts(
        prompts,
        encoder,
        folder / "pairs",
        **options,
        autoencoder=autoencoder,
        image_folder=folder,
    )
    return folder, encoder, load_prompts_source(folder / "pairs")


def test_pairs_have_the_result_and_the_empty_prompt_of_their_references(pairs):
    folder, encoder, source = pairs
    assert source.latent_channels == 4 and source.references == 2
    for i in range(3):
        example = source[i]
        entry = PAIRS[int(example["index"])]
        pictures = [np.asarray(Image.open(folder / name)) for name in entry["references"]]
        # The result has the shape of the last reference, here the nearest of the buckets.
        assert example["x"].dtype == np.float16 and example["x"].shape[-1] == 4
        condition = example["condition"]
        for told, prompt in ((condition, entry["prompt"]), (condition["null"], "")):
            [expected] = encoder([prompt], [pictures])
            length = len(expected["text"])
            assert told["text_length"] == length
            found = told["text"][:length]
            np.testing.assert_array_equal(found, released.rounded(expected["text"]))
    # The prompts alone are those without pictures.
    np.testing.assert_array_equal(
        source.null["text"][:1], released.rounded(encoder([""])[0]["text"])
    )


@pytest.mark.slow
def test_a_student_trains_on_cached_pairs(pairs, tmp_path):
    """By a guided teacher, whose unguided half has each example's own empty prompt."""
    folder, _, source = pairs
    made = config(folder)
    made.model = tiny_text.get_config("qwen_image").model
    made.model.qwen_image.references = 2
    made.data.data_dir = str(folder / "pairs")
    made.teacher.guidance_scale, made.train.data_free = 3.0, False
    data = DataShape.of("prompts", source)
    module = teacher_network(parse(made).model, data)
    made.teacher.weights = str(tmp_path / "teacher.safetensors")
    teacher = jax.jit(lambda: module.init(jax.random.key(0)))()
    write_safetensors(made.teacher.weights, to_torch_state(module.module, teacher))
    train(parse(made), tmp_path)
    assert (tmp_path / "student" / "checkpoints" / "2").is_dir()


# Settings and the list's entries, and what is said of them.
WRONG = {
    "more than the network takes": (
        {"references": 1},
        ENTRIES,
        r"config\.model\.flux\.references is 1, but prompt number 1 of .*list\.jsonl.* has 2",
    ),
    "a network of text to image": (
        {"references": 0},
        ENTRIES,
        r"config\.model\.flux\.references is 0, but prompt number 0 .*configuration for editing",
    ),
    "no autoencoder": (
        {"vae": ""},
        ENTRIES,
        r"'references', which become latents: config\.data\.vae",
    ),
    "a missing picture": (
        {},
        [{"prompt": "a", "references": ["none.png"]}],
        r"none\.png is not a readable image: No such file.*\n.*refused: replace them",
    ),
    "no picture": (
        {},
        [{"prompt": "a", "references": ["vae/config.json"]}],
        r"config\.json is not a readable image.*\n.*refused",
    ),
    "some have images": (
        {},
        [{"prompt": "a", "references": ["wide.png"], "image": "tall.png"}, {"prompt": "b"}],
        "not all of .* has an 'image'",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_references_are_a_sentence(root, tmp_path, case, capsys, monkeypatch):
    monkeypatch.setattr("piflow_jax.modes.command._start", lambda *_: None)
    settings, entries, message = WRONG[case]
    for path in root[0].iterdir():
        if path.name not in ("set", "list.jsonl"):
            (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    write_list(tmp_path, entries)
    assert run("prepare", config(tmp_path, **settings), tmp_path) in (1, 2)
    import re

    said = capsys.readouterr().err
    assert re.search(message, said), said
    assert "Traceback" not in said


def of_flux2(folder):
    """The same with FLUX.2: its own set, and an autoencoder with statistics of patches."""
    rng, patches = np.random.default_rng(1), 4 * 2 * 2
    state = {name: np.asarray(array) for name, array in open_weights(folder / "vae").items()}
    state["bn.running_mean"] = rng.normal(size=patches).astype(np.float32)
    state["bn.running_var"] = rng.uniform(0.5, 2, patches).astype(np.float32)
    shutil.copytree(folder / "vae", folder / "vae2")
    write_safetensors(folder / "vae2" / "vae.safetensors", state)
    made = config(folder, data_dir=str(folder / "set2"), vae=str(folder / "vae2"))
    made.model = tiny_text.get_config("flux2").model
    made.model.flux2.references = 2
    prepare_prompts(parse(made), folder)
    return made, load_prompts_source(folder / "set2")


@pytest.mark.slow
@pytest.mark.parametrize("network", ["flux", "flux2"])
def test_a_student_of_edits_samples_from_the_command_line(prepared, tmp_path, network):
    folder, _, source = prepared
    made = config(folder)
    if network == "flux2":
        made, source = of_flux2(folder)
    data = DataShape.of("prompts", source)
    assert data.references == 2 and data.channels == 4
    module = teacher_network(parse(made).model, data)
    made.teacher.weights = str(tmp_path / "teacher.safetensors")
    teacher = jax.jit(lambda: module.init(jax.random.key(0)))()
    write_safetensors(made.teacher.weights, to_torch_state(module.module, teacher))
    train(parse(made), tmp_path)
    write_list(folder, ENTRIES[::-1], "other.jsonl")
    made.data.prompts = str(folder / "other.jsonl")
    paths = sample(parse(made), tmp_path)
    assert [path.name for path in paths] == [f"0000{i}-0.png" for i in range(5)]
    for path, entry in zip(paths, ENTRIES[::-1], strict=True):
        with Image.open(path) as image:
            settings = json.loads(image.text["piflow_jax"])
            assert image.text["prompt"] == entry["prompt"]
        names = entry.get("references", [])
        assert settings.get("references", []) == ([names] if isinstance(names, str) else names)
        assert settings["model.references"] == 2
    made.model[network].references = 1
    with pytest.raises(ValueError, match=r"references is 1, but .* up to 2 reference images"):
        sample(parse(made), tmp_path)


@pytest.mark.parametrize("size", [(512, 512), (300, 1000), (1000, 300), (768, 1024), (901, 700)])
def test_sizes_are_those_of_the_pipelines(size):
    pytest.importorskip("diffusers")
    from diffusers.pipelines.flux import pipeline_flux_kontext as kontext
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as qwen

    height, width = size
    _, *theirs = min(
        (abs(width / height - w / h), w, h) for w, h in kontext.PREFERRED_KONTEXT_RESOLUTIONS
    )
    assert kontext_size(height, width, 1024) == tuple(theirs[::-1])
    assert sorted(kontext.PREFERRED_KONTEXT_RESOLUTIONS) == sorted(
        {kontext_size(h, w, 1024)[::-1] for w, h in kontext.PREFERRED_KONTEXT_RESOLUTIONS}
    )
    for side in (1024, 384):
        theirs = qwen.calculate_dimensions(side * side, width / height)
        assert qwen_edit_size(height, width, side) == theirs[::-1]
