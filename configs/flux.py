r"""FLUX.1 [dev] at 4 and 8 network evaluations: the recipes of the paper's section 5.

First prepare the embeddings of the prompts (docs/text_to_image.md). Then distil the official
weights, the folder `transformer` of FLUX.1 [dev]:

    python -m piflow_jax.main --config=configs/flux.py:datafree --workdir=runs/flux \
        --config.data.data_dir=data/prompts_flux --config.teacher.weights=FLUX.1-dev/transformer

This compiles the step for a TPU slice that need not be attached, and reports memory and FLOPs:

    python -m piflow_jax.main --config=configs/flux.py:datafree --workdir=runs/compile \
        --mode=compile --config.topology=v5p:4x4x4

`--mode=compile_sampling` does the same for the sampler.

Variants:

    gm_4nfe   Gaussian mixture, 4 evaluations, on image latents with prompts (the default)
    gm_8nfe   the same with 8 evaluations
    dx_4nfe   grid of 10 x_0, 4 evaluations
    datafree  Gaussian mixture, 4 evaluations, on prompts alone
    arc_2nfe  ArcFlow's recipe: 16 growing velocities, 2 evaluations, on prompts alone
    runlocal  datafree's program at toy size on captioned digits, teacher included

    kontext           gm_4nfe for FLUX.1 Kontext [dev], which edits an image, on cached edit pairs
    kontext_datafree  datafree for FLUX.1 Kontext, on prompts and the images that they edit
    kontext_runlocal  runlocal on digits that are inverted or moved

Students are adapters (rank 256), the output head and the last modulation; everything else is the
teacher's. Without references, these programs have been compiled at full size. None has run at full
size, because no official weights were available. docs/text_to_image.md says what has been shown.
"""

import ml_collections

from piflow_jax.config import check_variant
from piflow_jax.config.text_to_image import VARIANTS as PLAIN
from piflow_jax.config.text_to_image import miniature, text_to_image

__all__ = ["VARIANTS", "get_config"]

# Editing variants, with the plain variant whose recipe each has.
EDITING = {"kontext": "gm_4nfe", "kontext_datafree": "datafree", "kontext_runlocal": "runlocal"}
VARIANTS = (*PLAIN, *EDITING)


def get_config(variant: str = "gm_4nfe") -> ml_collections.ConfigDict:
    """The configuration of a variant.

    Args:
      variant: the part of `--config` after the colon.

    Returns:
      The configuration.

    Raises:
      ConfigError: there is no such variant.
    """
    check_variant(variant, VARIANTS)
    editing, variant = variant in EDITING, EDITING.get(variant, variant)
    config = text_to_image("flux", variant)
    config.model.flux.depth = 19
    config.model.flux.single_depth = 38
    config.model.flux.distilled_guidance = 2.5 if editing else 3.5
    config.model.flux.references = 1 if editing else 0
    config.train.steps = 3000
    config.train.num_states = 4
    config.train.mixing_steps = 2000
    if variant == "arc_2nfe":
        config.train.steps = 10_000
    if variant == "runlocal":
        miniature(config)
        config.model.flux.depth = 1
        config.model.flux.single_depth = 2
        config.train.mixing_steps = 100
    return config
