"""The schema: every key with its type, default, range and meaning."""

import dataclasses

from piflow_jax import hub
from piflow_jax.config.correctors import CorrectorConfig
from piflow_jax.config.fields import config_field as _field
from piflow_jax.config.networks import ModelConfig
from piflow_jax.config.optimizers import OptimizerConfig

_PLACES = ("split", "whole")
# Seeds of the data's order have 64 bits. Streams with own seeds use the last few of them.
_SEED = {"low": 0, "most": 2**63 - 1}
_SUBSTEPS = {"low": 1, "most": 2**16}  # more are none to float32
_EVALUATIONS = {"low": 1, "most": 1024}
_EULER_STEPS = {"low": 1, "most": 10_000}
_DAY = 86_400


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data set."""

    name: str = _field(
        "digits",
        "data set; `prompts`, `captioned_digits` and `edited_digits` are captions with their "
        "embeddings",
        choices=(
            *("digits", "mnist", "fashion_mnist", "emoji", "images"),
            *("latents", "prompts", "captioned_digits", "edited_digits"),
        ),
    )
    data_dir: str = _field(
        "",
        "directory of prepared data. Latents and prompts need it. For images, empty means `data` "
        "in the work directory. For mnist and fashion_mnist it holds IDX files or TFDS, and empty "
        "means the default directory of TFDS. For emoji it holds the font and Unicode's list, and "
        "empty means those of the Debian packages",
    )
    local_cache_gib: float = _field(
        64.0,
        "largest size in GiB of a process's copies, in TMPDIR, of prepared data in a bucket",
        above=0,
    )
    images: str = _field(
        "",
        "source of pictures for --mode=prepare, and for --mode=train with images: a folder of "
        "class folders, a folder of pictures, a .tar of either, or tfds:NAME",
    )
    skip_refused: bool = _field(
        False, "leave out pictures that cannot be read; the log lists them in any case"
    )
    latents: str = _field(
        "",
        "latents of the official weights: empty means those of Stable Diffusion's autoencoder, and "
        "va_vae those of REPA-E's VA-VAE (32 channels, a sixteenth of the image's side). A "
        "prepared set records its own",
        choices=("", "va_vae"),
    )
    vae: str = _field(
        "",
        "weights of the autoencoder: a .safetensors file or its folder, also hf:owner/name",
        hub=hub.AUTOENCODER,
    )
    prompts: str = _field(
        "",
        "list of prompts for --mode=prepare: a .txt, .jsonl or .parquet file",
    )
    text_encoder: str = _field(
        "",
        "text encoder for --mode=prepare: the folder of FLUX.1, FLUX.2 or Qwen-Image, also "
        "hf:owner/name, or words:D:P (hashed words)",
        hub=hub.ENCODERS,
    )
    text_length: int = _field(
        0, "largest number of tokens of a prompt; 0 means the encoder's own limit", low=0
    )
    text_dtype: str = _field(
        "bfloat16", "type of the text encoder's weights", choices=("float32", "bfloat16")
    )
    image_size: int = _field(
        1024,
        "side of the square crop of each image, before an autoencoder if there is one. For "
        "prompts, the side of square images; other shapes have about as many pixels",
        low=8,
        most=2**14,
    )
    channels: int = _field(
        0,
        "for images: 1 (grey) or 3 (colours). 0 looks at 64 pictures and takes 1 if none has "
        "colours",
        choices=(0, 1, 3),
    )
    mirror: bool = _field(False, "for images: train on mirror images as well")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How the devices of all processes share the work; the sizes multiply to their number."""

    data: int = _field(
        -1,
        "parts of the batch that each have a copy of the parameters; -1 takes the devices left",
        low=-1,
    )
    fsdp: int = _field(
        1,
        "parts of the batch that share one copy of the parameters, each with a part of it. It must "
        "divide the network's hidden and lora_rank. -1 takes the devices left. If data is -1 as "
        "well, it takes at most 16, at most the devices of a TPU slice, and only so many that each "
        "part of hidden is a multiple of 8",
        low=-1,
    )
    tensor: int = _field(
        1, "parts of attention heads and hidden layers; -1 takes the devices left", low=-1
    )
    student: str = _field(
        "split", "the student's parameters in training, and their moments", choices=_PLACES
    )
    ema: str = _field("split", "the student's averaged parameters", choices=_PLACES)
    teacher: str = _field("split", "the teacher's parameters in distillation", choices=_PLACES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessesConfig:
    """Time limits of a run of several processes."""

    start_seconds: int = _field(300, "time for all processes to find each other", low=1, most=_DAY)
    heartbeat_seconds: int = _field(
        100,
        "time after which a process that does not answer counts as lost, and the others stop",
        low=5,
        most=_DAY,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """The policy that the student predicts."""

    kind: str = _field(
        "gm",
        "kind of policy: Gaussian mixture, grid of x_0, or ArcFlow's growing velocities",
        choices=("gm", "dx", "arc"),
    )
    num_components: int = _field(16, "K, mixture components (gm, arc)", low=1)
    logstd_hidden: int = _field(
        64, "hidden width of the head for the log standard deviation (gm)", low=1
    )
    num_grid: int = _field(10, "N, grid points or polynomial coefficients (dx)", low=1)
    mode: str = _field("grid", "how x_0 is interpolated (dx)", choices=("grid", "polynomial"))
    segment_size: float = _field(
        0.0,
        "length in raw time that the policy covers (dx); 0 means the longest training segment",
        low=0,
        high=1,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The flow-matching teacher: where it comes from, how it is trained, and how it is guided."""

    checkpoint: str = _field(
        "",
        "work directory of a run, or directory of checkpoints, with the teacher; empty trains one "
        "first in <workdir>/teacher",
    )
    weights: str = _field(
        "",
        "the teacher's weights, ours or official ones: .safetensors, .pth, or a folder; on a disk, "
        "in a bucket (gs://...) or on the Hugging Face hub (hf:owner/name); or the name of a "
        "shipped student, for its teacher",
        hub=hub.NETWORK,
    )
    weights_format: str = _field(
        "",
        "naming scheme of the weights. Empty means pi-Flow's release or diffusers. A dit may also "
        "have the names of the original DiT (and REPA) or of SiT",
        choices=("", "dit", "original_dit", "original_sit"),
    )
    loras: tuple[str, ...] = _field(
        (),
        "LoRA files that are added to the weights, each a path or `path@strength`: a fine-tune "
        "that is distilled without a second copy of its base",
        hub=(),
        may_be_empty=True,
    )
    steps: int = _field(3000, "training steps", low=1)
    batch_size: int = _field(
        128, "global batch size; divisible by mesh.data times mesh.fsdp", low=1
    )
    label_dropout: float = _field(0.1, "probability of the null label in training", low=0, high=1)
    optimizer: OptimizerConfig = _field(OptimizerConfig, "")
    guidance_scale: float = _field(1.0, "scale of classifier-free guidance; 1 means none", low=1)
    guidance_range: tuple[float, ...] = _field(
        (),
        "(low, high) of the scales that the student takes as an input. Training draws one for each "
        "example, and sampling takes guidance_scale by default. Empty means guidance_scale alone",
        low=1,
        may_be_empty=True,
    )
    guidance_interval: tuple[float, float] = _field(
        (0.0, 1.0), "noise levels at which to guide, both ends included", low=0, high=1
    )
    orthogonal_guidance: float = _field(
        0.0, "share to remove of the guidance's component parallel to x_0", low=0, high=1
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Distillation by pi-ID."""

    steps: int = _field(3000, "training steps", low=1)
    batch_size: int = _field(
        128, "global batch size; divisible by mesh.data times mesh.fsdp", low=1
    )
    microbatches: int = _field(
        1, "parts of a batch that are computed in turn, with accumulated gradients", low=1
    )
    optimizer: OptimizerConfig = _field(OptimizerConfig, "")
    initial: str = _field(
        "",
        "student to start from: the work directory of a run, a directory of checkpoints, weights "
        "(see evaluation.weights), or the name of a shipped student; empty starts at the teacher",
        hub=hub.NETWORK,
    )
    data_free: bool = _field(
        False, "train without data: each step starts at noise and walks all segments"
    )
    nfe: int = _field(
        1, "network evaluations per sample, which is the number of segments", **_EVALUATIONS
    )
    nfe_choices: tuple[int, ...] = _field(
        (),
        "numbers of evaluations that one student is trained for, nfe among them. For each example, "
        "one of them is drawn, and then one of its segments. Empty means nfe alone",
        may_be_empty=True,
        distinct=True,
        **_EVALUATIONS,
    )
    final_step_size_scale: float = _field(
        1.0, "length of the last segment relative to the others", above=0, low=0.01, most=100
    )
    shift: float = _field(
        1.0, "shift of the time warp, for teacher and student", above=0, low=1e-3, most=1e3
    )
    total_substeps: int = _field(
        128, "policy substeps per unit of raw time in training", **_SUBSTEPS
    )
    solver: str = _field(
        "euler",
        "solver of the policy's rollouts in training; multistep has second order and needs fewer "
        "substeps",
        choices=("euler", "multistep"),
    )
    num_states: int = _field(2, "M, teacher queries per segment", **_EVALUATIONS)
    window_substeps: int = _field(
        0, "time-smoothing window, in substeps; at most a segment's", low=0
    )
    gm_dropout: float = _field(
        0.05,
        "dropout of mixture components in the policy that visits the states (gm)",
        low=0,
        high=0.99,
    )
    mixing_steps: int = _field(
        0,
        "steps in which the teacher's share of the trajectory falls from 1 to 0; 0 keeps it at 0",
        low=0,
    )
    loss_scale: float = _field(3.0, "factor of the loss", above=0)
    adaptive_power: float = _field(
        0.0,
        "p in the weight 1 / (error + 1e-3)^p of each sample and state; 0 means no weight",
        low=0,
        high=1,
    )
    time_power: float = _field(
        0.0,
        "q in the weight t^q of a state at noise level t; 2 weights errors of x_0 equally",
        low=0,
        high=2,
    )
    state_power: float = _field(
        0.0,
        "q in the density tau^q of the raw times of states within their segment: more states at "
        "noise in place of the weight of time_power. Only without mixing_steps",
        low=0,
        high=2,
    )
    corrector: CorrectorConfig = _field(CorrectorConfig, "")

    @property
    def evaluations(self) -> tuple[int, ...]:
        """The numbers of evaluations that the student is trained for."""
        return self.nfe_choices or (self.nfe,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured at the end and during training, and how samples are drawn."""

    num_samples: int = _field(
        5000, "samples per system; the index of a sample fixes its noise and label", low=2
    )
    batch_size: int = _field(
        500, "samples per jitted call; divisible by the devices of a process", low=1
    )
    teacher_steps: tuple[int, ...] = _field(
        (1, 2, 4, 8, 32, 128),
        "numbers of steps of the teacher, each a row of the report; endpoints are compared with "
        "those of the last",
        **_EULER_STEPS,
    )
    teacher_solver: str = _field(
        "euler",
        "how the teacher is sampled: by the ODE of its flow, with two evaluations per step by heun "
        "and one by the others (heun and multistep have second order), or by the SDE of the "
        "release's own samples, which leaves the path that students imitate",
        choices=("euler", "heun", "multistep", "sde"),
    )
    system: str = _field(
        "student",
        "the system that --mode=sample draws from, and for latents also the one that "
        "--mode=evaluate measures; the teacher takes the last of teacher_steps",
        choices=("student", "teacher"),
    )
    substeps: int = _field(128, "policy substeps per unit of raw time when sampling", **_SUBSTEPS)
    nfe: int = _field(0, "the student's network evaluations; 0 means as trained", low=0, most=1024)
    temperature: float = _field(
        1.0,
        "temperature of the mixture in all evaluations but the last (gm); 1 changes nothing",
        above=0,
        low=1e-3,
        high=1,
    )
    guidance: float = _field(
        0.0, "guidance scale of samples with teacher.guidance_range; 0 means guidance_scale", low=0
    )
    solver: str = _field(
        "multistep",
        "solver of the policy's rollouts when sampling",
        choices=("euler", "multistep"),
    )
    seed: int = _field(0, "seed of the noise", **_SEED)
    grid_samples: int = _field(20, "columns of samples.png", low=1, most=1000)
    grid_classes: tuple[int, ...] = _field(
        (),
        "classes that --mode=sample draws, a row each; empty means all",
        low=0,
        may_be_empty=True,
    )
    every: int = _field(
        0, "steps between evaluations of the student in training; 0 means none", low=0
    )
    every_samples: int = _field(1000, "samples of each such evaluation", low=2)
    checkpoint: str = _field(
        "latest",
        "checkpoint of the student; best has the smallest Frechet distance seen in training",
        choices=("latest", "best"),
    )
    weights: str = _field(
        "",
        "official student weights (.safetensors or .pth, also gs://... or hf:owner/name), in place "
        "of the run's checkpoint",
        hub=hub.NETWORK,
    )
    loras: tuple[str, ...] = _field(
        (),
        "LoRA files that are added for sampling, to the base of a student with adapters or to the "
        "teacher, each a path or `path@strength`",
        hub=(),
        may_be_empty=True,
    )
    features: str = _field("", "file of the Inception weights, for FID", hub=())
    reference: str = _field(
        "", "for latents: ADM's reference statistics, such as VIRTUAL_imagenet256_labeled.npz"
    )
    images: str = _field(
        "",
        "for prompts: the student's pictures, a folder of <place>-<seed>.png or an .npz file",
    )
    teacher_images: str = _field(
        "", "for prompts: the teacher's pictures from the same noise, in the same form"
    )
    clip: str = _field("", "for prompts: folder of the CLIP of pictures and prompts", hub=())
    diversity_features: str = _field(
        "",
        "for prompts: folder of the network that compares pictures of one prompt; empty means clip",
        hub=(),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RivalsConfig:
    """The comparison of --mode=rivals: methods at equal compute, each with the student's settings.

    docs/rivals.md describes the methods.
    """

    methods: tuple[str, ...] = _field(
        (
            *("gm", "gm_2nfe", "gm_4nfe", "gm_adaptive", "arc"),
            *("meanflow", "shortcut", "consistency", "reflow", "dmd"),
        ),
        "methods to compare; `+teacher` after a method adds the teacher's training to its budget, "
        "and `@0.3` multiplies its learning rate by 0.3",
        distinct=True,
    )
    seeds: tuple[int, ...] = _field((0, 1, 2), "seeds of each method", distinct=True, **_SEED)
    seconds: float = _field(
        60.0,
        "training time of a method; on a CPU, the time of all cores together",
        above=0,
        most=1e7,
    )
    nfes: tuple[int, ...] = _field(
        (1, 2, 4), "numbers of evaluations per sample to compare", distinct=True, **_EVALUATIONS
    )
    rounds: int = _field(
        10, "rounds in which the steps of all methods are timed in turn", low=1, most=10_000
    )
    pairs: int = _field(
        5000, "pairs of noise and endpoint, for the methods that learn from pairs", low=1
    )
    pair_steps: int = _field(32, "Euler steps of the teacher for each pair", **_EULER_STEPS)
    fake_updates: int = _field(
        5, "updates of the fake network per update of the student (dmd)", low=1, most=1000
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A run: data, network, teacher, policy, distillation, evaluation."""

    seed: int = _field(0, "seed of initialisation, data order and training noise", **_SEED)
    data: DataConfig = _field(DataConfig, "")
    model: ModelConfig = _field(ModelConfig, "")
    teacher: TeacherConfig = _field(TeacherConfig, "")
    policy: PolicyConfig = _field(PolicyConfig, "")
    train: TrainConfig = _field(TrainConfig, "")
    evaluation: EvaluationConfig = _field(EvaluationConfig, "")
    rivals: RivalsConfig = _field(RivalsConfig, "")
    mesh: MeshConfig = _field(MeshConfig, "")
    processes: ProcessesConfig = _field(ProcessesConfig, "")
    profile: tuple[int, ...] = _field(
        (), "first and last step of each stage to profile", low=1, may_be_empty=True
    )
    peak_flops: float = _field(
        0.0, "peak FLOP/s of a device, for the utilisation; 0 looks up known devices", low=0
    )
    compilation_cache: str = _field(
        "", "directory that keeps compiled programs for later runs; empty keeps none"
    )
    download: bool = _field(
        False,
        "download files that keys name on the Hugging Face hub (hf:owner/name), if the hub's cache "
        "lacks them; otherwise only the cache is read",
    )
    topology: str = _field("", "TPU slice for --mode=compile and compile_sampling, such as v5e:4x4")
    log_every: int = _field(20, "steps between metrics", low=1)
    checkpoint_every: int = _field(1000, "steps between checkpoints", low=1)
    keep_checkpoints: int = _field(2, "checkpoints kept per stage", low=1)

    @property
    def sampling_nfe(self) -> int:
        """The student's network evaluations when sampling: `evaluation.nfe`, or as trained."""
        return self.evaluation.nfe or self.train.nfe

    @property
    def sampling_nfes(self) -> tuple[int, ...]:
        """All numbers of evaluations that figures are taken at: `sampling_nfe` and as trained."""
        return (self.evaluation.nfe,) if self.evaluation.nfe else self.train.evaluations
