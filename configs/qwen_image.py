r"""Qwen-Image at 4 network evaluations, the recipe of the paper's section 5, and at 8.

First prepare the embeddings of the prompts (docs/text_to_image.md). Then distil the official
weights, the folder `transformer` of Qwen-Image:

    python -m piflow_jax.main --config=configs/qwen_image.py:datafree --workdir=runs/qwen_image \
        --config.data.data_dir=data/prompts_qwen --config.teacher.weights=Qwen-Image/transformer

This compiles the step for a TPU slice that need not be attached, and reports memory and FLOPs:

    python -m piflow_jax.main --config=configs/qwen_image.py:datafree --workdir=runs/compile \
        --mode=compile --config.topology=v5p:4x4x4

`--mode=compile_sampling` does the same for the sampler.

Variants:

    gm_4nfe   Gaussian mixture, 4 evaluations, on image latents with prompts (the default)
    gm_8nfe   the same with 8 evaluations; this recipe is ours, the paper has none
    dx_4nfe   grid of 10 x_0, 4 evaluations
    dx_polynomial_4nfe  the same with a polynomial of 10 coefficients
    datafree  Gaussian mixture, 4 evaluations, on prompts alone
    arc_2nfe  ArcFlow's recipe: 16 growing velocities, 2 evaluations, on prompts alone
    runlocal  datafree's program at toy size on captioned digits, teacher included

    edit                gm_4nfe for Qwen-Image-Edit, which edits an image, on cached edit pairs
    edit_datafree       datafree for Qwen-Image-Edit, on prompts and the images that they edit
    edit_2509           edit for Qwen-Image-Edit-2509, which takes up to three images
    edit_2509_datafree  edit_datafree for Qwen-Image-Edit-2509
    edit_runlocal       runlocal on digits that are inverted or moved

Qwen-Image-2512 is another teacher of the same network: its folder `transformer` is given as the
weights, and its own folder as the text encoder.

The teacher is guided by the empty prompt's embedding with scale 4. Students are not guided. They
are adapters (rank 256), the output head and the last modulation; everything else is the teacher's.
Without references, these programs have been compiled at full size. None has run at full size,
because no official weights were available. docs/text_to_image.md says what has been shown.
"""

import ml_collections

from piflow_jax.config import check_variant
from piflow_jax.config.text_to_image import VARIANTS as PLAIN
from piflow_jax.config.text_to_image import miniature, text_to_image

__all__ = ["VARIANTS", "get_config"]

# Editing variants: the plain variant whose recipe each has, the number of reference images, and the
# tokens of a prompt with what its encoder sees of them.
EDITING = {
    "edit": ("gm_4nfe", 1, 2048),
    "edit_datafree": ("datafree", 1, 2048),
    "edit_2509": ("gm_4nfe", 3, 1024),
    "edit_2509_datafree": ("datafree", 3, 1024),
    "edit_runlocal": ("runlocal", 1, 512),
}
VARIANTS = (*PLAIN, "dx_polynomial_4nfe", *EDITING)


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
    variant, references, text_length = EDITING.get(variant, (variant, 0, 512))
    polynomial = variant == "dx_polynomial_4nfe"
    config = text_to_image("qwen_image", "dx_4nfe" if polynomial else variant)
    config.data.text_length = text_length
    config.model.qwen_image.references = references
    config.model.qwen_image.depth = 60
    config.teacher.guidance_scale = 4.0
    config.train.steps = 9000
    config.train.num_states = 2
    if polynomial:
        config.policy.mode = "polynomial"
    if variant == "arc_2nfe":
        config.train.steps = 15_000
        config.train.num_states = 4
        config.train.mixing_steps = 1000
    if variant == "runlocal":
        miniature(config)
        config.model.qwen_image.depth = 3
    return config
