"""Figures of pictures and prompts in closed form; features against those of `transformers`."""

import json
import shutil

import numpy as np
import pytest

from piflow_jax.evaluation.image_text import (
    clip_similarity,
    load_image_network,
    prompt_diversity,
)
from tests import released


def test_similarity_is_the_mean_cosine():
    images = np.array([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]])
    texts = np.array([[5.0, 0.0], [0.0, -1.0], [1.0, 0.0]])
    expected = (1 - 1 + np.sqrt(0.5)) / 3
    np.testing.assert_allclose(clip_similarity(images, texts), expected, rtol=1e-12)
    with pytest.raises(ValueError, match="3 pictures have 2 prompts"):
        clip_similarity(images, texts[:2])


def test_diversity_is_over_pairs_of_one_prompt():
    # Three prompts: a right angle and an opposite, the same twice, and one that does not count.
    features = np.array([[1.0, 0], [0, 4.0], [-2.0, 0], [3.0, 3.0], [1.0, 1.0], [0.0, 1.0]])
    places = [7, 7, 7, 2, 2, 5]
    expected = ((1 + 2 + 1) / 3 + 0) / 2
    np.testing.assert_allclose(prompt_diversity(features, places), expected, rtol=1e-12)
    rng = np.random.default_rng(0)
    features, places = rng.normal(size=(12, 5)), np.repeat([0, 1, 2], 4)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    means = []
    for place in range(3):
        members = unit[places == place]
        pairs = [1 - members[i] @ members[j] for i in range(4) for j in range(i)]
        means.append(np.mean(pairs))
    np.testing.assert_allclose(prompt_diversity(features, places), np.mean(means), rtol=1e-12)
    with pytest.raises(ValueError, match="no prompt has two pictures"):
        prompt_diversity(features, np.arange(12))
    with pytest.raises(ValueError, match="12 pictures have places"):
        prompt_diversity(features, [0, 0])


SETTINGS = {
    "size": {"shortest_edge": 16},
    "crop_size": {"height": 16, "width": 16},
    "image_mean": [0.4, 0.5, 0.6],
    "image_std": [0.2, 0.25, 0.3],
}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    import torch

    folder = tmp_path_factory.mktemp("clip")
    released.write_clip_tokenizer(folder)
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    size |= {"num_hidden_layers": 2}
    vocabulary = len(json.loads((folder / "vocab.json").read_text()))
    text = {**size, "vocab_size": vocabulary, "bos_token_id": vocabulary - 2}
    text["eos_token_id"] = vocabulary - 1
    vision = {**size, "image_size": 16, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    transformers.CLIPModel(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(SETTINGS))
    return folder


def images(count=3):
    rng = np.random.default_rng(3)
    return [rng.integers(0, 256, (16, 16, 3), np.uint8) for _ in range(count)]


def standardised(pictures):
    import torch

    pixels = np.stack(pictures).astype(np.float64) / 255
    pixels = (pixels - SETTINGS["image_mean"]) / SETTINGS["image_std"]
    return torch.from_numpy(np.moveaxis(pixels, -1, 1)).float()


def test_clip_features_give_the_logits_of_the_release(clip):
    import torch
    import transformers

    network = load_image_network(clip)
    assert network.reads_text and network.name.startswith("clip ")
    prompts = ["a red fox", "two tails " * 60, ""]
    found = network.image_features(images()) @ network.text_features(prompts).T
    peer = transformers.CLIPModel.from_pretrained(clip).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(clip)(
        prompts, padding=True, truncation=True, max_length=77, return_tensors="pt"
    )
    assert tokens.input_ids.shape == (3, 77)
    with torch.no_grad():
        logits = peer(**tokens, pixel_values=standardised(images())).logits_per_image
        scale = peer.logit_scale.exp()
    np.testing.assert_allclose(found, (logits / scale).numpy(), rtol=1e-4, atol=1e-5)
    assert np.ptp(found) > 1e-3


def test_pictures_are_scaled_by_the_shorter_side_and_cut(clip):
    network = load_image_network(clip)
    wide = np.zeros((32, 64, 3), np.uint8)
    wide[:, 16:48] = 200  # what the centre shows
    square = np.full((16, 16, 3), 200, np.uint8)
    inner = network.image_features([wide])
    np.testing.assert_allclose(inner, network.image_features([square]), atol=0.05)
    tall = np.ascontiguousarray(np.swapaxes(wide, 0, 1))
    np.testing.assert_allclose(network.image_features([tall]), inner, atol=0.05)


def test_dino_features_are_those_of_the_class_token(tmp_path):
    transformers = pytest.importorskip("transformers")
    import torch

    torch.manual_seed(1)
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    transformers.Dinov2Model(config).save_pretrained(tmp_path)
    settings = {**SETTINGS, "crop_size": 16, "size": {"height": 16, "width": 16}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    network = load_image_network(tmp_path)
    assert not network.reads_text
    peer = transformers.Dinov2Model.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = peer(pixel_values=standardised(images())).pooler_output.numpy()
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(network.image_features(images()), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="reads no text"):
        network.text_features(["x"])


def test_what_is_no_release_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder of an image network"):
        load_image_network(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"it has no config\.json"):
        load_image_network(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ValueError, match=r"it has no preprocessor_config\.json"):
        load_image_network(tmp_path)


def drop_a_weight(folder):
    from safetensors.numpy import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def settings(content):
    return lambda folder: (folder / "preprocessor_config.json").write_text(content)


# What is done to a release, and what is said of it.
SPOILT = {
    "a weight is missing": (
        drop_a_weight,
        "lacks 1 weights, the first is visual_projection.weight",
    ),
    "weights are cut short": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 99),
        "cannot be loaded as CLIPModel",
    ),
    "no kind": (lambda f: (f / "config.json").write_text("{}"), "does not say what model_type"),
    "settings cut short": (settings("{"), "is not of a released image network"),
    "settings of a list": (settings("[]"), "is not of a released image network"),
    "settings without a size": (settings("{}"), "is not of a released image network"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_spoilt_release_is_named(tmp_path, clip, case):
    spoil, message = SPOILT[case]
    folder = tmp_path / "release"
    shutil.copytree(clip, folder)
    spoil(folder)
    with pytest.raises(ValueError, match=message) as raised:
        load_image_network(folder)
    assert str(folder) in str(raised.value) and "\n" not in str(raised.value)
