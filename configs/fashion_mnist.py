"""Fashion-MNIST, 28x28, all 70,000 images: the job that shows what one evaluation can do.

    python -m piflow_jax.main --config=configs/fashion_mnist.py --workdir=runs/fashion_mnist

The data are the four IDX files of `--config.data.data_dir`, TFDS `fashion_mnist` where it has been
prepared, or Debian's package `dataset-fashion-mnist`. Figures are taken against the test images.

Variants, as in `--config=configs/fashion_mnist.py:gm_corrected`:

    gm            Gaussian-mixture policy, 1 evaluation (the default)
    gm_corrected  600 more steps with the marginal corrector, for the student that ships with the
                  package:
                  --config.train.initial=fashion_mnist --config.teacher.weights=fashion_mnist
                  or that of a run:
                  --config.train.initial=runs/fashion_mnist
                  --config.teacher.checkpoint=runs/fashion_mnist
    gm_frechet    the same with the Frechet distance to the training data, in the features of a
                  network of its own
    rivals        pi-Flow against other few-step methods at equal compute, with --mode=rivals and
                  --config.teacher.checkpoint=runs/fashion_mnist; docs/rivals.md has the results
"""

import ml_collections

from piflow_jax.config import base_config, check_variant

VARIANTS = ("gm", "gm_corrected", "gm_frechet", "rivals")


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
    config.data.name = "fashion_mnist"

    config.model.dit.patch_size = 4
    config.model.dit.hidden = 96
    config.model.dit.num_heads = 4
    config.model.dit.depth = 4
    config.model.scan_unroll = 4

    config.teacher.steps = 12_000
    config.teacher.batch_size = 64
    config.teacher.optimizer.kind = "muon"
    config.teacher.optimizer.learning_rate = 2e-3
    config.teacher.optimizer.decay = "cosine"
    config.teacher.optimizer.warmup_steps = 200

    config.policy.kind = "gm"
    config.policy.num_components = 16
    config.train.steps = 3000
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

    config.evaluation.num_samples = 5000
    config.evaluation.batch_size = 250
    config.evaluation.teacher_steps = (1, 2, 4, 8, 16, 64)
    # 64 steps of Euler's method are not enough for this teacher.
    config.evaluation.teacher_solver = "multistep"
    config.evaluation.substeps = 64
    config.evaluation.grid_samples = 10

    if variant in ("gm_corrected", "gm_frechet"):
        config.train.steps = 600
        config.train.optimizer.learning_rate = 1e-3
        config.train.optimizer.warmup_steps = 50
        config.train.corrector.share = 0.5
        config.train.corrector.start = 60
    if variant == "gm_frechet":
        config.train.corrector.kind = "frechet"
        config.train.corrector.population = 2048
    if variant == "gm_corrected":
        config.train.corrector.kind = "critic"
        # A student that follows the corrector more than pi-ID needs a critic that keeps up with it.
        config.train.corrector.scale = 4.0
        config.train.corrector.critic_steps = 4
        config.train.corrector.optimizer.kind = "muon"
        config.train.corrector.optimizer.learning_rate = 1e-3
        config.train.corrector.optimizer.warmup_steps = 20
    if variant == "rivals":
        config.train.optimizer.warmup_steps = 20
        optimizer = config.train.optimizer.copy_and_resolve_references()
        config.train.corrector.optimizer = optimizer  # of gm_corrected
        config.evaluation.teacher_steps = (1, 64)
        # The factors are those of the search in docs/rivals.md.
        config.rivals.methods = (
            *("gm", "dmd@10", "pdd"),
            *("reflow", "meanflow@3", "consistency@0.3"),
        )
        config.rivals.nfes = (1,)
        config.rivals.seconds = 240.0
        config.rivals.pairs = 2000
    return config
