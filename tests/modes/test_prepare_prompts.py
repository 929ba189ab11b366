"""Lists of prompts to cached embeddings: killed, resumed, shared by processes; with images too."""

import json
import sys
from types import SimpleNamespace

import einops
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from PIL import Image

from piflow_jax.config import ConfigError, base_config, parse
from piflow_jax.data import batches
from piflow_jax.data.parquet_rows import EmbeddedPicture
from piflow_jax.data.prompt_lists import Prompt
from piflow_jax.data.prompts import PromptsError, load_prompts_source
from piflow_jax.data.text_encoders import WordEncoder
from piflow_jax.modes import run
from piflow_jax.modes.autoencoder import Autoencoder
from piflow_jax.modes.command import MODES
from piflow_jax.modes.prepare_prompts import encode_prompts, prepare_prompts
from tests import released

ASPECTS = [1.0, 16 / 9, 1.0, 0.5, 16 / 9, 1.0, 1.02]
PROMPTS = [Prompt(f"{'very ' * i}red fox {i}", aspect) for i, aspect in enumerate(ASPECTS)]
SETTINGS = {"source": "foxes", "image_size": 64, "shard_size": 3, "batch_size": 2}
ENCODER = WordEncoder(6, 4)
# Squares, then 16:9, then 1:2; each in the order of the list; then the empty prompt.
ORDER = [0, 2, 5, 6, 1, 4, 3]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    progress = []
    manifest = encode_prompts(
        PROMPTS, ENCODER, directory, **SETTINGS, on_progress=lambda *now: progress.append(now)
    )
    assert progress == [(1, 3), (2, 3), (3, 3)]
    assert manifest["encoder"] == ENCODER.identity
    return directory


def test_prompts_are_encoded_bucket_by_bucket(whole):
    source = load_prompts_source(whole)
    assert source.buckets == ((8, 8), (6, 10), (12, 6)) and source.bucket_sizes == (4, 2, 1)
    assert source.text_length == 10 and (source.text_features, source.pooled_features) == (6, 4)
    assert [int(source[i]["index"]) for i in range(7)] == ORDER
    for i, place in enumerate(ORDER):
        assert source.prompts[i] == PROMPTS[place].text
        expected = ENCODER([PROMPTS[place].text])[0]
        length = 3 + 1 + place
        assert source[i]["condition"]["text_length"] == length == len(expected["text"])
        found = source[i]["condition"]["text"][:length]
        np.testing.assert_array_equal(found, released.rounded(expected["text"]))
        np.testing.assert_array_equal(
            source[i]["condition"]["pooled"], released.rounded(expected["pooled"])
        )
    null = ENCODER([""])[0]
    assert source.null["text_length"] == 1
    np.testing.assert_array_equal(source.null["text"][:1], released.rounded(null["text"]))
    sizes = {next(batches(source, batch_size=2, seed=i))["x"].shape for i in range(12)}
    assert sizes <= {(2, 8, 8, 0), (2, 6, 10, 0), (2, 12, 6, 0)} and len(sizes) > 1


def contents(directory):
    return {p.relative_to(directory): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_a_killed_preparation_goes_on(whole, tmp_path):
    class Killed(Exception):
        pass

    class Dying(WordEncoder):
        calls = 0

        def __call__(self, prompts):
            self.calls += 1
            if self.calls == 4:  # within the second shard
                raise Killed
            return super().__call__(prompts)

    with pytest.raises(Killed):
        encode_prompts(PROMPTS, Dying(6, 4), tmp_path, **SETTINGS)
    with pytest.raises(PromptsError, match=r"prompts\.json is missing"):
        load_prompts_source(tmp_path)
    progress = []
    encode_prompts(
        PROMPTS, ENCODER, tmp_path, **SETTINGS, on_progress=lambda *now: progress.append(now)
    )
    assert progress == [(1, 2), (2, 2)]
    assert contents(tmp_path) == contents(whole)


def test_processes_share_the_work(whole, tmp_path):
    def part(index):
        return encode_prompts(
            PROMPTS, ENCODER, tmp_path, **SETTINGS, process_index=index, process_count=2
        )

    assert part(1) is None
    assert part(0) == json.loads((whole / "prompts.json").read_text())
    assert contents(tmp_path) == contents(whole)
    with pytest.raises(ValueError, match=r"process_index must lie in \[0, 2\)"):
        part(2)


def test_another_list_or_encoder_is_refused(whole):
    with pytest.raises(PromptsError, match="begun differently: source was"):
        encode_prompts([Prompt("x"), *PROMPTS[1:]], ENCODER, whole, **SETTINGS)
    with pytest.raises(PromptsError, match="begun differently: encoder was"):
        encode_prompts(PROMPTS, WordEncoder(6, 4, 50), whole, **SETTINGS)


class Pooling(nn.Module):
    """Stands for an autoencoder: means of 8x8 pixels, a variance of 0.04."""

    latent_channels = 2
    downsampling = 8

    def encode(self, image):
        mean = einops.reduce(image[..., :2], "b (h p) (w q) c -> b h w c", "mean", p=8, q=8)
        return mean, jnp.full_like(mean, np.log(0.04))

    def scaled(self, latents):
        return (latents - 0.25) * 0.5


def test_images_become_latents_of_their_bucket(tmp_path):
    autoencoder = Autoencoder(Pooling(), {}, "identity of the autoencoder")
    rng = np.random.default_rng(0)
    prompts = []
    for i, prompt in enumerate(PROMPTS[:3]):
        pixels = np.broadcast_to(rng.integers(0, 256, 3, np.uint8), (150, 200, 3))
        Image.fromarray(np.ascontiguousarray(pixels)).save(tmp_path / f"{i}.png")
        prompts.append(Prompt(prompt.text, prompt.aspect, f"{i}.png"))
    directory = tmp_path / "set"
    manifest = encode_prompts(
        prompts,
        ENCODER,
        directory,
        **SETTINGS,
        autoencoder=autoencoder,
        image_folder=tmp_path,
    )
    assert manifest["latents"] == "identity of the autoencoder"
    source = load_prompts_source(directory)
    assert source.latent_channels == 2
    for i, place in enumerate([0, 2, 1]):
        height, width = source[i]["x"].shape[:2]
        pixel = np.asarray(Image.open(tmp_path / prompts[place].image))[0, 0]
        raw = source[i]["x"].astype(np.float32) / 0.5 + 0.25
        noise = (raw - (pixel[:2] / 127.5 - 1)) / 0.2
        assert raw.shape == (height, width, 2)
        # A sample of the posterior: standard normal noise, another for each image.
        assert abs(noise.mean()) < 0.4 and 0.8 < noise.std() < 1.2
    with pytest.raises(ValueError, match="number 1 has none"):
        encode_prompts(
            [prompts[0], PROMPTS[1]], ENCODER, tmp_path / "b", **SETTINGS, autoencoder=autoencoder
        )


@pytest.mark.parametrize("aspect", [1.0, 2.0])  # of the latter, the picture is looked at first
def test_damaged_pictures_of_a_list_are_named(tmp_path, aspect):
    class Damaged:
        path = "list.parquet"

        def content(self, row):
            raise ValueError(f"list.parquet, row {row} is damaged")

    prompts = [Prompt("a", aspect, EmbeddedPicture(Damaged(), 3))]
    autoencoder = Autoencoder(Pooling(), {}, "identity of the autoencoder")
    with pytest.raises(
        ConfigError, match=r"config\.data\.prompts: list\.parquet, row 3 is damaged"
    ):
        encode_prompts(prompts, ENCODER, tmp_path, **SETTINGS, autoencoder=autoencoder)


def config(tmp_path, **data):
    made = base_config()
    made.data.name = "prompts"
    made.model.network = "flux"
    made.model.flux.rope_axes = (8, 4, 4)
    made.data.prompts = str(tmp_path / "list.jsonl")
    made.data.text_encoder = "words:6:4"
    made.data.data_dir = str(tmp_path / "set")
    made.data.image_size = 64
    made.data.update(data)
    return made


def test_the_mode_prepares_and_the_source_is_loaded_by_name(tmp_path):
    entries = [{"prompt": p.text, "aspect": f"{p.aspect}:1"} for p in PROMPTS]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, entries)))
    MODES["prepare"].run(parse(config(tmp_path)), tmp_path)
    source = load_prompts_source(tmp_path / "set")
    assert len(source) == 7 and source.manifest["source"].startswith("list.jsonl, SHA-256 ")


@pytest.mark.parametrize(("platform", "gpu"), [("gpu", 2), ("cpu", 0)])
def test_each_process_encodes_on_its_own_gpu(tmp_path, monkeypatch, platform, gpu):
    device = SimpleNamespace(platform=platform, local_hardware_id=2)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    asked = []

    def load(name, **options):
        asked.append(options["gpu"])
        return ENCODER

    stage = sys.modules[prepare_prompts.__module__]
    monkeypatch.setattr(stage, "load_text_encoder", load)
    (tmp_path / "list.jsonl").write_text('{"prompt": "x"}')
    prepare_prompts(parse(config(tmp_path)), tmp_path)
    assert asked == [gpu]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"prompts": ""}, r"needs config\.data\.prompts"),
        ({"text_encoder": ""}, r"needs config\.data\.text_encoder"),
        ({"data_dir": ""}, r"needs config\.data\.data_dir"),
        ({"prompts": "list.csv"}, r"config\.data\.prompts: list\.csv is no list"),
        ({"text_encoder": "words:x"}, r"config\.data\.text_encoder.* is not like"),
    ],
)
def test_missing_or_wrong_keys_are_named(tmp_path, data, message):
    (tmp_path / "list.jsonl").write_text('{"prompt": "x"}')
    with pytest.raises(ConfigError, match=message):
        prepare_prompts(parse(config(tmp_path, **data)), tmp_path)


def test_an_error_is_a_sentence_on_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("piflow_jax.modes.command._start", lambda *_: None)
    (tmp_path / "list.jsonl").write_text('{"prompt": "x"}\n{"text": "x"}')
    assert run("prepare", config(tmp_path), tmp_path) == 2
    assert "line 2 has no text under 'prompt'" in capsys.readouterr().err
