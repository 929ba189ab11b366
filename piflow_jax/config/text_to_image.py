"""The common part of the recipes of FLUX.1, FLUX.2 and Qwen-Image (arXiv 2510.14974, section 5).

It is not in `configs/`, because files there are loaded by path and cannot import each other.
"""

import ml_collections

from piflow_jax.config.parsing import base_config, check_variant

VARIANTS = ("gm_4nfe", "gm_8nfe", "dx_4nfe", "datafree", "arc_2nfe", "runlocal")


def text_to_image(network: str, variant: str) -> ml_collections.ConfigDict:
    """A configuration at full size, without depth, guidance, and numbers of steps and states.

    Args:
      network: key of `config.model`.
      variant: one of `VARIANTS`; `runlocal` gives the program that `miniature` shrinks.

    Returns:
      The configuration.

    Raises:
      ConfigError: there is no such variant.
    """
    check_variant(variant, VARIANTS)
    config = base_config()
    config.data.name = "prompts"

    config.model.network = network
    own = config.model[network]
    own.patch_size = 2
    own.hidden = 3072
    own.num_heads = 24
    own.rope_axes = (16, 56, 56)
    own.lora_rank = 256
    own.lora_dropout = 0.05
    own.base_dtype = "bfloat16"
    own.time_dtype = "bfloat16"
    config.model.dtype = "bfloat16"
    config.model.remat = "full"

    config.teacher.batch_size = 256

    config.policy.kind = "gm"
    config.policy.num_components = 8
    config.policy.logstd_hidden = 1024

    config.train.batch_size = 256
    config.train.nfe = 4
    config.train.final_step_size_scale = 0.5
    config.train.shift = 3.2
    config.train.total_substeps = 128
    config.train.window_substeps = 3
    config.train.gm_dropout = 0.1
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
    elif variant == "arc_2nfe":  # from the code of ArcFlow (arXiv 2602.09014)
        config.policy.kind = "arc"
        config.policy.num_components = 16
        config.train.nfe = 2
        config.train.final_step_size_scale = 1.0
        config.train.num_states = 4
        config.train.optimizer.growth_rate_scale = 0.1
        config.train.data_free = True
        config.train.batch_size = 16  # on four GPUs
        config.evaluation.temperature = 1.0
    elif variant in ("datafree", "runlocal"):
        config.train.data_free = True
        config.train.batch_size = 64  # each walks four segments: 256 gradients, as in the release
    return config


def miniature(config: ml_collections.ConfigDict) -> None:
    """Shrinks everything except the depth for two cores.

    Prompts are captions of ten kinds of digits; for a network that edits, edits of digits.
    """
    own = config.model[config.model.network]
    config.data.name = "edited_digits" if own.references else "captioned_digits"
    own.hidden = 48
    own.num_heads = 3
    own.rope_axes = (4, 6, 6)
    own.lora_rank = 16
    own.base_dtype = "float32"
    own.time_dtype = "float32"
    config.model.dtype = "float32"
    config.model.remat = "none"
    config.mesh.fsdp = 1
    config.teacher.steps = 500
    config.teacher.batch_size = 64
    config.teacher.optimizer.learning_rate = 2e-3
    config.teacher.optimizer.decay = "cosine"
    config.train.steps = 150
    config.train.batch_size = 32
    config.train.num_states = 2
    config.train.optimizer.learning_rate = 3e-3
    config.train.optimizer.warmup_steps = 30
    config.train.optimizer.decay = "cosine"
    config.policy.logstd_hidden = 48
    config.checkpoint_every = 1000
    config.evaluation.num_samples = 250
    config.evaluation.batch_size = 250
    config.evaluation.teacher_steps = (4, 8, 64)
    config.evaluation.temperature = 1.0
