"""The door of cached sets: what a damaged one says, with the path, whatever is wrong with it."""

import json
import shutil

import numpy as np
import pytest

from piflow_jax.data.latents import (
    LATENTS as SET,
)
from piflow_jax.data.latents import (
    LatentsPlan,
    load_latents_source,
)
from piflow_jax.data.prompt_lists import Prompt
from piflow_jax.data.prompts import load_prompts_source
from piflow_jax.data.shards import ShardsError
from piflow_jax.data.text_encoders import WordEncoder
from piflow_jax.modes.prepare_prompts import encode_prompts
from piflow_jax.systems.shapes import DataShape

PLAN = LatentsPlan(
    vae="abc",
    compute="float32",
    source="seven images",
    num_examples=7,
    num_classes=3,
    image_size=16,
    latent_shape=(4, 4, 2),
    shard_size=3,
)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A set of each kind."""
    root = tmp_path_factory.mktemp("sets")
    SET.start(root / "latents", PLAN)
    for shard in range(PLAN.num_shards):
        moments = {
            "mean": np.ones((2, 4, 4, 2), np.float16),
            "std": np.ones((2, 4, 4, 2), np.float16),
        }
        examples = ({**moments, "label": i % 3, "key": f"{i}"} for i in PLAN.shard_range(shard))
        SET.write(root / "latents", PLAN, shard, examples)
    SET.finalize(root / "latents")
    prompts = [Prompt(f"fox {i}", 1.0 + i % 2) for i in range(7)]
    encoder = WordEncoder(6, 4)
    encode_prompts(prompts, encoder, root / "prompts", source="x", image_size=64, shard_size=3)
    return root


LOAD = {"latents": load_latents_source, "prompts": load_prompts_source}


def use(kind, directory):
    """Opens a set and reads all of it."""
    source = LOAD[kind](directory, verify=False)
    DataShape.of(kind, source)
    for index in range(len(source)):
        source[index]
    if kind == "prompts":
        list(source.prompts)
        source.embedded(["fox 1"])


NO_LISTS = "prompts must be a list of texts, references as many lists of names"
WRONG_PROMPTS = {
    "one text": (("fox 1",), NO_LISTS),
    "one name": ((["fox 1"], "a.png"), NO_LISTS),
    "two of one": ((["fox 1"], [["a"], ["b"]]), NO_LISTS),
    "without it": (
        (["fox 1", "fox 2"], [[], ["a.png"]]),
        r"no embeddings of 'fox 2' with the references \['a.png'\]",
    ),
}


@pytest.mark.parametrize("case", WRONG_PROMPTS)
def test_prompts_that_a_set_cannot_give_are_named(sets, case):
    asked, words = WRONG_PROMPTS[case]
    with pytest.raises(ValueError, match=words):
        load_prompts_source(sets / "prompts", verify=False).embedded(*asked)


def changed(path, **entries):
    """Changes entries of a JSON file; `shard=` those of its second shard."""

    def spoil(directory):
        content = json.loads((directory / path).read_text())
        of_shard = entries.pop("shard", {})
        if of_shard:
            content["shards"][1] |= of_shard
        (directory / path).write_text(json.dumps(content | entries))

    return spoil


def written(path, content):
    return lambda directory: (directory / path).write_bytes(content)


def made_a_folder(path):
    def spoil(directory):
        (directory / path).unlink()
        (directory / path).mkdir()

    return spoil


def flipped(values):
    """Changes a bit in these bytes of the last shard."""

    def spoil(directory):
        path = max(directory.glob("*-of-*"))
        data = bytearray(path.read_bytes())
        data[data.index(values)] ^= 1
        path.write_bytes(data)

    return spoil


LATENTS, PROMPTS, TFDS = "latents.json", "prompts.json", "dataset_info.json"
# A kind of set, what is done to it, and what is said.
SPOILT = {
    "no JSON": ("latents", written(LATENTS, b"{"), "latents.json is damaged"),
    "no UTF-8": ("prompts", written(PROMPTS, b"\xff{}"), "prompts.json is damaged"),
    "no object": (
        "latents",
        written(LATENTS, b"[1]"),
        "latents.json is damaged: it has no object",
    ),
    "nesting": ("latents", written(LATENTS, b"[" * 99999), "latents.json is damaged"),
    "a folder": ("prompts", made_a_folder(PROMPTS), "prompts.json is damaged"),
    "a text for a number": (
        "latents",
        changed(LATENTS, num_classes="3"),
        "num_classes cannot be '3'",
    ),
    "true for a number": (
        "latents",
        changed(LATENTS, image_size=True),
        "image_size cannot be True",
    ),
    "no scale": ("latents", changed(LATENTS, scale=0), "have the scale 0"),
    "a scale beyond float32": (
        "latents",
        changed(LATENTS, scale=1e308),
        "have the scale 1e.308",
    ),
    "a scale too small": ("latents", changed(LATENTS, scale=1e-320), "have the scale 1e-320"),
    "a shift of no channel": ("latents", changed(LATENTS, shift=[]), "have the shift"),
    "a shift of three channels": (
        "latents",
        changed(LATENTS, shift=[0.0] * 3),
        "have the shift",
    ),
    "classes beyond 32 bits": (
        "latents",
        changed(LATENTS, num_classes=2**70),
        "num_classes must be at most 2,147,483,647",
    ),
    "negative channels": ("prompts", changed(PROMPTS, latent_channels=-1), "must not be negative"),
    "channels of nothing": (
        "prompts",
        changed(PROMPTS, latent_channels=3),
        "3 channels of latents by ''",
    ),
    "a negative width": ("prompts", changed(PROMPTS, pooled_features=-1), "must not be negative"),
    "pooled embeddings of another width": (
        "prompts",
        changed(PROMPTS, pooled_features=5),
        "damaged record",
    ),
    "pooled embeddings left out": (
        "prompts",
        changed(PROMPTS, pooled_features=0),
        "damaged record",
    ),
    "texts beyond the longest": (
        "prompts",
        changed(PROMPTS, shard={"text_length": 2**70}),
        "prompts.json is damaged: texts of 1180591620717411303424 tokens",
    ),
    "a scale of NaN": ("latents", changed(LATENTS, scale=float("nan")), "scale cannot be nan"),
    "a scale of text": ("latents", changed(LATENTS, scale="x"), "scale cannot be 'x'"),
    "another type": ("latents", changed(LATENTS, dtype="int8"), "dtype must be one of"),
    "a shape of one side": (
        "latents",
        changed(LATENTS, latent_shape=[4]),
        "latent_shape cannot be",
    ),
    "a shape of nothing": (
        "latents",
        changed(LATENTS, latent_shape=None),
        "latent_shape cannot be",
    ),
    "shards of nothing": ("prompts", changed(PROMPTS, shards=None), "shards cannot be None"),
    "a shard of text": ("prompts", changed(PROMPTS, shards=["x"]), "'x' is no object"),
    "a shard elsewhere": (
        "latents",
        changed(LATENTS, shard={"file": "../x"}),
        "names a shard outside of its directory",
    ),
    "a length of text": (
        "latents",
        changed(LATENTS, shard={"bytes": "x"}),
        "bytes cannot be 'x'",
    ),
    "refused pictures of text": (
        "latents",
        changed(LATENTS, shard={"refused": ["x"]}),
        "'x' is no object",
    ),
    "a note of text": (
        "prompts",
        changed(PROMPTS, shard={"text_length": "x"}),
        "text_length cannot",
    ),
    "buckets of one side": ("prompts", changed(PROMPTS, buckets=[[8], [8]]), "buckets cannot be"),
    "negative buckets": (
        "prompts",
        changed(PROMPTS, buckets=[[8, -8], [8, 8]]),
        "buckets must be positive",
    ),
    "buckets that do not add up": (
        "prompts",
        changed(PROMPTS, bucket_sizes=[3, 3]),
        "are not 8 ex",
    ),
    "texts of another width": ("prompts", changed(PROMPTS, text_features=5), "damaged record"),
    "TFDS's file cut short": ("latents", written(TFDS, b"{"), "has a damaged dataset_info.json"),
    "TFDS's file of others": ("latents", changed(TFDS, other=1), "has a damaged dataset_info.json"),
    "TFDS's types": ("latents", written("features.json", b"[]"), "has a damaged dataset_info.json"),
    "a flipped bit in a record": (
        "latents",
        flipped(b"\x00\x3c" * 8),
        "has a damaged record, the 6th",
    ),
    "a flipped bit in a prompt": ("prompts", flipped(b"fox"), "has a damaged record"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_damaged_set_is_named(tmp_path, sets, case):
    kind, spoil, message = SPOILT[case]
    directory = tmp_path / "set"
    shutil.copytree(sets / kind, directory)
    use(kind, directory)
    spoil(directory)
    with pytest.raises(ShardsError, match=message) as raised:
        use(kind, directory)
    assert str(directory) in str(raised.value) and "\n" not in str(raised.value)


RECORD = "preparation/00001.json"
# What is done to a preparation, and what is said when it goes on.
UNDER_WAY = {
    "a plan cut short": (written("preparation/plan.json", b"{"), "plan.json is damaged"),
    "a plan of text": (
        changed("preparation/plan.json", shard_size="3"),
        "shard_size cannot be '3'",
    ),
    "a plan that lacks": (written("preparation/plan.json", b"{}"), "plan.json is damaged"),
    "a record cut short": (written(RECORD, b"{"), "00001.json is damaged"),
    "a record that lacks": (
        written(RECORD, b"{}"),
        "00001.json is damaged: examples cannot be None",
    ),
    "a record of text": (changed(RECORD, bytes="x"), "00001.json is damaged: bytes cannot be 'x'"),
}


@pytest.mark.parametrize("case", UNDER_WAY)
def test_a_damaged_preparation_is_named(tmp_path, sets, case):
    spoil, message = UNDER_WAY[case]
    directory = tmp_path / "set"
    shutil.copytree(sets / "latents", directory)
    spoil(directory)
    with pytest.raises(ShardsError, match=message) as raised:
        SET.start(directory, PLAN)
        SET.finalize(directory)
    assert str(directory) in str(raised.value)


def test_latents_are_read_as_the_manifest_says(tmp_path, sets):
    """TFDS's own description of the set, which others may read, is not believed."""
    directory = tmp_path / "set"
    shutil.copytree(sets / "latents", directory)
    features = (directory / "features.json").read_text()
    (directory / "features.json").write_text(features.replace("float16", "int16"))
    source = load_latents_source(directory)
    assert source[0]["x"]["mean"].dtype == "float16" and (source[0]["x"]["mean"] == 1).all()


def test_a_set_is_not_made_in_another_store(tmp_path, monkeypatch):
    """A directory `s3:` would be made here."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ShardsError, match="s3://b/x has the unknown scheme s3://; name a local"):
        SET.start("s3://b/x", PLAN)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["file/set", "file"])
def test_a_directory_that_cannot_be_made_is_named(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(ShardsError, match=r"cannot be made \(.*take another directory") as raised:
        SET.start(tmp_path / name, PLAN)
    assert str(tmp_path / name) in str(raised.value)
