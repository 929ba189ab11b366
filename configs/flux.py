r"""FLUX.1 [dev] at 4 and 8 network evaluations: the recipes of the paper's section 5.

Prompts' embeddings once (docs/text_to_image.md), then a student of the official weights, the folder
`transformer` of FLUX.1 [dev]:

    python -m piflow_jax.main --config=configs/flux.py:datafree --workdir=runs/flux \
        --config.data.data_dir=data/prompts_flux --config.teacher.weights=FLUX.1-dev/transformer

What its step takes on a TPU slice that need not be attached:

    python -m piflow_jax.main --config=configs/flux.py:datafree --workdir=runs/compile \
        --mode=compile --config.topology=v5p:4x4x4

(`--mode=compile_sampling` is the sampler's.)

Variants:

    gm_4nfe   Gaussian mixture, 4 evaluations, of image latents with prompts (the default)
    gm_8nfe   the same with 8 evaluations
    dx_4nfe   grid of 10 x_0, 4 evaluations
    datafree  Gaussian mixture, 4 evaluations, of prompts alone
    runlocal  datafree's program at toy size on captioned digits, teacher included

Students are adapters (rank 256), the output head and the last modulation; everything else is the
teacher's. No official weights were on the machine that this was written on: at full size these
programs have been compiled, not run. docs/text_to_image.md says what has been shown.
"""

import ml_collections

from piflow_jax.config import base_config, check_variant

VARIANTS = ("gm_4nfe", "gm_8nfe", "dx_4nfe", "datafree", "runlocal")


def get_config(variant: str = "gm_4nfe") -> ml_collections.ConfigDict:
    """The configuration of a variant.

    Args:
      variant: what follows the colon of `--config`.

    Returns:
      The configuration.

    Raises:
      ConfigError: there is no such variant.
    """
    check_variant(variant, VARIANTS)
    config = base_config()
    config.data.name = "prompts"

    config.model.network = "flux"
    config.model.flux.patch_size = 2
    config.model.flux.hidden = 3072
    config.model.flux.num_heads = 24
    config.model.flux.depth = 19
    config.model.flux.single_depth = 38
    config.model.flux.rope_axes = (16, 56, 56)
    config.model.flux.distilled_guidance = 3.5
    config.model.flux.lora_rank = 256
    config.model.flux.lora_dropout = 0.05
    config.model.dtype = "bfloat16"
    config.model.flux.base_dtype = "bfloat16"
    config.model.flux.time_dtype = "bfloat16"
    config.model.remat = "full"

    config.teacher.batch_size = 256

    config.policy.kind = "gm"
    config.policy.num_components = 8
    config.policy.logstd_hidden = 1024

    config.train.steps = 3000
    config.train.batch_size = 256
    config.train.nfe = 4
    config.train.final_step_size_scale = 0.5
    config.train.shift = 3.2
    config.train.total_substeps = 128
    config.train.num_states = 4
    config.train.window_substeps = 3
    config.train.gm_dropout = 0.1
    config.train.mixing_steps = 2000
    config.train.loss_scale = 30.0
    config.train.optimizer.learning_rate = 1e-4
    config.train.optimizer.warmup_steps = 100
    config.checkpoint_every = 100

    config.mesh.data = -1
    config.mesh.fsdp = -1

    config.evaluation.batch_size = 64
    config.evaluation.temperature = 0.3

    if variant == "gm_8nfe":
        config.train.nfe = 8
        config.evaluation.temperature = 0.7
    elif variant == "dx_4nfe":
        config.policy.kind = "dx"
        config.policy.num_grid = 10
        config.train.gm_dropout = 0.0
        config.evaluation.temperature = 1.0
    elif variant == "datafree":
        config.train.data_free = True
        config.train.batch_size = 64  # each walks four segments: 256 gradients, as in the release
    elif variant == "runlocal":
        _miniature(config)
    return config


def _miniature(config: ml_collections.ConfigDict) -> None:
    """The program of `datafree` for two cores: a small network, captions of ten kinds of digits."""
    config.data.name = "captioned_digits"
    config.train.data_free = True
    config.model.flux.hidden = 48
    config.model.flux.num_heads = 3
    config.model.flux.depth = 1
    config.model.flux.single_depth = 2
    config.model.flux.rope_axes = (4, 6, 6)
    config.model.flux.lora_rank = 16
    config.model.dtype = "float32"
    config.model.flux.base_dtype = "float32"
    config.model.flux.time_dtype = "float32"
    config.model.remat = "none"
    config.mesh.fsdp = 1
    config.teacher.steps = 500
    config.teacher.batch_size = 64
    config.teacher.optimizer.learning_rate = 2e-3
    config.teacher.optimizer.decay = "cosine"
    config.train.steps = 150
    config.train.batch_size = 32
    config.train.num_states = 2
    config.train.mixing_steps = 100
    config.train.optimizer.learning_rate = 3e-3
    config.train.optimizer.warmup_steps = 30
    config.train.optimizer.decay = "cosine"
    config.policy.logstd_hidden = 48
    config.checkpoint_every = 1000
    config.evaluation.num_samples = 250
    config.evaluation.batch_size = 250
    config.evaluation.teacher_steps = (4, 8, 64)
    config.evaluation.temperature = 1.0
