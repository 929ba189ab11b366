"""`--mode=features`: the feature space in which samples of a run's images are measured."""

import os

from piflow_jax.config import Config, ConfigError
from piflow_jax.runs.run_lock import RunLock
from piflow_jax.systems.datasets import dataset, load_source
from piflow_jax.systems.judges import Judge, config_judge


def make_features(config: Config, workdir: str | os.PathLike) -> Judge:
    """Opens the feature space of a run's images, and makes it if there is none.

    Training does so by itself, before its first step.

    Args:
      config: the run's settings.
      workdir: the run's directory; a space that has to be made is kept there, in `features.npz`.

    Returns:
      The space, whose name and digest are also printed.

    Raises:
      BlockingIOError: another run is working in the directory.
      ConfigError: the data are not images in pixels, or the file was made from other images.
      FileNotFoundError: the data, or Inception's weights, are not there.
    """
    if dataset(config).latents:
        raise ConfigError(
            f"--mode=features is for images in pixels; config.data.name = {config.data.name!r} is "
            "measured in the features of Inception, config.evaluation.features"
        )
    with RunLock(workdir):
        return config_judge(config, load_source(config.data), workdir)
