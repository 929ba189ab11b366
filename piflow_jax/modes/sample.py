"""`--mode=sample`: a grid of the student's samples, or of the teacher's."""

import os

import jax
from absl import logging
from etils import epath

from piflow_jax.config import Config
from piflow_jax.distillation.grids import grid_rows, index_sampler
from piflow_jax.distillation.sizes import Sizes
from piflow_jax.evaluation import as_pictures, save_grid
from piflow_jax.loading.runs import data_shape, load_system
from piflow_jax.modes.autoencoder import load_autoencoder, pixel_sampler
from piflow_jax.modes.header import say_header
from piflow_jax.modes.sample_prompts import sample_prompts
from piflow_jax.runs.workdir import user_path
from piflow_jax.systems.assembly import Systems
from piflow_jax.systems.datasets import dataset, load_source


def sample(config: Config, workdir: str | os.PathLike) -> epath.Path | list[epath.Path]:
    """Writes `<workdir>/student.png`, one row per class; for prompts see `sample_prompts`.

    For the teacher (`config.evaluation.system`) the file is `teacher.png`, and with another seed,
    such as 7, `student-seed7.png`.

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
    row, settings = dataset(config), config.evaluation
    if config.seed not in (Config().seed, settings.seed):
        logging.info(
            "note: config.seed = %d is the seed of training; other samples come of "
            "config.evaluation.seed, which is %d",
            config.seed,
            settings.seed,
        )
    if not row.by_class:
        return sample_prompts(config, workdir)
    data = data_shape(config, workdir)
    # Captions are those of the set; labels need no set to be there.
    source = load_source(config.data) if row.captions else None
    names, conditions = grid_rows(config, source, data)
    number = settings.grid_samples * len(names)
    systems = Systems.of(config, data, getattr(source, "null", None))
    Sizes(systems, source).check_sampling(number)
    from_seed = f"-seed{settings.seed}" if settings.seed else ""
    path = user_path(workdir) / f"{settings.system}{from_seed}.png"
    say_header(systems, workdir, path.name)
    sampler = systems.sampler()
    if row.latents:
        autoencoder = load_autoencoder(config, data)
        sampler = pixel_sampler(sampler, autoencoder.module, data)
        params = (load_system(config, data, workdir), autoencoder.params)
    else:
        params = load_system(config, data, workdir)
    run = index_sampler(config, data, sampler, conditions, number, settings.system)
    images = as_pictures(run(params, number))
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_grid(path, [(name, images[i :: len(names)]) for i, name in enumerate(names)])
        logging.info("wrote %s: %d samples in %.2f s", path, len(images), run.seconds)
        logging.info("next: other samples by --config.evaluation.seed=%d", settings.seed + 1)
    return path
