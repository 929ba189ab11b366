"""The cached set: written, read by TFDS itself, refused when damaged; draws from it."""

import dataclasses
import json
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax.data import batches, shards
from piflow_jax.data.images import IMAGES, ImagesError, ImagesPlan
from piflow_jax.data.latents import (
    LATENTS,
    LatentsError,
    LatentsPlan,
    draw_latents,
    load_latents_source,
)

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
SHARDS = [f"latents-train.array_record-0000{i}-of-00003" for i in range(3)]


def example(index, plan=PLAN):
    rng = np.random.default_rng(index)
    shape = (2, *plan.latent_shape)
    return {
        "mean": rng.normal(size=shape).astype(plan.dtype),
        "std": np.exp(rng.normal(size=shape) - 5).astype(plan.dtype),
        "label": index % plan.num_classes,
        "key": f"n{index}/{index}.JPEG",
    }


def write(directory, plan=PLAN):
    LATENTS.start(directory, plan)
    for shard in LATENTS.missing(directory, plan):
        LATENTS.write(directory, plan, shard, (example(i, plan) for i in plan.shard_range(shard)))
    return LATENTS.finalize(directory)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_is_written_is_read(place, dtype):
    plan = dataclasses.replace(PLAN, dtype=dtype)
    write(place, plan)
    source = load_latents_source(place, expect_vae="abc", expect_scale=0.18215, expect_shift=0)
    assert (source.name, source.shape, source.num_classes) == ("latents", (4, 4, 2), 3)
    assert len(source) == 7 and sorted(p.name for p in place.glob("*-of-*")) == SHARDS
    for index in range(7):
        expected, found = example(index, plan), source[index]
        assert set(found["x"]) == {"mean", "std"}
        for name, moment in found["x"].items():
            assert moment.dtype == dtype
            np.testing.assert_array_equal(moment, expected[name])
        assert found["condition"] == expected["label"] and found["condition"].dtype == np.int32
        assert source.key(index) == expected["key"]


def test_tfds_reads_the_directory_by_path_and_by_name(tmp_path):
    import tensorflow_datasets as tfds

    directory = tmp_path / "latents" / "1.0.0"
    write(directory)
    by_path = tfds.builder_from_directory(directory).as_data_source(split="train")
    by_name = tfds.data_source("latents", split="train", data_dir=tmp_path)
    for found in (by_path, by_name):
        assert len(found) == 7
        for index in range(7):
            expected = example(index)
            np.testing.assert_array_equal(found[index]["mean"], expected["mean"])
            np.testing.assert_array_equal(found[index]["std"], expected["std"])
            assert found[index]["label"] == expected["label"]
            assert found[index]["key"].decode() == expected["key"]


def test_batches_cover_every_example_with_its_label(place):
    write(place)
    batch = next(batches(load_latents_source(place), batch_size=7, seed=0))
    moments, labels = batch["x"], batch["condition"]
    assert moments["mean"].shape == moments["std"].shape == (7, 2, 4, 4, 2)
    assert labels.dtype == np.int32
    order = [
        next(i for i in range(7) if np.array_equal(example(i)["mean"], mean))
        for mean in moments["mean"]
    ]
    assert sorted(order) == list(range(7)) != order
    np.testing.assert_array_equal(labels, np.array(order) % 3)


def test_the_manifest_tells_what_the_set_is(tmp_path):
    manifest = write(tmp_path)
    assert manifest == json.loads((tmp_path / "latents.json").read_text())
    shards = manifest.pop("shards")
    assert manifest == {"format": 1, **dataclasses.asdict(PLAN), "latent_shape": [4, 4, 2]}
    assert [shard["file"] for shard in shards] == SHARDS
    assert [shard["examples"] for shard in shards] == [3, 3, 1]
    import hashlib

    for shard in shards:
        data = (tmp_path / shard["file"]).read_bytes()
        assert shard["bytes"] == len(data)
        assert shard["sha256"] == hashlib.sha256(data).hexdigest()


@pytest.fixture
def finished(tmp_path):
    write(tmp_path)
    return tmp_path


def test_an_unfinished_set_is_refused(tmp_path):
    with pytest.raises(LatentsError, match=r"latents\.json is missing"):
        load_latents_source(tmp_path)
    with pytest.raises(LatentsError, match="no preparation was begun"):
        LATENTS.finalize(tmp_path)
    LATENTS.start(tmp_path, PLAN)
    LATENTS.write(tmp_path, PLAN, 1, map(example, PLAN.shard_range(1)))
    assert LATENTS.missing(tmp_path, PLAN) == [0, 2]
    with pytest.raises(LatentsError, match=f"{SHARDS[0]} was not written"):
        LATENTS.finalize(tmp_path)
    with pytest.raises(LatentsError, match=r"latents\.json is missing"):
        load_latents_source(tmp_path)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("stage", [load_latents_source, LATENTS.finalize])
def test_a_truncated_or_missing_shard_is_named(finished, stage, verify):
    def call():
        stage(finished, **({"verify": verify} if stage is load_latents_source else {}))

    path = finished / SHARDS[1]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(LatentsError, match=rf"{SHARDS[1]} has \d+ bytes, expected"):
        call()
    assert LATENTS.missing(finished, PLAN) == [1]
    path.unlink()
    with pytest.raises(LatentsError, match=f"{SHARDS[1]} is missing"):
        call()
    write(finished)
    call()


def test_a_wrong_count_is_found(finished):
    record = finished / "preparation" / "00001.json"
    record.write_text(record.read_text().replace('"examples": 3', '"examples": 2'))
    with pytest.raises(LatentsError, match=f"{SHARDS[1]} has 3 examples, expected 2"):
        LATENTS.finalize(finished)


@pytest.mark.parametrize("stage", [load_latents_source, LATENTS.finalize])
def test_a_flipped_bit_is_found(finished, stage):
    path = finished / SHARDS[2]
    data = bytearray(path.read_bytes())
    data[data.index(example(6)["std"].tobytes()) + 10] ^= 1
    path.write_bytes(data)
    with pytest.raises(LatentsError, match=f"{SHARDS[2]} differs from what was written"):
        stage(finished)


def test_a_flipped_bit_is_found_on_reading_when_checksums_are_not_compared(finished):
    path = finished / SHARDS[2]
    data = bytearray(path.read_bytes())
    data[data.index(example(6)["std"].tobytes()) + 10] ^= 1
    path.write_bytes(data)
    source = load_latents_source(finished, verify=False)
    np.testing.assert_array_equal(source[5]["x"]["mean"], example(5)["mean"])
    with pytest.raises(Exception, match="hash mismatch"):
        source[6]


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
def test_files_of_tfds_are_needed(finished, name):
    (finished / name).unlink()
    with pytest.raises(LatentsError, match=f"{name} is missing"):
        load_latents_source(finished)


@pytest.mark.parametrize(
    ("expectation", "message"),
    [
        ({"expect_vae": "xyz"}, "vae 'abc', but 'xyz'"),
        ({"expect_scale": 0.13025}, r"scale 0\.18215, but 0\.13025"),
        ({"expect_shift": 0.1159}, r"shift 0\.0, but 0\.1159"),
    ],
)
def test_another_autoencoder_or_scale_is_refused(finished, expectation, message):
    with pytest.raises(LatentsError, match=message):
        load_latents_source(finished, **expectation)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m: m.pop("format"), "has format None"),
        (lambda m: m.pop("vae"), "lacks or adds .'vae'"),
        (lambda m: m["shards"][1].pop("sha256"), f"does not have all of {SHARDS[1]}"),
        (lambda m: m["shards"].pop(), "lists shards of 6 of 7"),
        (
            lambda m: [m["shards"][i].update(examples=n) for i, n in ((0, 2), (1, 4))],
            r"dataset_info\.json contradicts",
        ),
    ],
)
def test_a_spoilt_manifest_is_refused(finished, spoil, message):
    path = finished / "latents.json"
    manifest = json.loads(path.read_text())
    spoil(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(LatentsError, match=message):
        load_latents_source(finished)
    path.write_text(path.read_text()[:50])
    with pytest.raises(LatentsError, match=r"latents\.json is damaged"):
        load_latents_source(finished)


def test_another_plan_in_the_same_directory_is_refused(finished):
    with pytest.raises(LatentsError, match="shard_size was 3, is 4; vae was 'abc', is 'xyz'"):
        LATENTS.start(finished, dataclasses.replace(PLAN, vae="xyz", shard_size=4))


def test_a_shard_with_the_wrong_latents_does_not_appear(tmp_path):
    LATENTS.start(tmp_path, PLAN)
    with pytest.raises(LatentsError, match="shard 0 has 3 latents, got 2"):
        LATENTS.write(tmp_path, PLAN, 0, map(example, range(2)))
    with pytest.raises(LatentsError, match=r"n1/1\.JPEG are not finite in float16"):
        spoilt = {**example(1), "std": np.full((2, 4, 4, 2), np.inf, np.float16)}
        LATENTS.write(tmp_path, PLAN, 0, [example(0), spoilt, example(2)])
    assert LATENTS.missing(tmp_path, PLAN) == [0, 1, 2] and not list(tmp_path.glob("*-of-*"))


def test_draws_have_the_moments_of_the_two_posteriors():
    count = 20_000
    mean = np.array([[[1.0, -2.0]], [[4.0, 3.0]]], np.float16)  # [flip, site, channel]
    std = np.array([[[0.5, 0.25]], [[2.0, 1.0]]], np.float16)
    shape = (count, *mean.shape)
    latents = jax.jit(draw_latents, static_argnums=(3, 4))(
        jax.random.key(0), np.broadcast_to(mean, shape), np.broadcast_to(std, shape), 0.2, 0.5
    )
    assert latents.shape == (count, 1, 2) and latents.dtype == jnp.float32
    mean, std = mean.astype(np.float64), std.astype(np.float64)
    expected = mean.mean(0)
    second = np.mean(std**2 + (mean - expected) ** 2, axis=0)
    raw = np.asarray(latents, np.float64) / 0.2 + 0.5
    np.testing.assert_allclose(raw.mean(0), expected, atol=5 * np.sqrt(second.max() / count))
    np.testing.assert_allclose(raw.var(0), second, rtol=0.05)
    # One coin for all sites and channels, and no correlation of the noise beyond it.
    between = np.prod((mean - expected)[:, 0], axis=-1).mean()
    np.testing.assert_allclose(np.cov(raw[:, 0].T)[0, 1], between, rtol=0.05)


def test_draws_without_spread_are_the_means_of_either_image():
    mean = np.stack([np.full((64, 2, 2, 3), 1.0), np.full((64, 2, 2, 3), -1.0)], axis=1)
    latents = np.asarray(draw_latents(jax.random.key(1), mean, np.zeros_like(mean)))
    np.testing.assert_allclose(np.abs(latents), 0.18215, rtol=1e-6)
    assert np.ptp(latents.reshape(64, -1), axis=1).max() == 0
    assert 16 < np.sum(latents[:, 0, 0, 0] > 0) < 48
    other = np.asarray(draw_latents(jax.random.key(2), mean, np.zeros_like(mean)))
    assert not np.array_equal(latents, other)


def encoded_at(moment, shard, calls):
    """A shard's examples; `moment(i)` is called before each."""
    for i in PLAN.shard_range(shard):
        calls.append(i)
        moment(i)
        yield example(i)


def test_two_preparations_at_once_do_not_harm_each_other(place):
    """A job started again while the old one is in the middle of a shard."""
    write(place / "alone")
    directory = place / "both"
    LATENTS.start(directory, PLAN)
    old, new = [], []

    def started_again(i):
        if i == 4:  # the old one has written an example of shard 1
            for shard in LATENTS.missing(directory, PLAN):
                LATENTS.write(directory, PLAN, shard, encoded_at(lambda _: None, shard, new))

    for shard in LATENTS.missing(directory, PLAN):
        LATENTS.write(directory, PLAN, shard, encoded_at(started_again, shard, old))
    # The new one finishes what the old one has begun; the old one then has nothing left to do.
    assert (old, new) == ([0, 1, 2, 3, 4, 5], [3, 4, 5, 6])
    LATENTS.finalize(directory)
    for name in SHARDS:
        assert (directory / name).read_bytes() == (place / "alone" / name).read_bytes()


def test_of_two_that_complete_a_shard_at_once_one_puts_it_in_its_place(tmp_path, monkeypatch):
    LATENTS.start(tmp_path, PLAN)
    digest, others = shards._digest, []

    def complete():
        LATENTS.write(tmp_path, PLAN, 0, encoded_at(lambda _: None, 0, []))

    def meanwhile(path):
        if not others:  # the first one has found that the shard is not there
            others.append(threading.Thread(target=complete))
            others[0].start()
            others[0].join(0.3)
        return digest(path)

    monkeypatch.setattr(shards, "_digest", meanwhile)
    complete()
    others[0].join()
    write(tmp_path)


def test_a_directory_of_another_kind_of_set_is_not_called_damaged(tmp_path):
    LATENTS.start(tmp_path, PLAN)
    plan = ImagesPlan(
        num_examples=7, shard_size=3, source="", class_names=("a",), image_size=8, channels=1
    )
    with pytest.raises(ImagesError, match=r"begun as another kind of set than images; remove it"):
        IMAGES.start(tmp_path, plan)


def test_what_a_killed_preparation_left_does_not_stay(tmp_path):
    tmp_path = tmp_path / "latents [1]"  # which would be a pattern
    LATENTS.start(tmp_path, PLAN)
    work = tmp_path / "preparation"
    left = [work / "00001.array_record", work / "00001.array_record.0f3a"]
    for path in left:
        path.write_bytes(b"half a shard")
    write(tmp_path)
    assert not [path.name for path in work.iterdir() if ".array_record" in path.name]
    load_latents_source(tmp_path, expect_vae="abc", expect_scale=0.18215, expect_shift=0)
