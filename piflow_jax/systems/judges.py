"""Judges: the feature spaces in which samples of a run's data are measured."""

import os
from typing import Protocol

import jax
import numpy as np
from absl import logging

from piflow_jax.data import Source
from piflow_jax.evaluation.adm import InceptionNetwork, to_uint8
from piflow_jax.evaluation.components import PrincipalComponents
from piflow_jax.evaluation.feature_training import recipe_for, stored_arrays, train_network
from piflow_jax.evaluation.features import load_features, read_features
from piflow_jax.evaluation.kept import read_kept

__all__ = [
    "FEATURES_FILE",
    "InceptionJudge",
    "Judge",
    "make_features",
    "open_judge",
    "real_samples",
]

FEATURES_FILE = "features.npz"
# Real samples in figures; precision and recall compare each with each.
_MOST_REAL = 10_000
_SMALLEST_SIDE = 8  # of images that the recipe of feature networks is for


class Judge(Protocol):
    """A feature space.

    Attributes:
      name: what reports call it.
      digest: identity of its weights; figures compare only between equal ones.
    """

    name: str
    digest: str

    def extract(self, samples: np.ndarray) -> np.ndarray:
        """Features float32[N, D] of samples `[N, *sites, C]`."""
        ...


class InceptionJudge:
    """The pooled features of Inception, of images in [-1, 1], grey or colour.

    Args:
      network: the feature network.
    """

    def __init__(self, network: InceptionNetwork):
        self.name = "inception"
        self.digest = network.digest
        self._network = network

    def extract(self, samples: np.ndarray) -> np.ndarray:
        """See `Judge`; images are rounded to 8 bits and resized to 299x299."""
        images = to_uint8(samples)
        images = np.broadcast_to(images, (*images.shape[:-1], 3))
        return self._network.activations(np.ascontiguousarray(images)).pool


def real_samples(source: Source) -> tuple[np.ndarray, np.ndarray | None]:
    """The real samples of figures, with their labels where there are classes.

    Args:
      source: the data; `x` are its states.

    Returns:
      `(x[N, *sites, C], labels int[N] or None)`: all of them, or of a larger set 10,000 that depend
      on its length alone.
    """
    indices = np.arange(len(source))
    if len(source) > _MOST_REAL:
        words = np.random.Philox(key=0).random_raw(len(source))
        indices = np.sort(np.argsort(words, kind="stable")[:_MOST_REAL])
    if hasattr(source, "gather"):
        batch = source.gather(indices)
    else:
        examples = [source[int(index)] for index in indices]
        batch = {"x": np.stack([example["x"] for example in examples])}
        if getattr(source, "num_classes", 0):
            batch["condition"] = np.stack([example["condition"] for example in examples])
    labels = getattr(source, "labels", None)  # captions of classes know them besides
    if labels is None and getattr(source, "num_classes", 0):
        labels = batch["condition"]
    return batch["x"], None if labels is None else np.asarray(labels)[: len(batch["x"])]


def open_judge(
    source: Source,
    workdir: str | os.PathLike,
    *,
    shipped: str = "",
    inception: InceptionNetwork | None = None,
) -> Judge:
    """The feature space of a run.

    Args:
      source: the real data.
      workdir: where a feature space that has been made for this run lies, or is put.
      shipped: name of the space that ships with the package for this data; empty if none does.
      inception: takes the place of all others.

    Returns:
      Inception if it is given; the shipped space; one that is trained on labelled images by the
      package's recipe, and kept; or, without labels, the principal components of the samples.

    Raises:
      KeptFileError: The one that was kept is damaged.
    """
    if inception is not None:
        return InceptionJudge(inception)
    if shipped:
        return load_features(shipped)
    path = os.path.join(workdir, FEATURES_FILE)
    if os.path.exists(path):
        return read_kept(path, lambda path: read_features(path, f"features of {source.name}"))
    height, width = source.shape[:2] if len(source.shape) == 3 else (0, 0)
    if getattr(source, "num_classes", 0) > 1 and min(height, width) >= _SMALLEST_SIDE:
        return make_features(source, path)
    return PrincipalComponents.of(real_samples(source)[0])


def make_features(source: Source, path: str | os.PathLike) -> Judge:
    """Trains a feature space on labelled images and writes it.

    Args:
      source: the images.
      path: the file, `.npz`; processes other than the first wait for it.

    Returns:
      The space.
    """
    recipe = recipe_for(source.shape)
    if jax.process_index() == 0:
        logging.info(
            "features: training a feature space on %d images for %d steps; figures compare within "
            "it only",
            len(source),
            recipe.steps,
        )
        images, _ = real_samples(source)
        arrays = stored_arrays(train_network(source, recipe), images, recipe)
        temporary = f"{path}.tmp"
        with open(temporary, "wb") as file:
            np.savez_compressed(file, **arrays)
        os.replace(temporary, path)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("features")
    return read_features(path, f"features of {source.name}")
