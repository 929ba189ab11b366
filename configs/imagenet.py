r"""ImageNet 256 in the latents of Stable Diffusion: the recipes of the paper's Table 2.

First prepare the latents (`data.images` is a folder of class folders, the official tar, or
tfds:imagenet2012):

    python -m piflow_jax.main --config=configs/imagenet.py --workdir=runs/prepare --mode=prepare \
        --config.data.images=ILSVRC2012_img_train.tar --config.data.vae=sd-vae-ft-ema.safetensors \
        --config.data.data_dir=gs://bucket/imagenet/latents/1.0.0

Then distil official teacher weights:

    python -m piflow_jax.main --config=configs/imagenet.py:gm_repa --workdir=gs://bucket/gm_repa \
        --config.data.data_dir=gs://bucket/imagenet/latents/1.0.0 \
        --config.teacher.weights=gs://bucket/teacher.pth

On one machine all of these can be local paths. In a bucket they need `pip install -e ".[gcs]"`.

REPA's own `.pth` also needs `--config.teacher.weights_format=original_dit`. Every
`evaluation.every` steps, the run decodes a grid for TensorBoard (with `data.vae`). With
`evaluation.features` and `evaluation.reference` it also measures FID and keeps the best checkpoint.

This measures FID, sFID, IS, precision and recall of 50,000 samples, of that run or, with
`evaluation.weights`, of official student weights alone. ADM's own evaluator can read samples.npz:

    python -m piflow_jax.main --config=configs/imagenet.py:gm_repa --workdir=gs://bucket/gm_repa \
        --mode=evaluate --config.data.vae=sd-vae-ft-ema.safetensors \
        --config.evaluation.features=pt_inception-2015-12-05-6726825d.pth \
        --config.evaluation.reference=VIRTUAL_imagenet256_labeled.npz \
        --config.evaluation.weights=student.safetensors

`--mode=sample` needs `data.vae` only, and `--mode=export` writes official names.

This compiles the step for a TPU slice that need not be attached, and reports memory and FLOPs:

    python -m piflow_jax.main --config=configs/imagenet.py:gm_repa --workdir=runs/compile \
        --mode=compile --config.topology=v5e:4x4

Variants:

    gm_repa       Gaussian mixture of the REPA teacher, 1 evaluation (the default; paper: FID 2.85)
    gm_repa_2nfe  the same with 2 evaluations (paper: FID 1.97)
    gm_repae      gm_repa's recipe for the REPA-E teacher, in the latents of VA-VAE
    gm_repae_2nfe the same with 2 evaluations
    gm_fm         Gaussian mixture of the flow-matching teacher, 1 evaluation (paper: FID 3.34)
    dx_repa_10    grid of 10 x_0 of the REPA teacher, window 10 of 128
    dx_repa_20    grid of 20, window 5
    dx_repa_40    grid of 40, window 3
    gm_repa_corrected  28,000 more steps with the marginal corrector on half of each batch, for the
                  student in train.initial; it is beyond the paper and has not been trained at
                  this size
    runlocal      gm_repa's recipe at toy size on the digits, teacher included; 75 seconds on two
                  cores; the student at 1 evaluation is then about as good as its (guided,
                  undertrained) teacher at 32

The REPA-E teacher (arXiv 2504.10483) needs latents of its own, prepared with `data.vae` as the
folder `REPA-E/e2e-vavae-hf`, whose config.json has their mean and standard deviation. Its guidance
and its sampler are those of the release's own samples (FID 1.12 at 250 steps of its SDE). The
release has no student of it. This measures the teacher in the same way as a student:

    ... --mode=evaluate --config.evaluation.system=teacher \
        --config.teacher.weights=repae_vavae_imagenet.safetensors

The figures in brackets are the paper's. There are none of ours, because neither ImageNet nor
official weights were available: training, sampling and evaluation have run on small files in the
official formats only.
"""

import ml_collections

from piflow_jax.config import base_config, check_variant

VARIANTS = (
    "gm_repa",
    "gm_repa_2nfe",
    "gm_repae",
    "gm_repae_2nfe",
    "gm_fm",
    "dx_repa_10",
    "dx_repa_20",
    "dx_repa_40",
    "gm_repa_corrected",
    "runlocal",
)
# Grid points of the DX policy, and the window that its training needs in order not to diverge.
DX_WINDOWS = {10: 10, 20: 5, 40: 3}


def get_config(variant: str = "gm_repa") -> ml_collections.ConfigDict:
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
    config.data.name = "latents"
    config.data.image_size = 256

    # DiT-XL/2
    config.model.dit.patch_size = 2
    config.model.dit.hidden = 1152
    config.model.dit.num_heads = 16
    config.model.dit.depth = 28
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.model.dit.time_scale = 1000.0 if variant == "gm_fm" else 1.0

    config.teacher.guidance_scale = 3.2
    config.teacher.guidance_interval = (0.0, 0.7)

    config.policy.kind = "gm"
    config.policy.num_components = 32
    config.policy.logstd_hidden = 1024

    config.train.steps = 140_000
    config.train.batch_size = 4096
    config.train.microbatches = 4
    config.train.total_substeps = 128
    config.train.num_states = 2
    config.train.gm_dropout = 0.05
    config.train.loss_scale = 3.0
    config.train.optimizer.learning_rate = 5e-5
    config.train.optimizer.warmup_steps = 400

    # Up to 16 devices share a copy of the state, see docs/scaling.md.
    config.mesh.data = -1
    config.mesh.fsdp = -1

    config.evaluation.num_samples = 50_000
    config.evaluation.batch_size = 256
    # The eight classes in the figures of DiT's authors.
    config.evaluation.grid_classes = (207, 360, 387, 974, 88, 979, 417, 279)
    config.evaluation.grid_samples = 8
    config.evaluation.every_samples = 5000

    if variant.endswith("_2nfe"):
        config.train.nfe = 2
        config.train.steps = 24_000
    if variant == "gm_fm":
        config.teacher.guidance_scale = 2.7
        config.teacher.guidance_interval = (0.0, 0.6)
    elif variant in ("gm_repae", "gm_repae_2nfe"):
        config.data.latents = "va_vae"
        config.model.dit.patch_size = 1
        config.teacher.guidance_scale = 2.4
        config.teacher.guidance_interval = (0.0, 0.73)
        config.evaluation.teacher_solver = "sde"
        config.evaluation.teacher_steps = (250,)
    elif variant == "gm_repa_2nfe":
        config.teacher.guidance_scale = 2.8
    elif variant == "gm_repa_corrected":
        # As on Fashion-MNIST: a fifth of the student's steps, at a third of its learning rate.
        config.train.steps = 28_000
        config.train.optimizer.learning_rate = 1.7e-5
        config.train.corrector.kind = "critic"
        config.train.corrector.share = 0.5
        config.train.corrector.scale = 4.0
        config.train.corrector.critic_steps = 4
        config.train.corrector.start = 400
        config.train.corrector.optimizer = config.train.optimizer.copy_and_resolve_references()
    elif variant.startswith("dx_repa_"):
        config.policy.kind = "dx"
        config.policy.num_grid = int(variant.removeprefix("dx_repa_"))
        config.train.window_substeps = DX_WINDOWS[config.policy.num_grid]
        config.train.gm_dropout = 0.0
        config.train.steps = 40_000
    elif variant == "runlocal":
        config.data.name = "digits"
        config.model.dit.hidden = 64
        config.model.dit.num_heads = 4
        config.model.dit.depth = 3
        config.model.scan_unroll = 3
        config.model.dtype = "float32"
        config.model.remat = "none"
        config.model.dit.time_scale = 1000.0  # this teacher is trained here and is not REPA's
        config.teacher.steps = 600
        config.teacher.batch_size = 64
        config.policy.num_components = 8
        config.policy.logstd_hidden = 64
        config.train.steps = 400
        config.train.batch_size = 64
        config.train.optimizer.learning_rate = 2e-3
        config.train.optimizer.warmup_steps = 100
        config.evaluation.num_samples = 1000
        config.evaluation.batch_size = 250
        config.evaluation.teacher_steps = (1, 8, 32)
        config.evaluation.grid_classes = ()
        config.evaluation.every = 200
        config.evaluation.every_samples = 500
    return config
