"""IDX files, written here by the format's own description."""

import gzip
import struct

import numpy as np
import pytest
from etils import epath

from piflow_jax.data import load_fashion_mnist_source, load_mnist_source, mnist
from piflow_jax.data.idx import find_idx, read_idx

RNG = np.random.default_rng(0)
PARTS = {"train": 40, "t10k": 20}
IMAGES = {split: RNG.integers(0, 256, (n, 28, 28), np.uint8) for split, n in PARTS.items()}
LABELS = {split: (np.arange(n) % 10).astype(np.uint8) for split, n in PARTS.items()}


def idx(array, kind=0x08):
    head = struct.pack(">BBBB", 0, 0, kind, array.ndim)
    return head + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write(folder, split, *, dot=False, zipped=False):
    for name, array in (
        (f"{split}-images-idx3-ubyte", IMAGES),
        (f"{split}-labels-idx1-ubyte", LABELS),
    ):
        name = name.replace("-idx", ".idx") if dot else name
        content = idx(array[split])
        path = folder / (f"{name}.gz" if zipped else name)
        path.write_bytes(gzip.compress(content) if zipped else content)


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    loaders = (load_mnist_source, load_fashion_mnist_source)
    monkeypatch.setattr(mnist, "_PACKAGED", tmp_path / "packaged")
    for loader in loaders:
        loader.cache_clear()
    yield
    for loader in loaders:
        loader.cache_clear()


@pytest.mark.parametrize(
    ("kind", "dtype"), [(8, "u1"), (9, "i1"), (11, ">i2"), (12, ">i4"), (13, ">f4"), (14, ">f8")]
)
def test_every_type_is_read(tmp_path, kind, dtype):
    array = RNG.normal(scale=50, size=(3, 4)).astype(dtype)
    path = epath.Path(tmp_path / "a")
    path.write_bytes(idx(array, kind))
    read = read_idx(path)
    np.testing.assert_array_equal(read, array)
    assert read.dtype.isnative


GOOD = idx(IMAGES["t10k"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "index out of range"),
        (b"\0\0\x08", "index out of range"),
        (b"\0\0\x07\x01\0\0\0\x01a", "begins with 00 00 07 01, which no IDX file does"),
        (b"PK\x03\x04" + b"\0" * 40, "begins with 50 4b 03 04"),
        (GOOD[:10], "smaller than requested"),
        (GOOD[:-1], r"\[20, 28, 28\], 15680 bytes; it has 15679"),
        (GOOD + b"\0", "15680 bytes; it has 15681"),
        (gzip.compress(GOOD, mtime=0)[:-20], "ended before the end-of-stream"),
        (gzip.compress(GOOD, mtime=0)[:12] + b"xxxx", "invalid"),
    ],
)
def test_damage_is_said_with_the_path(tmp_path, content, words):
    path = epath.Path(tmp_path / "t10k-images-idx3-ubyte")
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path} is damaged: .*{words}"):
        read_idx(path)


@pytest.mark.parametrize("form", [{}, {"dot": True}, {"zipped": True}])
@pytest.mark.parametrize("load", [load_mnist_source, load_fashion_mnist_source])
def test_a_folder_of_idx_files_is_read(tmp_path, load, form):
    for split in PARTS:
        write(tmp_path, split, **form)
    source = load(str(tmp_path))
    for part, split in ((source, "train"), (source.test, "t10k")):
        np.testing.assert_allclose((part.x[..., 0] + 1) * 127.5, IMAGES[split], atol=1e-4)
        np.testing.assert_array_equal(part.condition, LABELS[split])
    assert len(source.class_names) == source.num_classes == 10


def test_test_images_need_not_be_there(tmp_path):
    write(tmp_path, "train")
    assert load_fashion_mnist_source(str(tmp_path)).test is None
    assert find_idx(epath.Path(tmp_path), "t10k") is None


def test_the_files_of_a_package_are_found(tmp_path, monkeypatch):
    (tmp_path / "packaged").mkdir()
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "empty"))
    write(tmp_path / "packaged", "train", zipped=True)
    assert len(load_fashion_mnist_source()) == PARTS["train"]


def test_nothing_found_names_the_remedies(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        load_fashion_mnist_source(str(tmp_path))
    message = str(caught.value)
    assert "apt-get install dataset-fashion-mnist" in message
    assert "config.data.data_dir" in message and "tfds.data_source('fashion_mnist'" in message
