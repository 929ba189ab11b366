"""`--mode=sample`: a grid of the student's samples, or of the teacher's."""

import os
from pathlib import Path

import jax
from absl import logging

from piflow_jax.config import Config, ConfigError
from piflow_jax.data import load_source
from piflow_jax.evaluation import FEATURE_SPACES, IndexSampler, save_grid
from piflow_jax.parallel import batch_sharding, local_mesh
from piflow_jax.stages.autoencoder import check_autoencoder, load_autoencoder, pixel_sampler
from piflow_jax.stages.sample_prompts import sample_prompts
from piflow_jax.stages.systems import (
    data_shape,
    load_system,
    system_sampler,
    told_by_class,
)
from piflow_jax.training.networks import DataShape

__all__ = ["sample", "shown_classes"]


def sample(config: Config, workdir: str | os.PathLike) -> Path | list[Path]:
    """Writes `<workdir>/student.png`, one row per class; of prompts see `sample_prompts`.

    With `config.evaluation.system` it is `teacher.png`.

    Args:
      config: the run's settings; `config.evaluation.seed` chooses the noise, `grid_classes` the
        rows and `grid_samples` the columns. Latents are decoded by `config.data.vae`.
      workdir: the run's directory.

    Returns:
      The picture's path, or those of the prompts' pictures.

    Raises:
      CheckpointError: there is no student, or it contradicts the settings.
      ConfigError: a class does not exist, or the autoencoder is missing or another one.
    """
    if config.data.name == "prompts":
        return sample_prompts(config, workdir)
    settings = config.evaluation
    data = data_shape(config, workdir)
    classes = shown_classes(config, data)
    source = None
    if config.data.name in FEATURE_SPACES:  # their images are at hand, and so are captions
        source = load_source(config.data.name, config.data.data_dir or None)
    sampler = system_sampler(config, data, getattr(source, "null", None))
    if source is not None:
        sampler = told_by_class(config, source, sampler)
    if config.data.name == "imagenet":
        autoencoder = load_autoencoder(config)
        check_autoencoder(autoencoder, data)
        sampler = pixel_sampler(sampler, autoencoder.module, data)
        params = (load_system(config, data, workdir, None), autoencoder.params)
    else:
        params = load_system(config, data, workdir, None)
    run = IndexSampler(
        sampler,
        shape=data.shape,
        classes=classes,
        batch_size=settings.batch_size,
        seed=settings.seed,
        sharding=batch_sharding(local_mesh()),
    )
    images = run(params, settings.grid_samples * len(classes))
    # Labels go by index, classes in turn.
    rows = [(f"class {label}", images[i :: len(classes)]) for i, label in enumerate(classes)]
    path = Path(workdir) / f"{settings.system}.png"
    if jax.process_index() == 0:
        save_grid(path, rows)
        logging.info("wrote %s: %d samples in %.2f s", path, len(images), run.seconds)
    return path


def shown_classes(config: Config, data: DataShape) -> tuple[int, ...]:
    """The classes of a grid's rows, checked; see `config.evaluation.grid_classes`."""
    classes = config.evaluation.grid_classes or tuple(range(data.num_classes))
    if max(classes) >= data.num_classes:
        raise ConfigError(
            f"config.evaluation.grid_classes must be below {data.num_classes}, got {max(classes)}"
        )
    return classes
