"""The sharded set of pixels: what is written is what is read, whole, in parts and mirrored."""

import contextlib
import dataclasses
import os
import resource

import jax
import numpy as np
import pytest

from piflow_jax.config import DataConfig
from piflow_jax.data.images import (
    ImagesError,
    ImagesPlan,
    load_images_source,
    mirrored,
    plan_images,
    prepare_images,
)
from piflow_jax.data.picture_sets import LabelledPicture
from piflow_jax.data.pictures import PictureError
from piflow_jax.data.shards import RefusedError
from piflow_jax.systems.datasets import DATASETS

PIXELS = np.random.default_rng(0).integers(0, 256, (7, 4, 4, 3), np.uint8)
LABELS = np.arange(7) % 2


class Pictures:
    """Pictures of noise, of which one is broken if that is wanted."""

    class_names, description = ("even", "odd"), "noise"

    def __init__(self, pixels=PIXELS, broken=None):
        self.pixels, self.broken = pixels, broken

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        if index == self.broken:
            raise PictureError(f"{index}.png", "it is empty")
        return LabelledPicture(self.pixels[index], index % 2, f"{index}.png")


PLAN = ImagesPlan(
    num_examples=7,
    shard_size=3,
    source="noise",
    class_names=("even", "odd"),
    image_size=4,
    channels=3,
)


@pytest.fixture
def directory(tmp_path):
    assert prepare_images(tmp_path, PLAN, Pictures())["num_examples"] == 7
    return tmp_path


def test_examples_are_the_pixels_that_were_written(directory):
    source = DATASETS["images"].load(DataConfig(name="images", data_dir=str(directory)))
    assert (len(source), source.shape, source.num_classes) == (7, (4, 4, 3), 2)
    expected = PIXELS.astype(np.float64) / 127.5 - 1
    batch = source.gather(np.arange(7))
    np.testing.assert_allclose(batch["x"], expected, atol=1e-6)
    np.testing.assert_array_equal(batch["condition"], LABELS)
    example = source[5]
    np.testing.assert_allclose(example["x"], expected[5], atol=1e-6)
    assert example["condition"] == 1 and example["x"].dtype == np.float32


def test_a_preparation_is_shared_by_processes_and_goes_on(place):
    assert prepare_images(place, PLAN, Pictures(), process_index=1, process_count=2) is None
    with pytest.raises(ImagesError, match=str(place)):
        load_images_source(place)
    assert prepare_images(place, PLAN, Pictures()) is not None
    np.testing.assert_array_equal(
        load_images_source(place).gather(np.arange(7))["condition"], LABELS
    )


def test_a_damaged_shard_is_named(directory):
    shard = sorted(directory.glob("images.array_record-*"))[1]
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(ImagesError, match=shard.name):
        load_images_source(directory)


def test_a_damaged_record_is_named_when_it_is_read(directory):
    shard = sorted(directory.glob("images.array_record-*"))[1]
    content = bytearray(shard.read_bytes())
    place = content.index(PIXELS[4].tobytes())
    content[place] ^= 1
    shard.write_bytes(bytes(content))
    with pytest.raises(ImagesError, match=f"{shard}.* has a damaged record, the 4th of the set"):
        load_images_source(directory, verify=False)


def test_a_broken_picture_is_named_or_left_out(tmp_path):
    with pytest.raises(RefusedError, match=r"4\.png is not a readable image: it is empty"):
        prepare_images(tmp_path, PLAN, Pictures(broken=4))
    manifest = prepare_images(tmp_path, PLAN, Pictures(broken=4), skip_refused=True)
    assert manifest["shards"][1]["refused"][0]["picture"] == "4.png"
    np.testing.assert_array_equal(
        load_images_source(tmp_path).gather(np.arange(6))["condition"], np.delete(LABELS, 4)
    )


GREY = np.repeat(PIXELS[..., :1], 3, axis=-1)
ONE_WITH_COLOURS = np.concatenate([GREY[:6], PIXELS[:1]])


@pytest.mark.parametrize(
    ("pixels", "wanted", "broken", "channels"),
    [
        (PIXELS, 0, None, 3),
        (GREY, 0, None, 1),
        (GREY, 3, None, 3),
        (PIXELS, 1, None, 1),
        (ONE_WITH_COLOURS, 0, None, 3),
        (ONE_WITH_COLOURS, 0, 6, 1),
    ],
)
def test_grey_or_colours_are_those_of_the_pictures_or_as_wanted(pixels, wanted, broken, channels):
    plan = plan_images(Pictures(pixels, broken), image_size=4, channels=wanted)
    assert plan.channels == channels


def test_colours_become_grey_by_their_luma(tmp_path):
    plan = dataclasses.replace(PLAN, channels=1)
    prepare_images(tmp_path, plan, Pictures())
    source = load_images_source(tmp_path)
    assert source.shape == (4, 4, 1)
    luma = PIXELS @ np.array([0.299, 0.587, 0.114])
    found = (source.gather(np.arange(7))["x"][..., 0] + 1) * 127.5
    assert np.abs(found - luma).max() < 0.51


def test_shards_of_large_images_have_fewer(tmp_path):
    assert plan_images(Pictures(), image_size=32).shard_size == 8192
    assert plan_images(Pictures(), image_size=1024).shard_size == 85


def test_a_set_that_does_not_fit_is_read_from_its_disk(directory, monkeypatch):
    held = load_images_source(directory)
    monkeypatch.setattr("piflow_jax.data.images._IN_MEMORY", 0)
    read = load_images_source(directory)
    assert hasattr(held, "gather") and not hasattr(read, "gather")
    for ours, other in zip(read.__getitems__(range(7)), held.__getitems__(range(7)), strict=True):
        np.testing.assert_array_equal(ours["x"], other["x"])
        assert ours["condition"] == other["condition"]


@contextlib.contextmanager
def limited(which, soft):
    """Lowers a limit of this process for a while."""
    before = resource.getrlimit(which)
    resource.setrlimit(which, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(which, before)


def many_shards(directory, count=64):
    pixels = np.random.default_rng(1).integers(0, 256, (count, 4, 4, 3), np.uint8)
    plan = dataclasses.replace(PLAN, num_examples=count, shard_size=1)
    prepare_images(directory, plan, Pictures(pixels))
    return pixels


def test_a_set_may_have_more_shards_than_files_may_be_open(tmp_path):
    pixels = many_shards(tmp_path)
    files = len(os.listdir("/proc/self/fd")) + 32
    with limited(resource.RLIMIT_NOFILE, files):
        source = load_images_source(tmp_path, verify=False)
        for index, expected in enumerate(pixels):
            np.testing.assert_allclose(source[index]["x"], expected / 127.5 - 1, atol=1e-6)


def test_files_that_the_system_refuses_are_not_called_damaged(tmp_path, monkeypatch):
    many_shards(tmp_path)
    monkeypatch.setattr("piflow_jax.data.records._may_open", lambda files: None)
    files = len(os.listdir("/proc/self/fd")) + 32
    with limited(resource.RLIMIT_NOFILE, files), pytest.raises(OSError, match="Too many open") as e:
        source = load_images_source(tmp_path, verify=False)
        for index in range(len(source)):
            source[index]
    assert "damaged" not in str(e.value) and "ulimit -n" in str(e.value)


def test_a_full_disk_is_said_and_leaves_whole_shards_alone(tmp_path):
    """A limit of a file's size stands for it."""
    pixels = np.random.default_rng(1).integers(0, 256, (7, 128, 128, 3), np.uint8)
    plan = dataclasses.replace(PLAN, image_size=128)
    with (
        limited(resource.RLIMIT_FSIZE, 100_000),
        pytest.raises(OSError, match=r"cannot write .*00000-of-00003; make room and start again"),
    ):
        prepare_images(tmp_path, plan, Pictures(pixels))
    assert prepare_images(tmp_path, plan, Pictures(pixels))["num_examples"] == 7
    assert len(load_images_source(tmp_path)) == 7


def test_half_of_the_images_are_mirrored():
    x = np.arange(2 * 3 * 4, dtype=np.float32).reshape(1, 2, 3, 4).repeat(400, 0)
    drawn = np.asarray(mirrored(jax.random.key(0), x))
    same = (drawn == x).all((1, 2, 3))
    mirror = (drawn == x[:, :, ::-1]).all((1, 2, 3))
    assert (same ^ mirror).all() and 150 < same.sum() < 250
