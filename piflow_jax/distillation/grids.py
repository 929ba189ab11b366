"""Samples for figures and grids: by index, and in rows."""

import jax
import numpy as np

from piflow_jax.config import Config, ConfigError
from piflow_jax.data import Source
from piflow_jax.evaluation import IndexSampler
from piflow_jax.evaluation.evaluator import Sampler
from piflow_jax.parallel import batch_sharding, local_mesh
from piflow_jax.systems import datasets
from piflow_jax.systems.conditioning import Condition
from piflow_jax.systems.sampling import conditions_in_turn
from piflow_jax.systems.shapes import DataShape


def grid_rows(
    config: Config, source: Source | None, data: DataShape
) -> tuple[list[str], Condition]:
    """The rows of a grid; sample `i` is in row `i` modulo their number.

    Args:
      config: the run's settings; `config.evaluation.grid_classes` selects the classes.
      source: the data; needed if conditions are not labels.
      data: shape and conditions of the data.

    Returns:
      Names of the rows and their conditions, for `IndexSampler`. Without classes there is one row.

    Raises:
      ConfigError: a class does not exist.
    """
    if not data.num_classes:
        conditions = None if source is None else conditions_in_turn(source, data)[0]
        return ["samples"], conditions
    classes = config.evaluation.grid_classes or tuple(range(data.num_classes))
    if max(classes) >= data.num_classes:
        raise ConfigError(
            f"config.evaluation.grid_classes must be below {data.num_classes}, got {max(classes)}"
        )
    table = np.arange(data.num_classes, dtype=np.int32)
    if source is not None:
        table, _ = conditions_in_turn(source, data)
    names = class_names(source, data)
    conditions = jax.tree.map(lambda a: np.asarray(a)[np.asarray(classes)], table)
    return [names[label] for label in classes], conditions


def class_names(source: Source | None, data: DataShape) -> list[str]:
    """Names of the classes from the source or the data set; otherwise their numbers."""
    return list(getattr(source, "class_names", None) or datasets.class_names(data))


def index_sampler(
    config: Config,
    data: DataShape,
    sampler: Sampler,
    conditions: Condition,
    number: int,
    name: str = "samples",
) -> IndexSampler:
    """Makes a sampler by index with `config.evaluation`, on all devices of this process.

    Args:
      config: the run's settings.
      data: shape and conditions of the data.
      sampler: the system's sampler.
      conditions: conditions to cycle through, see `conditions_in_turn`.
      number: most samples that are requested at once.
      name: the system's name, for the progress line.

    Returns:
      The sampler.
    """
    settings = config.evaluation
    return IndexSampler(
        sampler,
        shape=data.shape,
        conditions=conditions,
        batch_size=settings.batch_size,
        num_samples=number,
        seed=settings.seed,
        sharding=batch_sharding(local_mesh()),
        name=name,
    )
