"""Feature spaces that students train in, with mean and covariance of the training data there.

A student that was trained on a distance is not measured by it. The spaces have names, which
checkpoints and reports record.
"""

import dataclasses
import functools
import io
import json
import os
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from piflow_jax.config import Config, ConfigError
from piflow_jax.data import Source
from piflow_jax.data.source import source_digest
from piflow_jax.evaluation.adm import Moments
from piflow_jax.evaluation.components import PrincipalComponents
from piflow_jax.evaluation.features import FeatureNetwork
from piflow_jax.evaluation.kept import read_kept
from piflow_jax.keys import seed_key
from piflow_jax.systems.correctors import corrector_kind
from piflow_jax.systems.judges import (
    described,
    kept_space,
    network_space,
    open_judge,
    real_batches,
    why_no_figures,
)
from piflow_jax.whole_files import replacing

_KEY = "config.train.corrector.space"
# The judge's own network has seed 0.
_SEED = 1
# Most images in the statistics. With so many, their own errors are far below a student's.
_MOST_IMAGES = 100_000


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Space:
    """A feature space with the statistics of the training data.

    Attributes:
      features: the space; its `features` are differentiable.
      mean: float64[D], of the training data.
      covariance: float64[D, D].
    """

    features: FeatureNetwork | PrincipalComponents
    mean: np.ndarray
    covariance: np.ndarray

    @functools.cached_property
    def root(self) -> np.ndarray:
        """The symmetric square root `float64[D, D]` of the covariance."""
        values, vectors = np.linalg.eigh(self.covariance)
        return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T

    @property
    def name(self) -> str:
        """The space, as checkpoints and reports name it."""
        return described(self.features)


def _own_network(source: Source, of: Source, directory: epath.Path, shipped: str) -> Any:
    """A network of this run's own, which no figures are taken in."""
    del of, shipped

    def make(source):
        arrays, problem = network_space(source, _SEED)
        if not arrays:
            raise ConfigError(
                f"{_KEY} = 'network' needs a feature network, and none can be trained: {problem}; "
                "give 'pixels'"
            )
        return f"a second network trained on {source.name!r}", arrays

    return kept_space(source, directory / "corrector_network.npz", make)


def _judge(source: Source, of: Source, directory: epath.Path, shipped: str) -> Any:
    """The space of the figures, if they are not Inception's."""
    del source
    judge = open_judge(of, directory, shipped=shipped)
    if judge is None:
        raise ConfigError(
            f"{_KEY} = 'judge' is the space of figures, which cannot be measured: "
            f"{why_no_figures(of)}; give 'network' or 'pixels'"
        )
    return judge


def _pixels(source: Source, of: Source, directory: epath.Path, shipped: str) -> Any:
    """The principal components of the training images."""
    del of, shipped

    def make(source):
        components = PrincipalComponents.of(images for images, _ in real_batches(source))
        return components.name, components.arrays()

    return kept_space(source, directory / "corrector_pixels.npz", make)


SPACES: dict[str, Callable[..., FeatureNetwork | PrincipalComponents]] = {
    "network": _own_network,
    "judge": _judge,
    "pixels": _pixels,
}
"""`(source, test_source, directory, shipped) -> space`, by `config.train.corrector.space`."""


def open_space(
    config: Config,
    source: Source,
    workdir: str | os.PathLike,
    shipped: str = "",
    test_source: Source | None = None,
) -> Space | None:
    """Opens the feature space that a run's corrector trains in, and measures the training data.

    Args:
      config: the run's settings.
      source: the training data.
      workdir: the run's directory, where the space and the statistics are kept. All processes must
        call this.
      shipped: see `open_judge`.
      test_source: the data of the judge; by default `source`.

    Returns:
      The space; None for a run whose corrector needs none.

    Raises:
      ConfigError: the data are no pictures, or have no such space.
      KeptFileError: a file that the run keeps is damaged.
    """
    row, corrector = corrector_kind(config), config.train.corrector
    if row is None or not row.of_data:
        return None
    problem = why_no_figures(source)
    if problem:
        raise ConfigError(
            f"config.train.corrector.kind = {corrector.kind!r} measures pictures, but {problem}: "
            "give 'critic'"
        )
    directory = epath.Path(workdir)
    judged = source if test_source is None else test_source
    features = SPACES[corrector.space](source, judged, directory, shipped)
    space = Space(
        features=features, **_statistics(source, features, directory / "corrector_data.npz")
    )
    logging.info("corrector: trains in %s; figures there say nothing of its worth", space.name)
    return space


def spaces_with(space: Space | None, before: Iterable[str]) -> tuple[str, ...]:
    """Names of the spaces that a student is trained in: those before its run, and the run's."""
    return tuple(dict.fromkeys((*before, *([space.name] if space else ()))))


def _statistics(source: Source, features: Any, path: epath.Path) -> dict[str, np.ndarray]:
    """Mean and covariance of the training data, computed once and kept."""
    made = {"space": features.digest, "images": len(source), "digest": source_digest(source)}
    draw = getattr(source, "draw", None)  # training sees what it makes, such as mirror images
    if draw is not None:
        made["drawn"] = True
    if jax.process_index() == 0 and (not path.exists() or _read(path)[0] != made):
        moments = None
        for index, (images, _) in enumerate(real_batches(source, _MOST_IMAGES)):
            if draw is not None:
                images = np.asarray(draw(seed_key(index), images))
            found = features.extract(images)
            moments = (Moments.empty(found.shape[1]) if moments is None else moments).add(found)
        mean, covariance = moments.statistics()
        file = io.BytesIO()
        np.savez(file, made=np.array(json.dumps(made)), mean=mean, covariance=covariance)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as under_way:
            under_way.write_bytes(file.getvalue())
    multihost_utils.sync_global_devices(path.name)
    return _read(path)[1]


def _read(path: epath.Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    def kept(_):
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as archive:
            found = {name: np.asarray(archive[name], np.float64) for name in ("mean", "covariance")}
            if not all(np.isfinite(values).all() for values in found.values()):
                raise ValueError("its values are not finite")
            return json.loads(str(archive["made"])), found

    return read_kept(path, kept)
