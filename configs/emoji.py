"""Colour emoji, 32x32: the pictures of the font Noto Color Emoji, in nine classes.

    python -m piflow_jax.main --config=configs/emoji.py --workdir=runs/emoji

The data are two files in `--config.data.data_dir`, `NotoColorEmoji.ttf` and `emoji-test.txt`, or
those of Debian's packages `fonts-noto-color-emoji` and `unicode-data`. The font is read by
fontTools, `pip install -e ".[emoji]"`. There are 3,315 training and 332 test images. So few test
images make figures that only compare rows of one report.
"""

import ml_collections

from piflow_jax.config import base_config, check_variant

VARIANTS = ("gm",)


def get_config(variant: str = "gm") -> ml_collections.ConfigDict:
    """The configuration of a variant.

    Args:
      variant: the part of `--config` after the colon; there is one.

    Returns:
      The configuration.

    Raises:
      ConfigError: there is no such variant.
    """
    check_variant(variant, VARIANTS)
    config = base_config()
    config.data.name = "emoji"

    config.model.dit.patch_size = 4
    config.model.dit.hidden = 128
    config.model.dit.num_heads = 4
    config.model.dit.depth = 4
    config.model.scan_unroll = 4

    config.teacher.steps = 6000
    config.teacher.batch_size = 64
    config.teacher.optimizer.kind = "muon"
    config.teacher.optimizer.learning_rate = 2e-3
    config.teacher.optimizer.decay = "cosine"
    config.teacher.optimizer.warmup_steps = 200

    config.policy.kind = "gm"
    config.policy.num_components = 16
    config.train.steps = 2000
    config.train.batch_size = 64
    config.train.optimizer.kind = "muon"
    config.train.optimizer.learning_rate = 3e-3
    config.train.optimizer.beta2 = 0.99
    config.train.optimizer.decay = "cosine"
    config.train.solver = "multistep"
    config.train.total_substeps = 16
    config.train.gm_dropout = 0.05
    # Otherwise a network of pixels spends its capacity near the data, where little is left to
    # decide.
    config.train.time_power = 1.0

    config.evaluation.num_samples = 2000
    config.evaluation.batch_size = 250
    config.evaluation.teacher_steps = (1, 2, 4, 8, 16, 64)
    # 64 steps of Euler's method are not enough for this teacher.
    config.evaluation.teacher_solver = "multistep"
    config.evaluation.substeps = 64
    config.evaluation.grid_samples = 9
    return config
