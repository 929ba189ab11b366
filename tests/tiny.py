"""A configuration small enough to train in a test; a config file like those of `configs/`."""

from piflow_jax.config import base_config


def get_config():
    """A few steps of a one-block DiT on the digits."""
    config = base_config()
    config.model.dit.hidden = 16
    config.model.dit.num_heads = 2
    config.model.dit.depth = 1
    config.policy.num_components = 2
    config.policy.logstd_hidden = 8
    config.teacher.steps = 6
    config.teacher.batch_size = 8
    config.train.steps = 6
    config.train.batch_size = 8
    config.train.total_substeps = 8
    for optimizer in (config.teacher.optimizer, config.train.optimizer):
        optimizer.warmup_steps = 2
    config.evaluation.num_samples = 20
    config.evaluation.batch_size = 10
    config.evaluation.teacher_steps = (1, 2)
    config.evaluation.grid_samples = 10
    config.log_every = 2
    config.checkpoint_every = 4
    return config
