"""The main job: a DiT on 1,797 real handwritten digits, distilled into a one-step pi-Flow student.

    python -m piflow_jax.main --config=configs/digits.py --workdir=runs/digits

This trains the teacher (flow matching), distils it (pi-ID), and compares both.

Variants, as in `--config=configs/digits.py:dx`:

    gm        Gaussian-mixture policy, 1 evaluation (the default)
    quick     the same student trained for a quarter of the steps, for a first look
    dx        grid of x_0, 1 evaluation; needs the time-smoothing window
    gm_2nfe   Gaussian-mixture policy, 2 evaluations
    gm_any_nfe  one student for 1, 2, 4 and 8 evaluations
    datafree  2 evaluations, from pure noise: the student's training sees no image
    guided    the teacher guided with scale 2 in [0, 0.6], distilled into 1 evaluation
    gm_any_guidance  one student for all scales from 1 to 4, in the same interval
    rivals    pi-Flow against other few-step methods at equal compute, with --mode=rivals;
              docs/rivals.md has the results

The student's Frechet distance at 1 evaluation is 1.37 times its teacher's at 32, and a fortieth of
its teacher's at 1. Its precision and recall are lower by 0.03, and its endpoints are at a mean
squared distance of 0.0069. docs/results.md has every seed and variant.

On two cores of a shared server (AMD EPYC, 2026-11-30, a slow day) the default took 6 minutes 6
seconds, and both cores together worked for 9 minutes 39 seconds. The student of `quick` has a
distance of 1.67 times its teacher's.
"""

import ml_collections

from piflow_jax.config import base_config, check_variant

VARIANTS = (
    *("gm", "quick", "dx", "gm_2nfe", "gm_any_nfe", "datafree", "guided", "gm_any_guidance"),
    "rivals",
)


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
    config.data.name = "digits"

    config.model.dit.patch_size = 2
    config.model.dit.hidden = 64
    config.model.dit.num_heads = 4
    config.model.dit.depth = 3
    config.model.scan_unroll = 3  # no loop over layers: a fifth faster on a CPU

    # Batches of 64: their activations fit into a core's cache, those of 128 do not.
    config.teacher.steps = 2400
    config.teacher.batch_size = 64
    # In the same steps, AdamW at a constant rate gives three times the distance (docs/recipes.md).
    config.teacher.optimizer.kind = "muon"
    config.teacher.optimizer.learning_rate = 1e-2
    config.teacher.optimizer.beta2 = 0.99
    config.teacher.optimizer.decay = "cosine"

    config.policy.kind = "gm"
    config.policy.num_components = 16
    config.train.steps = 6000
    # In the same time, twice as many steps as with batches of 64, and a better student.
    config.train.batch_size = 32
    # After 1,500 steps Muon's student follows its teacher as closely as AdamW's after 3,000.
    config.train.optimizer.kind = "muon"
    config.train.optimizer.learning_rate = 3e-3
    config.train.optimizer.beta2 = 0.99
    config.train.optimizer.decay = "cosine"
    # The average covers the last fortieth: with a rate that falls to zero, a longer one only lags.
    config.train.optimizer.ema_gamma = 40.0
    # As good as 128 Euler substeps (docs/results.md), and a step takes 0.83 of the time.
    config.train.solver = "multistep"
    config.train.total_substeps = 16
    config.train.gm_dropout = 0.05

    config.evaluation.batch_size = 250
    # 32 steps of second order are closer to the teacher's ODE than 128 of Euler's method.
    config.evaluation.teacher_steps = (1, 2, 4, 8, 32)
    config.evaluation.teacher_solver = "multistep"
    config.evaluation.substeps = 512

    if variant == "quick":
        config.train.steps = 1500
    elif variant == "dx":
        config.train.steps = 1500
        config.policy.kind = "dx"
        config.policy.num_grid = 10
        config.train.gm_dropout = 0.0
        # A window of 10 of 128 substeps, as the paper has it.
        config.train.solver = "euler"
        config.train.total_substeps = 128
        config.train.window_substeps = 10
    elif variant == "gm_2nfe":
        config.train.nfe = 2
        config.train.steps = 1500
    elif variant == "gm_any_nfe":
        config.train.nfe_choices = (1, 2, 4, 8)
    elif variant == "datafree":
        config.train.data_free = True
        config.train.nfe = 2
        config.train.steps = 1000  # each step has two segments, and so two student evaluations
    elif variant in ("guided", "gm_any_guidance"):
        if variant == "gm_any_guidance":
            config.teacher.guidance_range = (1.0, 4.0)
        config.teacher.guidance_scale = 2.0
        config.teacher.guidance_interval = (0.0, 0.6)
        config.train.steps = 3000
    elif variant == "rivals":
        # Thirteen methods with three seeds need a network that trains in seconds, not minutes.
        config.model.dit.hidden = 32
        config.model.dit.depth = 2
        config.model.scan_unroll = 2
        # Some rivals learn from derivatives with respect to time, which vary wildly at a scale of
        # 1000.
        config.model.dit.time_scale = 1.0
        config.policy.num_components = 8
        config.train.solver = "euler"
        config.train.total_substeps = 32
        config.train.optimizer.warmup_steps = 20
        config.evaluation.teacher_steps = (1, 2, 4, 32)
        config.evaluation.num_samples = 2000
        config.evaluation.substeps = 64
        with_teacher = ("meanflow+teacher", "meanflow+teacher@3")
        config.rivals.methods = (*config.rivals.methods, "gm_timed", *with_teacher)
        config.rivals.seconds = 10.0
        config.rivals.pairs = 2000
    return config
