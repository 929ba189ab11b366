"""`--mode=sample`: a grid of the student's samples."""

import os
from pathlib import Path

from absl import logging

from piflow_jax.config import Config
from piflow_jax.data import load_source
from piflow_jax.evaluation import sample_by_index, save_grid
from piflow_jax.stages.systems import load_student, student_sampler
from piflow_jax.training.networks import DataShape


def sample(config: Config, workdir: str | os.PathLike) -> Path:
    """Writes `<workdir>/student.png`, one row per class.

    Args:
      config: the run's settings; `config.evaluation.seed` chooses the noise and
        `config.evaluation.grid_samples` the columns.
      workdir: the run's directory.

    Returns:
      The picture's path.

    Raises:
      CheckpointError: there is no student, or it contradicts the settings.
    """
    source = load_source(config.data.name, config.data.data_dir or None)
    data = DataShape.of(config.data.name, source)
    params = load_student(config, data, workdir)
    columns = config.evaluation.grid_samples
    images, seconds = sample_by_index(
        student_sampler(config, data),
        params,
        columns * data.num_classes,
        shape=source.shape,
        num_classes=data.num_classes,
        batch_size=config.evaluation.batch_size,
        seed=config.evaluation.seed,
    )
    # Labels go by index, classes in turn.
    rows = [(f"class {c}", images[c :: data.num_classes]) for c in range(data.num_classes)]
    path = Path(workdir) / "student.png"
    save_grid(path, rows)
    logging.info("wrote %s: %d samples in %.2f s", path, len(images), seconds)
    return path
