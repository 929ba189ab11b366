"""A configuration of a network that reads text, small enough to train in a test."""

from piflow_jax.config import base_config
from tests import tiny


def get_config(network="flux"):
    """A few steps of a network of one block of each kind on captioned digits."""
    config = tiny.get_config()
    config.model = base_config().model
    config.data.name = "captioned_digits"
    config.model.network = network
    own = config.model[network]
    own.hidden = 16
    own.num_heads = 2
    own.depth = 1
    if "single_depth" in own:
        own.single_depth = 1
    own.rope_axes = (2,) * 4 if len(own.rope_axes) == 4 else (4, 2, 2)
    own.lora_rank = 3
    config.train.nfe = 2
    config.train.final_step_size_scale = 0.5
    config.train.shift = 3.2
    config.train.data_free = True
    config.train.window_substeps = 1
    return config
