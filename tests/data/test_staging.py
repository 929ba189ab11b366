"""Data in a bucket: which shards a process copies, and what sets are made of and measured by."""

import errno
import hashlib
import io
import json
import os
import tarfile
import threading

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from PIL import Image

from piflow_jax.config import DataConfig
from piflow_jax.data import batches, staging
from piflow_jax.data.images import prepare_images
from piflow_jax.data.latents import LatentsError, load_latents_source
from piflow_jax.data.picture_sets import open_pictures
from piflow_jax.data.pictures import PictureError, PicturesError, read_picture
from piflow_jax.data.prompt_lists import Prompt, read_prompts
from piflow_jax.data.prompts import load_prompts_source
from piflow_jax.data.ranges import Ranges, record_of
from piflow_jax.data.shards import _WRITER_OPTIONS
from piflow_jax.data.text_encoders import WordEncoder
from piflow_jax.evaluation.adm_files import image_batches, read_reference, write_samples
from piflow_jax.evaluation.image_sets import open_images
from piflow_jax.modes import command
from piflow_jax.modes.prepare_prompts import encode_prompts
from piflow_jax.runs.workdir import user_path
from piflow_jax.systems.datasets import load_source
from piflow_jax.whole_files import copy_file
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


def shard_gib(shard):
    return (user_path(SET) / test_latents.SHARDS[shard]).stat().length / 2**30


@pytest.mark.parametrize("copied", [0, 1, 2])
def test_shards_without_room_are_read_where_they_lie(service, latents, copied):
    cap = sum(map(shard_gib, range(copied))) + 1e-9
    source = load_source(DataConfig(name="latents", data_dir=SET, local_cache_gib=cap))
    read = read_of(service)
    for index in (6, 6, 5, 2, 0, 3, 0):
        np.testing.assert_array_equal(source[index]["x"]["std"], test_latents.example(index)["std"])
    once = [shard for shard in range(3) if read.count(shard) == 1]
    assert once == list(range(copied))  # of the others index and record are read each time


def test_the_disk_is_not_filled(service, latents, monkeypatch):
    free = int(2**30 * (shard_gib(0) + shard_gib(1)) / 0.95)
    usage = lambda path: type("Usage", (), {"free": free})  # noqa: E731
    monkeypatch.setattr("piflow_jax.data.staging.shutil.disk_usage", usage)
    read = read_of(service)
    source = load_latents_source(latents, verify=False)
    assert [int(source[i]["condition"]) for i in (*range(7), *range(7))] == [
        i % 3 for i in (*range(7), *range(7))
    ]
    assert read.count(0) == 1 and read.count(1) > 6


@pytest.fixture
def disk_with(monkeypatch):
    """Sets the bytes that are free before the first copy; returns the list of the copies' files."""

    def disk(free):
        files, new = [], staging.tempfile.TemporaryFile

        def usage(path):
            taken = sum(os.fstat(file.fileno()).st_size for file in files)
            return type("Usage", (), {"free": free - taken})

        def made():
            files.append(new())
            return files[-1]

        monkeypatch.setattr(staging.shutil, "disk_usage", usage)
        monkeypatch.setattr(staging.tempfile, "TemporaryFile", made)
        return files

    return disk


def test_processes_of_a_host_do_not_fill_its_disk_together(service, latents, disk_with):
    """Each has room for two shards of three before the others have copied any."""
    files = disk_with(int(2**30 * (shard_gib(0) + shard_gib(1)) / 0.85))
    read = read_of(service)
    sources = [load_latents_source(latents, verify=False) for _ in range(3)]
    for source in sources:
        assert [int(source[i]["condition"]) for i in range(7)] == [i % 3 for i in range(7)]
    assert sum(os.fstat(file.fileno()).st_size > 0 for file in files) == 2
    assert read.count(0) > 3


def test_a_disk_that_others_fill_is_done_without(service, latents, monkeypatch):
    def full(file, start, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    source = load_latents_source(latents, verify=False)
    assert [int(source[i]["condition"]) for i in range(7)] == [i % 3 for i in range(7)]


def test_a_copy_that_is_tried_again_takes_its_space_once(tmp_path, disk_with):
    disk_with(150)
    content = bytes(100)
    shard = {"file": "a", "bytes": 100, "sha256": hashlib.sha256(content).hexdigest()}
    copies = staging.Staging(epath.Path(tmp_path), [shard], ValueError)
    with pytest.raises(ValueError, match="a is missing"):
        copies.wait(0)
    (tmp_path / "a").write_bytes(content)
    assert copies.wait(0) == set()


def test_records_of_any_length_are_cut_out_of_a_shard(service, tmp_path):
    """Headers of blocks, every 65,536 bytes, interrupt them at every place."""
    rng = np.random.default_rng(0)
    sizes = [0, 1, 70_000, 3, 200_000, 65_536, 65_495, 65_400, *rng.integers(0, 300, 900)]
    sizes += list(rng.integers(60_000, 140_000, 20))
    records = [rng.bytes(int(size)) for size in sizes]
    writer = ArrayRecordWriter(str(tmp_path / "shard"), _WRITER_OPTIONS)
    for record in records:
        writer.write(record)
    writer.close()
    copy_file(user_path(tmp_path) / "shard", user_path(SET) / "shard")
    shards = [{"file": "shard", "examples": len(records)}]
    ranges = Ranges(user_path(SET), shards, LatentsError)
    chunks = ranges.read([(0, i) for i in range(len(records))])
    assert [record_of(*chunk) for chunk in chunks] == records


def flipped(place):
    def flip(path):
        data = bytearray(path.read_bytes())
        data[place] ^= 0xFF
        path.write_bytes(bytes(data))

    return flip


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), "00001-of-00003 is missing"),
        (flipped(-65_536 + 24 + 40 + 10), "00001-of-00003 differs from what was written: its "),
        (lambda path: path.write_bytes(bytes(path.stat().length)), "00001-of-00003 differs from"),
        (flipped(64 + 8), "00001-of-00003 has a damaged record, the 3th of the set: .*prepare"),
    ],
)
def test_damage_is_named_without_a_copy(latents, spoil, message):
    source = load_latents_source(latents, verify=False, cache_gib=1e-9)
    spoil(latents / test_latents.SHARDS[1])
    with pytest.raises(LatentsError, match=f"{SET}/.*{message}"):
        source[3]
    with pytest.raises(LatentsError, match=f"{SET}/.*{message}"):
        next(batches(source, batch_size=7, seed=0))


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


@pytest.mark.parametrize("cap", [64.0, 1e-9])
@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_those_of_a_disk(place, tmp_path, kind, cap):
    """And what `like` says of them is so, where the set is larger than its copies may be too."""
    for directory in (place / "set", tmp_path / "other"):
        KINDS[kind](directory)
    here, there = (
        batches(load_source(config), batch_size=4, seed=1)
        for config in (
            DataConfig(name=kind, data_dir=str(tmp_path / "other")),
            DataConfig(name=kind, data_dir=str(place / "set"), local_cache_gib=cap),
        )
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


# --- What sets are made of ------------------------------------------------------------------------


@pytest.fixture
def pictures(place):
    """A folder of two classes."""
    root = place / "pictures"
    for name, shade in (("light", 200), ("dark", 20)):
        (root / name).mkdir(parents=True)
        for index in range(2):
            buffer = io.BytesIO()
            Image.new("RGB", (16, 16), (shade + index,) * 3).save(buffer, format="PNG")
            (root / name / f"{index}.png").write_bytes(buffer.getvalue())
    return root


def test_pictures_are_read_where_they_lie(pictures):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path in sorted(pictures.glob("*/*.png")):
            info = tarfile.TarInfo(f"x/{path.parent.name}/{path.name}")
            info.size = path.stat().length
            tar.addfile(info, io.BytesIO(path.read_bytes()))
    (pictures.parent / "x.tar").write_bytes(buffer.getvalue())
    for location in (pictures, pictures.parent / "x.tar"):
        found = open_pictures(str(location))
        assert found.class_names == ("dark", "light") and len(found) == 4
        read = [(int(p.image[0, 0, 0]), p.label, p.key) for p in map(found.__getitem__, range(4))]
        expected = [(20, 0, "dark/0.png"), (21, 0, "dark/1.png")]
        assert read == [*expected, (200, 1, "light/0.png"), (201, 1, "light/1.png")]
    folder = open_pictures(str(pictures))
    (pictures / "dark" / "1.png").unlink()
    with pytest.raises(PictureError, match=f"{pictures}/dark/1.png is not a readable image"):
        folder[1]
    with pytest.raises(PicturesError, match="neither a folder of images"):
        open_pictures(str(pictures / "dark" / "0.png"))
    with pytest.raises(FileNotFoundError, match="there is no such folder of images"):
        open_pictures(str(pictures / "grey"))


def test_lists_and_their_pictures_are_read_where_they_lie(pictures):
    pyarrow, parquet = map(pytest.importorskip, ("pyarrow", "pyarrow.parquet"))
    rows = [{"prompt": "fox", "image": "dark/0.png"}, {"prompt": "hen", "image": "light/1.png"}]
    (pictures / "a.txt").write_text("fox\nhen\n")
    (pictures / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    (pictures / "a.parquet").write_bytes(buffer.getvalue())
    for suffix in ("txt", "jsonl", "parquet"):
        listed = read_prompts(f"{pictures}/a.{suffix}")
        assert [prompt.text for prompt in listed] == ["fox", "hen"]
    assert [int(read_picture(*one.picture(pictures))[0, 0, 0]) for one in listed] == [20, 201]


def test_pictures_to_measure_and_references_lie_anywhere(place):
    folder, pixels = place / "samples", np.arange(4 * 2 * 2 * 3, dtype=np.uint8).reshape(4, 2, 2, 3)
    folder.mkdir(parents=True)
    for index, image in enumerate(pixels):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="PNG")
        (folder / f"{index}-0.png").write_bytes(buffer.getvalue())
    buffer = io.BytesIO()
    np.savez(buffer, images=pixels)
    (place / "samples.npz").write_bytes(buffer.getvalue())
    for location in (folder, place / "samples.npz"):
        images = open_images(location)
        np.testing.assert_array_equal([images[i] for i in range(4)], pixels)
        before = images.digest(range(4))
        assert before == open_images(location).digest(range(4)) != images.digest(range(3))
    write_samples(place / "batch.npz", [pixels], np.arange(4))
    reference = read_reference(place / "batch.npz")
    assert (reference.images, reference.pool) == (4, None)
    assert reference.digest == hashlib.sha256((place / "batch.npz").read_bytes()).hexdigest()
    np.testing.assert_array_equal(np.concatenate([*image_batches(place / "batch.npz", 3)]), pixels)
