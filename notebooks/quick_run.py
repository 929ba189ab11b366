"""A run that the notebooks make for themselves: the digits in about a minute, for looking at.

The network and the data of `configs/digits.py`, trained for less time and with other settings of the
optimiser. For figures that mean something, use that.
"""

from pathlib import Path

from absl import logging

from piflow_jax.config import base_config, parse
from piflow_jax.modes.train import train


def quick_run(workdir: str = "runs/notebook") -> str:
    """Trains a teacher and a student, unless the directory has them already.

    Args:
      workdir: where to.

    Returns:
      The directory.
    """
    if (Path(workdir) / "report.json").exists():
        return workdir
    config = base_config()
    config.data.name = "digits"
    config.model.dit.depth = 2
    config.teacher.steps = 600
    config.teacher.batch_size = 64
    config.train.steps = 200
    config.train.batch_size = 32
    for optimizer in (config.teacher.optimizer, config.train.optimizer):
        optimizer.kind = "muon"
        optimizer.learning_rate = 3e-3
        optimizer.beta2 = 0.99
        optimizer.decay = "cosine"
        optimizer.ema_gamma = 40.0
    config.evaluation.num_samples = 100
    config.evaluation.teacher_steps = (1,)
    config.evaluation.batch_size = 100
    logging.set_verbosity(logging.ERROR)
    train(parse(config), workdir)
    return workdir
