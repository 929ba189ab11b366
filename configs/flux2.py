r"""FLUX.2 [dev] and [klein] at 4 network evaluations, for text to image and for editing.

First prepare the embeddings of the prompts (docs/text_to_image.md). Then distil the official
weights, the folder `transformer` of FLUX.2 [dev]:

    python -m piflow_jax.main --config=configs/flux2.py:datafree --workdir=runs/flux2 \
        --config.data.data_dir=data/prompts_flux2 --config.teacher.weights=FLUX.2-dev/transformer

This compiles the step for a TPU slice that need not be attached, and reports memory and FLOPs:

    python -m piflow_jax.main --config=configs/flux2.py:datafree --workdir=runs/compile \
        --mode=compile --config.topology=v5p:4x4x4

`--mode=compile_sampling` does the same for the sampler.

Variants:

    gm_4nfe        Gaussian mixture, 4 evaluations, on image latents with prompts (the default)
    datafree       the same on prompts alone
    edit           gm_4nfe with up to four reference images, on cached edit pairs
    edit_datafree  datafree with reference images, on prompts and the images that they edit
    runlocal       edit_datafree's program at toy size on digits, teacher included

    klein_4b, klein_9b   alone, or with _datafree, _edit or _edit_datafree behind them: the same
                         for FLUX.2 [klein] Base

FLUX.2 is one network for text to image and editing, so a student of `edit` also draws prompts
without references. [klein]'s teacher is guided by the empty prompt's embedding with scale 4. Its
student is not guided.

Mixture, shift, last segment and guidance are those of the released pi-FLUX.2. Its training settings
are not published, and the rest is FLUX.1's recipe. Students are adapters (rank 256), the output
head and the last modulation; everything else is the teacher's. At full size these programs have not
run, because no official weights were available. docs/text_to_image.md says what has been shown, and
which slices they do not fit.
"""

import ml_collections

from piflow_jax.config import check_variant
from piflow_jax.config.text_to_image import miniature, text_to_image

__all__ = ["VARIANTS", "get_config"]

# Variants of a network, with the plain variant whose recipe each has, and reference images.
RECIPES = {
    "gm_4nfe": ("gm_4nfe", 0),
    "datafree": ("datafree", 0),
    "edit": ("gm_4nfe", 4),
    "edit_datafree": ("datafree", 4),
    "runlocal": ("runlocal", 1),
}
# By prefix: width, heads, double and single blocks, width of the text, and distilled guidance.
DEV = (6144, 48, 8, 48, 15360, 4.0)
KLEIN = {
    "klein_4b": (3072, 24, 5, 20, 7680, 0.0),
    "klein_9b": (4096, 32, 8, 24, 12288, 0.0),
}
VARIANTS = (
    *RECIPES,
    *(f"{k}{s}" for k in KLEIN for s in ("", "_datafree", "_edit", "_edit_datafree")),
)


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
    klein = next((name for name in KLEIN if variant.startswith(name)), "")
    recipe, references = RECIPES[variant.removeprefix(klein).removeprefix("_") or "gm_4nfe"]
    config = text_to_image("flux2", recipe)
    own = config.model.flux2
    own.hidden, own.num_heads, own.depth, own.single_depth, *others = KLEIN.get(klein, DEV)
    own.text_features, own.distilled_guidance = others
    own.rope_axes = (32, 32, 32, 32)
    own.references = references
    if klein:
        config.teacher.guidance_scale = 4.0
    config.train.steps = 3000
    config.train.num_states = 4
    config.train.mixing_steps = 2000
    if recipe == "runlocal":
        miniature(config)
        own.rope_axes = (4, 4, 4, 4)
        own.depth = 1
        own.single_depth = 2
        config.train.mixing_steps = 100
    return config
