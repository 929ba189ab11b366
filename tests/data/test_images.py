"""The sharded set of pixels: what is written is what is read, whole, in parts and mirrored."""

import jax
import numpy as np
import pytest

from piflow_jax.config import DataConfig
from piflow_jax.data.images import (
    ImagesError,
    ImagesPlan,
    load_images_source,
    mirrored,
    prepare_images,
)
from piflow_jax.systems.datasets import DATASETS

PIXELS = np.random.default_rng(0).integers(0, 256, (7, 4, 4, 3), np.uint8)
LABELS = np.arange(7) % 2
PLAN = ImagesPlan(
    num_examples=7,
    shard_size=3,
    source="noise",
    class_names=("even", "odd"),
    image_size=4,
    channels=3,
)


def read(indices):
    for index in indices:
        yield PIXELS[index], int(LABELS[index])


@pytest.fixture
def directory(tmp_path):
    assert prepare_images(tmp_path, PLAN, read)["num_examples"] == 7
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


def test_a_preparation_is_shared_by_processes_and_goes_on(tmp_path):
    assert prepare_images(tmp_path, PLAN, read, process_index=1, process_count=2) is None
    with pytest.raises(ImagesError, match=str(tmp_path)):
        load_images_source(tmp_path)
    assert prepare_images(tmp_path, PLAN, read) is not None
    np.testing.assert_array_equal(
        load_images_source(tmp_path).gather(np.arange(7))["condition"], LABELS
    )


def test_a_damaged_shard_is_named(directory):
    shard = sorted(directory.glob("images.array_record-*"))[1]
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(ImagesError, match=shard.name):
        load_images_source(directory)


def test_images_of_another_shape_are_refused(tmp_path):
    with pytest.raises(ImagesError, match=r"uint8\[4, 4\], expected uint8\[4, 4, 3\]"):
        prepare_images(tmp_path, PLAN, lambda indices: ((PIXELS[i, ..., 0], 0) for i in indices))


def test_half_of_the_images_are_mirrored():
    x = np.arange(2 * 3 * 4, dtype=np.float32).reshape(1, 2, 3, 4).repeat(400, 0)
    drawn = np.asarray(mirrored(jax.random.key(0), x))
    same = (drawn == x).all((1, 2, 3))
    mirror = (drawn == x[:, :, ::-1]).all((1, 2, 3))
    assert (same ^ mirror).all() and 150 < same.sum() < 250
