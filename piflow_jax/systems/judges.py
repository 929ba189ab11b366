"""Judges: the feature spaces that measure samples of a run's data.

`open_judge` returns the feature space of a source. Figures are comparable only within one space, so
each space has a digest, which reports store with their figures.
"""

import io
import json
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from piflow_jax.arguments import differing
from piflow_jax.config import Config, ConfigError, EvaluationConfig, naming
from piflow_jax.convert import load_torch_state
from piflow_jax.convert.inception import INCEPTION_FILE, INCEPTION_URL, read_inception
from piflow_jax.data import Source, stacked
from piflow_jax.data.source import source_digest
from piflow_jax.evaluation import least_real_samples
from piflow_jax.evaluation.adm import InceptionNetwork, to_uint8
from piflow_jax.evaluation.components import PrincipalComponents
from piflow_jax.evaluation.feature_training import recipe_for, stored_arrays, train_network
from piflow_jax.evaluation.features import FeatureNetwork, load_features
from piflow_jax.evaluation.kept import read_kept
from piflow_jax.keys import shuffled
from piflow_jax.parallel import batch_sharding, local_mesh, replicated
from piflow_jax.progress import Progress, tracked
from piflow_jax.systems.datasets import dataset
from piflow_jax.whole_files import replacing

FEATURES_FILE = "features.npz"
# Most real samples in figures, because precision and recall compare all pairs.
_MOST_REAL = 10_000
_BATCH = 512
# Least data for training a feature network: sites per side, images, and mean images per class.
_SMALLEST_SIDE, _LEAST_IMAGES, _LEAST_OF_A_CLASS = 8, 256, 8
_IMAGES_PER_DEVICE = 64  # images that Inception takes at a time


class Judge(Protocol):
    """A feature space.

    Attributes:
      name: its name in reports.
      digest: identity of its weights; figures are comparable only between equal digests.
    """

    name: str
    digest: str

    def extract(self, images: np.ndarray) -> np.ndarray:
        """Features float32[N, D] of images `[N, H, W, C]`."""
        ...


class InceptionJudge:
    """The pooled features of Inception, for images in [-1, 1], grey or colour.

    Args:
      network: the feature network.
    """

    def __init__(self, network: InceptionNetwork):
        self.name = "inception"
        self.digest = network.digest
        self._network = network

    def extract(self, images: np.ndarray) -> np.ndarray:
        """See `Judge`; images are rounded to 8 bits and resized to 299x299."""
        pixels = to_uint8(images)
        pixels = np.broadcast_to(pixels, (*pixels.shape[:-1], 3))
        batches = (pixels[first : first + _BATCH] for first in range(0, len(pixels), _BATCH))
        found = [
            self._network.activations(np.ascontiguousarray(batch)).pool
            for batch in tracked(batches, "features of Inception", len(pixels))
        ]
        return np.concatenate(found)


def described(judge: Judge) -> str:
    """A judge in a few words: its name and enough of its digest to identify it."""
    return f"{judge.name}, sha256 {judge.digest[:12]}"


def is_judge_of(judge: Judge, spaces: Iterable[str]) -> bool:
    """Whether a judge measures in one of the spaces, by their names as `described` gives them.

    Spaces with one name count as one, such as components of training images and of test images.
    """
    return judge.name in {space.rpartition(", sha256 ")[0] for space in spaces}


def independent(judge: Judge | None, spaces: Iterable[str]) -> Judge | None:
    """The judge if it measures in none of the spaces, for figures during training."""
    return None if judge is None or is_judge_of(judge, spaces) else judge


def open_judge(
    source: Source,
    directory: str | os.PathLike,
    settings: EvaluationConfig | None = None,
    shipped: str = "",
) -> Judge | None:
    """Opens the feature space for samples of a source, or makes one if there is none.

    Args:
      source: the data, images `[H, W, 1]` or `[H, W, 3]` in [-1, 1].
      directory: where the space made from the source is stored, as `features.npz`. All processes
        must call this.
      settings: `features` gives Inception's weights, which replace all other spaces; None gives
        none.
      shipped: name of the space that ships with the package for this data; empty if there is none.

    Returns:
      The first of these that is available: Inception, if its weights are given; the shipped space;
      a network trained on the labelled images; the principal components of their pixels, if images
      are too few, too small or without classes. None if states are not images or too few for
      figures; the log says so.

    Raises:
      ConfigError: a file does not hold Inception or holds the space of another source, or no space
        can be made.
      FileNotFoundError: Inception's weights are missing; the message says what to put there.
      KeptFileError: the stored space is damaged.
    """
    problem = why_no_figures(source)
    if problem:
        logging.info("no figures: %s", problem)
        return None
    if settings and settings.features:
        judge = InceptionJudge(load_inception(settings))
    elif shipped:
        judge = _shipped(shipped, source)
    else:
        judge = kept_space(source, epath.Path(directory) / FEATURES_FILE, _made)
    logging.info("features: %s; figures compare only within these", described(judge))
    return judge


def config_judge(config: Config, source: Source, workdir: str | os.PathLike) -> Judge:
    """The feature space of a run's data, for uses that require one; see `open_judge`."""
    judge = open_judge(source, workdir, config.evaluation, dataset(config).features)
    if judge is None:
        raise ConfigError(f"config.data.name = {config.data.name!r} has no images to measure")
    return judge


def load_inception(settings: EvaluationConfig) -> InceptionNetwork:
    """Loads the feature network of `config.evaluation.features` on every device of this process.

    Args:
      settings: the settings of evaluation.

    Returns:
      The network.

    Raises:
      ConfigError: no file is given, or the file does not hold one.
      FileNotFoundError: the file is missing; the message says what to put there.
    """
    path = settings.features
    if not path:
        raise ConfigError(
            f"config.evaluation.features must name {INCEPTION_FILE}, the Inception weights of FID, "
            f"from {INCEPTION_URL}"
        )
    with naming(f"config.evaluation.features = {path!r}"):
        state, digest = read_inception(path)
        _, params = load_torch_state(state, "inception")
    mesh = local_mesh()
    return InceptionNetwork(
        params=jax.device_put(params, replicated(mesh)),
        digest=digest,
        batch_size=_IMAGES_PER_DEVICE * mesh.size,
        sharding=batch_sharding(mesh),
    )


def compared(source: Source) -> Source:
    """The data that figures compare with: the test data, or all where there are none."""
    return getattr(source, "test", None) or source


def real_features(source: Source, judge: Judge) -> tuple[np.ndarray, np.ndarray]:
    """Features of the real images that figures compare with.

    Args:
      source: the images.
      judge: the feature space.

    Returns:
      `(features[N, D], labels int32[N])` of all test images, or of all images if there are no test
      images. A larger set is reduced to 10,000 images, chosen by its length alone. Labels are 0
      without classes.
    """
    pairs = [(judge.extract(images), labels) for images, labels in real_batches(compared(source))]
    features, labels = zip(*pairs, strict=True)
    return np.concatenate(features), np.concatenate(labels)


def second_judge(source: Source, judge: Judge) -> PrincipalComponents | None:
    """A judge without a network: the principal components of the real images' pixels.

    Args:
      source: the images.
      judge: the feature space of the figures.

    Returns:
      The judge, or None if it is the space of the figures already.
    """
    if isinstance(judge, PrincipalComponents):
        return None
    return PrincipalComponents.of(images for images, _ in real_batches(compared(source)))


def real_batches(
    source: Source, most: int | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Real images `[b, H, W, C]` with labels `int32[b]`, see `real_features`; `most` in total.

    They are spread over the source, which may be sorted.
    """
    indices = np.sort(shuffled(len(source), (0, 0))[: most or _MOST_REAL])
    labels = getattr(source, "labels", None)  # captions made from classes also have labels
    for part in np.split(indices, range(_BATCH, len(indices), _BATCH)):
        if hasattr(source, "gather"):
            batch = source.gather(part)
        else:
            batch = stacked([source[int(index)] for index in part])
        if labels is not None:
            of_part = np.asarray(labels)[part]
        elif getattr(source, "num_classes", 0):
            of_part = batch["condition"]
        else:
            of_part = np.zeros(len(part))
        yield batch["x"], np.asarray(of_part, np.int32)


def why_no_figures(source: Source) -> str:
    """Why figures cannot be measured for a source; empty if they can."""
    name, shape = source.name, tuple(source.shape)
    if len(shape) != 3 or shape[-1] not in (1, 3):
        return f"the states of {name!r}, {list(shape)}, are no images [H, W, 1] or [H, W, 3]"
    images = next(real_batches(source))[0]
    if np.shape(images)[1:] != shape or hasattr(source, "latent_scale"):
        return f"the states of {name!r} are drawn from what is kept, not images"
    real, classes = compared(source), getattr(source, "num_classes", 0)
    if len(real) < least_real_samples():
        return f"{real.name!r} has {len(real)} images, figures need {least_real_samples()}"
    if len(real) <= classes:  # otherwise two share a class
        labels = np.concatenate([labels for _, labels in real_batches(real)])
        if len(np.unique(labels)) == len(labels):
            return f"no class of {real.name!r} has two images, which figures compare"
    low, high = float(np.min(images)), float(np.max(images))
    if not (low >= -1 and high <= 1):
        return f"the images of {name!r} must lie in [-1, 1], they lie in [{low:.3g}, {high:.3g}]"
    return ""


def _shipped(name: str, source: Source) -> Judge:
    judge = load_features(name)
    if judge.shape != tuple(source.shape):
        raise ConfigError(
            f"the feature space {name!r} is for images {list(judge.shape)}, those of "
            f"{source.name!r} are {list(source.shape)}"
        )
    return judge


def kept_space(
    source: Source, path: epath.Path, make: Callable[[Source], tuple[str, dict[str, np.ndarray]]]
) -> FeatureNetwork | PrincipalComponents:
    """Reads a feature space from a file, or makes and writes it if the file is missing.

    Args:
      source: the images.
      path: the file. All processes must call this.
      make: `source -> (name, arrays)`.

    Returns:
      The space.

    Raises:
      ConfigError: the file holds the space of another source.
      KeptFileError: the file is damaged.
    """
    if jax.process_index() == 0 and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, source, *make(source))
    multihost_utils.sync_global_devices(path.name)
    return _read(path, source)


def _no_network(source: Source) -> str:
    """Why no feature network can be trained on a source's images; empty if one can."""
    classes, count, side = getattr(source, "num_classes", 0), len(source), min(source.shape[:2])
    if classes < 2:
        return f"{source.name!r} has {'one class' if classes else 'no classes'}"
    label = np.asarray(source[0]["condition"])
    if label.ndim or not np.issubdtype(label.dtype, np.integer):
        return f"the conditions of {source.name!r} are no labels"
    if side < _SMALLEST_SIDE:
        return f"its images have {side} pixels a side, fewer than {_SMALLEST_SIDE}"
    least = max(_LEAST_IMAGES, _LEAST_OF_A_CLASS * classes)
    if count < least:
        return f"{count} images of {classes} classes are too few, {least} are not"
    return ""


def network_space(source: Source, seed: int = 0) -> tuple[dict[str, np.ndarray], str]:
    """Trains a feature network on a labelled source.

    Args:
      source: the images.
      seed: root of all randomness.

    Returns:
      The arrays of `FeatureNetwork.of_arrays` and an empty string, or no arrays and the reason.
    """
    problem = _no_network(source)
    if problem:
        return {}, problem
    recipe = recipe_for(source.shape)
    logging.info(
        "features: training a network on %d images for %d steps", len(source), recipe.steps
    )
    with Progress("features: training", recipe.steps) as progress:
        params = train_network(source, recipe, seed, on_step=lambda step: progress.advance())
    arrays = stored_arrays(params, (images for images, _ in real_batches(source)), recipe)
    if np.isfinite(arrays["mean"]).all() and (arrays["scale"] > 0).all():
        return arrays, ""
    return {}, "its training diverged"


def _made(source: Source) -> tuple[str, dict[str, np.ndarray]]:
    """Name and arrays of a feature space of a source."""
    arrays, problem = network_space(source)
    if arrays:
        return f"a network trained on {source.name!r}", arrays
    logging.info(
        "features: no network can be trained, %s; the principal components of the pixels instead",
        problem,
    )
    with naming(f"no features of {source.name!r}"):
        components = PrincipalComponents.of(images for images, _ in real_batches(source))
    return components.name, components.arrays()


def _identity(source: Source) -> dict[str, Any]:
    """Values that identify a source."""
    return {
        "images": len(source),
        "shape": list(source.shape),
        "classes": getattr(source, "num_classes", 0),
        "digest": source_digest(source),
    }


def _write(path: epath.Path, source: Source, name: str, arrays: dict[str, np.ndarray]) -> None:
    about = {"name": name, "sha256": _judge(name, arrays).digest}
    about |= {"source": source.name, "of": _identity(source)}
    file = io.BytesIO()
    np.savez_compressed(file, about=np.array(json.dumps(about)), **arrays)
    with replacing(path) as under_way:
        under_way.write_bytes(file.getvalue())


def _read(path: epath.Path, source: Source) -> Judge:
    def kept(_) -> tuple[Judge, str, dict[str, Any]]:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as archive:
            arrays = dict(archive)
        about = json.loads(str(arrays.pop("about")))
        judge = _judge(about["name"], arrays)
        if judge.digest != about["sha256"]:
            raise ValueError("its weights are not those that were written")
        return judge, about["source"], dict(about["of"])

    judge, name, of = read_kept(path, kept)
    here = _identity(source)
    different = differing({key: of.get(key) for key in here}, here, "{} {!r} there, {!r} here")
    if different:
        raise ConfigError(
            f"{path} is the feature space of another source ({name!r}: "
            f"{'; '.join(different)}); pass another --workdir, or remove the file, and a space of "
            f"{source.name!r} is made, with which figures of before do not compare"
        )
    return judge


def _judge(name: str, arrays: dict[str, np.ndarray]) -> Judge:
    if "axes" in arrays:
        return PrincipalComponents.of_arrays(arrays)
    return FeatureNetwork.of_arrays(arrays, name)
