"""Pictures of your own, from a folder to a one-step student, its figures and a grid: one command.

    python -m piflow_jax.main --config=configs/images.py --workdir=runs/mine \
        --config.data.images=FOLDER

This decodes the pictures once into `runs/mine/data`, trains the teacher (flow matching), distils it
(pi-ID), and compares both. After a kill, the same command continues.

`data.images` is a folder of class folders, a folder of pictures (then a single class), a `.tar` of
either, or `tfds:NAME`, a set that TFDS has prepared as ArrayRecord. Pictures may have any size and
any format that Pillow reads. `data.image_size` (32) is the side of the crop at their centre. Files
that cannot be read are listed by path, and left out with `--config.data.skip_refused`. Sets without
colours become grey (`data.channels`). `--config.data.mirror` adds mirror images.

The pixels can also be prepared beforehand, by several processes, and shared between runs:

    python -m piflow_jax.main --config=configs/images.py --workdir=runs/prepare --mode=prepare \
        --config.data.images=FOLDER --config.data.data_dir=data/mine

Runs then take `--config.data.data_dir=data/mine` alone.

Variants, as in `--config=configs/images.py:quick`:

    gm     Gaussian-mixture policy, 1 evaluation, for an accelerator (the default)
    quick  a small network for a first look on a CPU

On the 2,000 tiles of `python -m benchmarks.picture_tiles FOLDER`, `quick` took 7 minutes 28 seconds
on two cores (2026-11-29): decoding, teacher, student, a feature space for these pictures, figures
and a grid. In that feature space the student at 1 evaluation had a Frechet distance of 2.35, and
its teacher 2.98 at 32 and 25.0 at 1. The two halves of the data had a distance of 0.77. After so
little training the teacher's patches are visible, and the student reproduces them. The default
variant has not been run.
"""

import ml_collections

from piflow_jax.config import base_config, check_variant

VARIANTS = ("gm", "quick")


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
    config.data.name = "images"
    config.data.image_size = 32

    config.model.dit.patch_size = 2
    config.model.dit.hidden = 384
    config.model.dit.num_heads = 6
    config.model.dit.depth = 12
    config.model.dtype = "bfloat16"

    config.teacher.steps = 50_000
    config.teacher.batch_size = 256
    config.teacher.optimizer.learning_rate = 3e-4
    config.teacher.optimizer.warmup_steps = 1000

    config.policy.kind = "gm"
    config.policy.num_components = 16
    config.train.steps = 50_000
    config.train.batch_size = 128
    config.train.optimizer.kind = "muon"
    config.train.optimizer.learning_rate = 1e-3
    config.train.optimizer.beta2 = 0.99
    config.train.optimizer.decay = "cosine"
    config.train.total_substeps = 32
    config.train.gm_dropout = 0.05
    # Otherwise a network of pixels spends its capacity near the data, where little is left to
    # decide.
    config.train.time_power = 1.0

    config.evaluation.batch_size = 250
    config.evaluation.teacher_steps = (1, 2, 4, 8, 32)
    config.evaluation.grid_samples = 10

    if variant == "quick":
        config.model.dit.patch_size = 4
        config.model.dit.hidden = 64
        config.model.dit.num_heads = 4
        config.model.dit.depth = 3
        config.model.scan_unroll = 3
        config.model.dtype = "float32"
        config.teacher.steps = 1500
        config.teacher.batch_size = 64
        config.teacher.optimizer.learning_rate = 1e-3
        config.teacher.optimizer.warmup_steps = 100
        config.policy.num_components = 8
        config.train.steps = 1200
        config.train.batch_size = 32
        config.train.optimizer.learning_rate = 3e-3
        config.evaluation.num_samples = 2000
        config.evaluation.teacher_steps = (1, 4, 32)
    return config
