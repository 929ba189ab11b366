"""Sets in a bucket: which shards a process copies, when, how many, and what it says of others."""

import threading

import numpy as np
import pytest

from piflow_jax.config import DataConfig
from piflow_jax.data import batches
from piflow_jax.data.images import prepare_images
from piflow_jax.data.latents import LatentsError, load_latents_source
from piflow_jax.data.prompt_lists import Prompt
from piflow_jax.data.prompts import load_prompts_source
from piflow_jax.data.text_encoders import WordEncoder
from piflow_jax.modes import command
from piflow_jax.modes.prepare_prompts import encode_prompts
from piflow_jax.runs.workdir import user_path
from piflow_jax.systems.datasets import load_source
from tests import tiny
from tests.data import test_images, test_latents

SET = "gs://bucket/set"


@pytest.fixture
def latents(service):
    test_latents.write(user_path(SET))
    return user_path(SET)


def read_of(service):
    """Shards that are read from now on, in order; each name once for its bytes."""
    read = []

    def see(name):
        if ".array_record" in name:
            read.append(int(name[-14:-9]))

    service.read = see
    return read


def test_only_shards_of_records_that_are_read_are_copied(service, latents):
    source = load_latents_source(latents, verify=False)
    read = read_of(service)
    for index in (6, 6, 0):
        np.testing.assert_array_equal(
            source[index]["x"]["mean"], test_latents.example(index)["mean"]
        )
    assert read == [2, 0]
    assert [e["condition"] for e in (source[5], source[1])] == [5 % 3, 1]
    assert read == [2, 0, 1]


def test_training_has_each_copied_once(service, latents):
    read = read_of(service)
    data = batches(load_latents_source(latents, verify=False), batch_size=3, seed=0)
    seen = np.concatenate([next(data)["condition"] for _ in range(7)])
    assert sorted(seen) == sorted(np.arange(21) % 7 % 3)
    assert sorted(read) == [0, 1, 2]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), "00001-of-00003 is missing"),
        (lambda path: path.write_bytes(bytes(path.stat().length)), "differs from what was written"),
        (lambda path: path.write_bytes(b"x"), "00001-of-00003 has 1 bytes, expected"),
    ],
)
@pytest.mark.parametrize("verify", [False, True])
def test_a_damaged_shard_is_named(latents, spoil, message, verify):
    spoil(latents / test_latents.SHARDS[1])
    with pytest.raises(LatentsError, match=f"{SET}/.*{message}"):
        load_latents_source(latents, verify=verify)[3]


def test_the_others_are_copied_before_they_are_wanted(service, latents):
    read, all_read = read_of(service), threading.Event()
    see = service.read
    service.read = lambda name: (see(name), len(read) == 3 and all_read.set())
    data = batches(load_latents_source(latents, verify=False), batch_size=3, seed=0)
    assert all_read.wait(30)
    next(data)
    assert sorted(read) == [0, 1, 2]


def test_a_set_that_is_too_large_for_the_disk_is_refused(latents, monkeypatch):
    assert len(load_latents_source(latents, cache_gib=1)) == 7
    with pytest.raises(LatentsError, match="local_cache_gib = 1e-08 allows no more"):
        settings = DataConfig(name="latents", data_dir=SET, local_cache_gib=1e-8)
        load_source(settings)
    usage = lambda path: type("Usage", (), {"free": 10})  # noqa: E731
    monkeypatch.setattr("piflow_jax.data.staging.shutil.disk_usage", usage)
    with pytest.raises(LatentsError, match="set TMPDIR to a larger disk"):
        load_latents_source(latents)


def test_what_is_refused_for_the_moment_is_read_all_the_same(service, latents):
    service.refuse_every = 5
    source = load_latents_source(latents, verify=False)
    assert [int(source[i]["condition"]) for i in range(7)] == [i % 3 for i in range(7)]


def prompts(directory):
    listed = [Prompt(f"fox {i}", 1.0 + i % 2) for i in range(7)]
    encode_prompts(listed, WordEncoder(6, 4), directory, source="x", image_size=64, shard_size=3)


KINDS = {
    "latents": test_latents.write,
    "images": lambda to: prepare_images(to, test_images.PLAN, test_images.Pictures()),
    "prompts": prompts,
}


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_those_of_a_disk(place, tmp_path, kind):
    """And what `like` says of them is so."""
    for directory in (place / "set", tmp_path / "other"):
        KINDS[kind](directory)
    here, there = (
        batches(load_source(DataConfig(name=kind, data_dir=str(path))), batch_size=4, seed=1)
        for path in (tmp_path / "other", place / "set")
    )
    for _ in range(5):
        like, one, other = here.like(), next(here), next(there)
        assert shapes(like) == shapes(one) == shapes(other)
        assert values(one) == values(other)


def leaves(tree, name=""):
    if isinstance(tree, dict):
        return [leaf for key in sorted(tree) for leaf in leaves(tree[key], f"{name}.{key}")]
    return [(name, np.asarray(tree))]


def shapes(tree):
    return [(name, leaf.shape, leaf.dtype) for name, leaf in leaves(tree)]


def values(tree):
    return [(name, leaf.tobytes()) for name, leaf in leaves(tree)]


def test_prompts_are_found_by_reading_no_more_than_it_takes(service):
    prompts(SET)
    source = load_prompts_source(SET, verify=False)
    read = read_of(service)
    assert source.find(["fox 0"]) == [0] and read == [0]


def test_a_preparation_in_no_bucket_is_one_sentence(service, capfd):
    config = tiny.get_config()
    config.data.update({"name": "images", "images": "x", "data_dir": "gs://other/set"})
    assert command.run("prepare", config, SET) == 1
    said = capfd.readouterr().err
    assert "there is no bucket gs://other; create it, or name another config.data.data_dir" in said
    assert len(said.splitlines()) == 1
