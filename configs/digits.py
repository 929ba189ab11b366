"""The main job: a DiT on 1,797 handwritten digits, distilled into a one-step pi-Flow student.

    python -m piflow_jax.main --config=configs/digits.py --workdir=runs/digits
"""

import ml_collections

from piflow_jax.config import base_config

VARIANTS = ("gm", "dx", "gm_2nfe", "datafree", "guided")


def get_config(variant: str = "gm") -> ml_collections.ConfigDict:
    """The configuration of a variant."""
    if variant not in VARIANTS:
        raise ValueError(f"configs/digits.py has the variants {', '.join(VARIANTS)}, not {variant!r}")
    config = base_config()
    config.data.name = "digits"
    config.model.hidden = 64
    config.model.num_heads = 4
    config.model.depth = 3
    config.model.scan_unroll = 3
    config.teacher.steps = 2500
    config.teacher.batch_size = 64
    config.train.steps = 3000
    config.train.batch_size = 64
    config.train.total_substeps = 64
    config.train.optimizer.learning_rate = 2e-3
    config.train.optimizer.decay = "cosine"
    return config
