"""Text encoders against the pipelines of `diffusers`, with tiny networks in official formats."""

import shutil

import numpy as np
import pytest

from piflow_jax.data import text_encoders
from piflow_jax.data.released_encoders import compute
from piflow_jax.data.text_encoders import WordEncoder, load_text_encoder
from tests import released

PROMPTS = ["a red fox", "", "two tails in the snow, two tails in the snow " * 40]


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    pytest.importorskip("transformers")
    return released.write_flux(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    pytest.importorskip("transformers")
    return released.write_qwen(tmp_path_factory.mktemp("qwen"))


def test_flux_encodes_as_its_pipeline(flux):
    diffusers = pytest.importorskip("diffusers")
    import transformers

    encoder = load_text_encoder(str(flux), max_length=64, dtype="float32")
    assert (encoder.text_features, encoder.pooled_features, encoder.max_length) == (24, 16, 64)
    found = encoder(PROMPTS)
    pipeline = diffusers.FluxPipeline(
        scheduler=None,
        vae=None,
        transformer=None,
        tokenizer=transformers.AutoTokenizer.from_pretrained(flux / "tokenizer"),
        text_encoder=transformers.CLIPTextModel.from_pretrained(flux / "text_encoder"),
        tokenizer_2=transformers.AutoTokenizer.from_pretrained(flux / "tokenizer_2"),
        text_encoder_2=transformers.T5EncoderModel.from_pretrained(flux / "text_encoder_2"),
    )
    text, pooled, _ = pipeline.encode_prompt(PROMPTS, None, max_sequence_length=64)
    for i, example in enumerate(found):
        assert example["text"].shape == (64, 24) and example["text"].dtype == np.float32
        np.testing.assert_allclose(example["text"], text[i].detach(), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(example["pooled"], pooled[i].detach(), rtol=1e-5, atol=1e-6)
    # All of its length belongs to a prompt, whatever else is in its batch.
    alone = encoder(PROMPTS[:1])[0]["text"]
    assert alone.shape == (64, 24)
    np.testing.assert_allclose(alone, text[0].detach(), rtol=1e-5, atol=1e-6)
    # Padding is not nothing, and depends on the prompt.
    assert np.abs(found[0]["text"][-1] - found[1]["text"][-1]).max() > 1e-3


def test_qwen_encodes_as_its_pipeline(qwen):
    diffusers = pytest.importorskip("diffusers")
    import transformers

    encoder = load_text_encoder(str(qwen), dtype="float32")
    assert (encoder.text_features, encoder.pooled_features, encoder.max_length) == (32, 0, 1024)
    found = encoder(PROMPTS)
    pipeline = diffusers.QwenImagePipeline(
        scheduler=None,
        vae=None,
        transformer=None,
        tokenizer=transformers.AutoTokenizer.from_pretrained(qwen / "tokenizer"),
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
            qwen / "text_encoder"
        ),
    )
    text, mask = pipeline.encode_prompt(PROMPTS, max_sequence_length=1024)
    lengths = mask.sum(1).tolist()
    assert lengths[0] < 1024 and lengths[2] == 1024  # a token a letter here; the last is cut off
    for i, example in enumerate(found):
        assert example["text"].shape == (lengths[i], 32)
        expected = text[i, : lengths[i]].detach()
        np.testing.assert_allclose(example["text"], expected, rtol=1e-4, atol=1e-5)
    # A prompt's embedding does not depend on the others of its batch, and a shorter limit cuts.
    alone = encoder(PROMPTS[:1])[0]["text"]
    np.testing.assert_allclose(alone, found[0]["text"], rtol=1e-4, atol=1e-5)
    short = load_text_encoder(str(qwen), max_length=200, dtype="float32")(PROMPTS[2:])[0]["text"]
    np.testing.assert_allclose(short, found[2]["text"][:200], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("klein", [False, True], ids=["dev", "klein"])
def test_flux2_encodes_as_its_pipelines(klein, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    folder = released.write_flux2(tmp_path, klein)
    encoder = load_text_encoder(str(folder), dtype="float32")
    assert (encoder.text_features, encoder.pooled_features, encoder.max_length) == (24, 0, 512)
    tokens = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    if klein:
        network = transformers.Qwen3ForCausalLM.from_pretrained(folder / "text_encoder")
        embed = diffusers.Flux2KleinPipeline._get_qwen3_prompt_embeds
    else:
        network = transformers.Mistral3ForConditionalGeneration.from_pretrained(
            folder / "text_encoder"
        )
        embed = diffusers.Flux2Pipeline._get_mistral_3_small_prompt_embeds
    prompts = [*PROMPTS, "a [IMG] fox"]
    for length in (512, 300):  # a token a letter here; the third prompt is cut off
        encoder = load_text_encoder(str(folder), max_length=length, dtype="float32")
        text = embed(network, tokens, prompts, max_sequence_length=length).detach()
        found = encoder(prompts)
        for i, example in enumerate(found):
            assert example["text"].shape == (length, 24) and example["text"].dtype == np.float32
            np.testing.assert_allclose(example["text"], text[i], rtol=1e-5, atol=1e-6)
    counts = encoder.tokens(prompts)
    assert [lost > 0 for _, lost in counts] == [False, False, True, False]
    assert all(len(ids) <= 300 for ids, _ in counts)
    assert np.abs(found[0]["text"] - found[3]["text"]).max() > 1e-2
    with pytest.raises(ValueError, match=r"has 20 layers, and FLUX\.2 reads number"):
        load_text_encoder(str(released.write_flux2(tmp_path / "few", klein, layers=20)))
    settings = folder / "tokenizer" / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace('"chat_template"', '"other"'))
    with pytest.raises(ValueError, match="has no chat template"):
        load_text_encoder(str(folder))


def processor_of(transformers, folder):
    """The processor of texts and pictures; that of `transformers` needs torchvision for videos."""
    kind = transformers.Qwen2_5_VLProcessor
    processor = object.__new__(kind)
    processor.image_processor = transformers.AutoImageProcessor.from_pretrained(
        folder / "processor"
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    processor.image_token = "<|image_pad|>"

    def process(text, images, padding, return_tensors):
        seen = processor.image_processor(images=images, return_tensors=return_tensors)
        [text] = text
        for i in range(len(seen.image_grid_thw)):
            tokens = kind.replace_image_token(processor, seen, i).replace("<|image", "<|an image")
            text = text.replace(processor.image_token, tokens, 1)
        text = text.replace("<|an image", "<|image")
        tokens = tokenizer(text, return_tensors=return_tensors, padding=padding)
        return transformers.BatchFeature({**tokens, **seen})

    return process


@pytest.mark.parametrize("name", ["QwenImageEditPipeline", "QwenImageEditPlusPipeline"])
def test_an_editor_encodes_as_its_pipeline(name, tmp_path, monkeypatch):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    import transformers
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus
    from PIL import Image

    pictured, side = text_encoders._EDITORS[name]
    if "Plus" in name:
        assert side**2 == plus.CONDITION_IMAGE_SIZE
    monkeypatch.setitem(text_encoders._EDITORS, name, (pictured, 64))
    folder = released.write_qwen_edit(tmp_path, name)
    encoder = load_text_encoder(str(folder), dtype="float32")
    assert encoder.sees_references and encoder.max_length == 4096
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (*size, 3), np.uint8) for size in ((40, 80), (90, 60))]
    pictures = pictures[: 2 if "Plus" in name else 1]
    kind = transformers.Qwen2_5_VLForConditionalGeneration
    network = kind.from_pretrained(folder / "text_encoder")
    forward, pad = network.forward, network.config.image_token_id

    def typed(**inputs):  # as transformers 5 needs it, and its own processor adds it
        return forward(**inputs, mm_token_type_ids=(inputs["input_ids"] == pad).int())

    monkeypatch.setattr(network, "forward", typed)
    pipeline = getattr(diffusers, name)(
        scheduler=None,
        vae=None,
        transformer=None,
        tokenizer=None,
        processor=processor_of(transformers, folder),
        text_encoder=network,
    )
    seen = []
    for pixels in pictures:
        width, height = plus.calculate_dimensions(64 * 64, pixels.shape[1] / pixels.shape[0])
        seen.append(pipeline.image_processor.resize(Image.fromarray(pixels), height, width))
    seen = seen if "Plus" in name else seen[0]
    for prompt in ("a red fox", ""):
        with torch.no_grad():
            text, _ = pipeline._get_qwen_prompt_embeds(prompt, seen)
        [found] = encoder([prompt], [pictures])
        np.testing.assert_allclose(found["text"], text[0], rtol=1e-4, atol=1e-5)
        [(tokens, lost)] = encoder.tokens([prompt], [[pixels.shape[:2] for pixels in pictures]])
        assert (len(tokens), lost) == (len(text[0]), 0)
    # Another picture is another embedding, and without any it is that of the template alone.
    [other] = encoder([""], [[255 - pixels for pixels in pictures]])
    assert np.abs(other["text"] - found["text"]).max() > 1e-3
    [alone], [again] = encoder([""]), encoder([""], [[]])
    np.testing.assert_allclose(alone["text"], again["text"], rtol=1e-4, atol=1e-5)
    (folder / "model_index.json").write_text('{"_class_name": "QwenImagePipeline"}')
    with pytest.raises(
        ValueError, match=r"model_index\.json names 'QwenImagePipeline', not one of"
    ):
        load_text_encoder(str(folder))


def test_identity_is_of_weights_tokenizer_and_length(flux):
    def identity(length=32):
        return load_text_encoder(str(flux), max_length=length, dtype="float32").identity

    first = identity()
    assert identity() == first != identity(33)
    path = flux / "tokenizer_2" / "tokenizer_config.json"
    before = path.read_text()
    path.write_text(before + " ")
    assert identity() != first
    path.write_text(before)
    assert identity() == first


@pytest.mark.parametrize("kind", ["flux", "qwen", "words"])
def test_tokens_are_those_that_are_encoded(kind, request):
    """A prompt's tokens say what its embedding is, and what of it is lost."""
    folder = kind if kind == "words" else str(request.getfixturevalue(kind))
    encoder = load_text_encoder(folder, max_length=8, dtype="float32")
    whole = "a red fox in the snow with two tails"
    prompts = [whole, f"{whole} {whole}", "fox", ""]
    found = encoder.tokens(prompts)
    assert found[0][1] > 0 and found[1][1] > found[0][1]
    if kind != "qwen":  # its letters are tokens, and the template's end belongs to the prompt
        assert [lost for _, lost in found[2:]] == [0, 0]
    embeddings = encoder(prompts)
    for i, j in ((0, 1), (0, 2), (2, 3)):
        same_tokens = found[i][0] == found[j][0]
        first, second = (embeddings[place] for place in (i, j))
        same = all(
            first[name].shape == second[name].shape
            and np.allclose(first[name], second[name], atol=1e-5)
            for name in first
        )
        assert same_tokens == same


def test_the_tokenizer_is_recorded_by_what_it_does(flux, monkeypatch):
    first = load_text_encoder(str(flux), max_length=32, dtype="float32")
    assert "CLIPTokenizer" in first.tokenizer
    # Another version's, which puts Chinese characters apart as transformers 4 did.
    import transformers

    tokenize = transformers.CLIPTokenizer.__call__

    def apart(self, texts, **options):
        texts = ["".join(f" {c} " if c >= "\u4e00" else c for c in text) for text in texts]
        return tokenize(self, texts, **options)

    monkeypatch.setattr(transformers.CLIPTokenizer, "__call__", apart)
    second = load_text_encoder(str(flux), max_length=32, dtype="float32")
    assert first.identity == second.identity and first.tokenizer != second.tokenizer


def drop_a_weight(folder):
    from safetensors.numpy import load_file, save_file

    path = folder / "text_encoder_2" / "model.safetensors"
    weights = load_file(path)
    del weights["encoder.block.0.layer.0.SelfAttention.k.weight"]
    save_file(weights, path, {"format": "pt"})


# What is done to a release, and what is said of it: its folder, and what is wrong.
SPOILT = {
    "a weight is missing": (drop_a_weight, "text_encoder_2 lacks 1 weights, the first is encoder"),
    "weights are damaged": (
        lambda folder: (folder / "text_encoder_2" / "model.safetensors").write_bytes(b"x" * 99),
        "text_encoder_2 cannot be loaded as T5EncoderModel",
    ),
    "weights are missing": (
        lambda folder: (folder / "text_encoder" / "model.safetensors").unlink(),
        "text_encoder cannot be loaded as CLIPTextModel",
    ),
    "a tokenizer is missing": (
        lambda folder: shutil.rmtree(folder / "tokenizer"),
        "tokenizer: there is no such folder",
    ),
    "a tokenizer is damaged": (
        lambda folder: (folder / "tokenizer_2" / "tokenizer.json").write_text("{"),
        "tokenizer_2 cannot be loaded as AutoTokenizer",
    ),
    "settings are cut short": (
        lambda folder: (folder / "text_encoder" / "config.json").write_text("{"),
        r"config\.json does not say what model_type",
    ),
    "settings are a list": (
        lambda folder: (folder / "text_encoder" / "config.json").write_text("[]"),
        r"config\.json does not say what model_type",
    ),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_spoilt_release_is_named(tmp_path, flux, case):
    spoil, message = SPOILT[case]
    folder = tmp_path / "release"
    shutil.copytree(flux, folder)
    spoil(folder)
    with pytest.raises(ValueError, match=message) as raised:
        load_text_encoder(str(folder), dtype="float32")
    assert str(folder) in str(raised.value) and "\n" not in str(raised.value)


def test_what_is_no_release_is_refused(tmp_path, flux):
    with pytest.raises(FileNotFoundError, match="no such folder of text encoders"):
        load_text_encoder(str(tmp_path / "absent"))
    with pytest.raises(ValueError, match=r"it has no text_encoder/config\.json"):
        load_text_encoder(str(tmp_path))
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="not 'bert'"):
        load_text_encoder(str(tmp_path))
    with pytest.raises(ValueError, match="takes 512 tokens at most, not 513"):
        load_text_encoder(str(flux), max_length=513)


@pytest.mark.parametrize(("gpus", "device"), [(4, "cuda:3"), (0, "cpu")])
def test_a_release_goes_to_the_gpu_that_is_named(tmp_path, monkeypatch, gpus, device):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    made = []
    kind = lambda folder, **options: made.append(options)  # noqa: E731
    monkeypatch.setattr(text_encoders, "_kind", lambda folder: (kind, 512))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    load_text_encoder(str(tmp_path), gpu=3)
    assert made == [{"max_length": 512, "dtype": "bfloat16", "device": device}]


def test_the_record_is_the_same_for_every_gpu():
    """Processes with a GPU each make one set, whose plan has it."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    made = {compute("float32", f"cuda:{gpu}") for gpu in range(3)}
    assert made == {compute("float32", "cuda")}
    assert made != {compute("float32", "cpu")}


def test_hashed_words_are_fixed_and_tell_order():
    encoder = load_text_encoder("words:16:8", max_length=5)
    assert (encoder.text_features, encoder.pooled_features, encoder.max_length) == (16, 8, 5)
    first, other, again, cut = encoder(["red fox", "fox red", "Red  FOX", "a b c d e f g"])
    empty = WordEncoder(16, 8, 5)([""])[0]
    assert first["text"].shape == (3, 16) and empty["text"].shape == (1, 16)
    assert cut["text"].shape == (5, 16) and first["pooled"].shape == (8,)
    np.testing.assert_array_equal(first["text"], again["text"])
    np.testing.assert_allclose(first["pooled"], other["pooled"], rtol=1e-6)
    assert np.abs(first["text"][1:] - other["text"][1:]).max() > 0.1
    # For ever: a cached set and a trained miniature depend on these numbers.
    recorded = [0.8649042, 1.0636530, -0.2651313]
    np.testing.assert_allclose(empty["pooled"][:3], recorded, rtol=1e-6)
    many = WordEncoder(64, 64, 2000)([" ".join(map(str, range(1500)))])[0]["text"]
    np.testing.assert_allclose(many.std(), np.sqrt(1.25), rtol=0.02)
    np.testing.assert_allclose(many.mean(), 0, atol=0.02)


@pytest.mark.parametrize("name", ["words:x", "words:0", "words:1:2:3"])
def test_sizes_of_words_are_checked(name):
    with pytest.raises(ValueError, match="is not like 'words:64:32'"):
        load_text_encoder(name)
