"""Looks at a student while it trains: a grid of samples, and figures from a judge."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from piflow_jax.config import Config
from piflow_jax.data import Source
from piflow_jax.distillation.grids import grid_rows, index_sampler
from piflow_jax.evaluation import IndexSampler, as_pictures, draw_grid
from piflow_jax.evaluation.evaluator import Sampler
from piflow_jax.parallel import local_mesh, replicated
from piflow_jax.runs.loop import Look
from piflow_jax.systems.sampling import conditions_in_turn
from piflow_jax.systems.shapes import DataShape

# Columns of a grid; with more, images would be too small in TensorBoard.
_COLUMNS = 8


@dataclasses.dataclass(frozen=True)
class Measure:
    """Measures the samples of a look.

    Attributes:
      figures: `(sampler, params, labels) -> figures` of `config.evaluation.every_samples` samples.
      space: name of the feature space, for the log.
    """

    figures: Callable[[IndexSampler, Any, np.ndarray], Mapping[str, float]]
    space: str


def look_by(
    config: Config,
    source: Source,
    data: DataShape,
    sampler: Sampler,
    measure: Measure | None,
    others: tuple[Any, ...] = (),
) -> Callable[[Any], Look]:
    """Makes the function that looks at a student.

    Args:
      config: the run's settings.
      source: the data.
      data: shape and conditions of the data.
      sampler: the student's sampler, which makes pictures.
      measure: computes figures; None computes none.
      others: parameters that the sampler takes after the student's, such as an autoencoder's.

    Returns:
      `params -> Look`, compiled at its first call.

    Raises:
      ConfigError: a class of the grid does not exist.
    """
    settings, (names, shown) = config.evaluation, grid_rows(config, source, data)
    conditions, labels = conditions_in_turn(source, data)
    all_sampler = index_sampler(
        config, data, sampler, conditions, settings.every_samples, "look at the student"
    )
    grid_sampler = all_sampler
    if settings.grid_classes:
        grid_sampler = index_sampler(config, data, sampler, shown, _COLUMNS * len(names))
    labels = labels[np.arange(settings.every_samples) % len(labels)]
    others = jax.device_put(others, replicated(local_mesh()))

    def look(params) -> Look:
        params = jax.device_put(params, replicated(local_mesh()))
        params = (params, *others) if others else params
        images = as_pictures(grid_sampler(params, _COLUMNS * len(names)))
        rows = [(name, images[i :: len(names)]) for i, name in enumerate(names)]
        found = measure.figures(all_sampler, params, labels) if measure else {}
        return Look(
            figures=found,
            images={"student": np.asarray(draw_grid(rows))},
            distance=found.get("frechet"),
            space=measure.space if measure else "",
        )

    return look
