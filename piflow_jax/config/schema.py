"""The schema: every key with its type, default, range and meaning."""

import dataclasses

from piflow_jax.config.fields import config_field as _field
from piflow_jax.config.networks import ModelConfig

_PLACES = ("split", "whole")
# Seeds of the data's order are 64 bits, of which streams of their own take the last few.
_SEED = {"low": 0, "most": 2**63 - 1}
_SUBSTEPS = {"low": 1, "most": 2**16}  # more are none to float32
_EVALUATIONS = {"low": 1, "most": 1024}
_EULER_STEPS = {"low": 1, "most": 10_000}
_DAY = 86_400


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which data set."""

    name: str = _field(
        "digits",
        "data set; the last two are captions with their embeddings",
        choices=(
            *("digits", "mnist", "fashion_mnist", "images"),
            *("latents", "prompts", "captioned_digits"),
        ),
    )
    data_dir: str = _field(
        "",
        "where prepared data lies (latents, or the embeddings of prompts; needed there); images: "
        "empty is `data` in the work directory; mnist and fashion_mnist: IDX files or TFDS, empty "
        "is the TFDS default",
    )
    local_cache_gib: float = _field(
        64.0,
        "most GiB of the copies that a process makes of prepared data in a bucket, in TMPDIR",
        above=0,
    )
    images: str = _field(
        "",
        "what --mode=prepare reads, and for images --mode=train: a folder of class folders or of "
        "pictures, a .tar of one, or tfds:NAME",
    )
    skip_refused: bool = _field(
        False, "--mode=prepare leaves out pictures that cannot be read; they are listed in any case"
    )
    vae: str = _field("", "weights of the autoencoder: a .safetensors file or its folder")
    prompts: str = _field(
        "",
        "list of prompts that --mode=prepare encodes: a .txt, .jsonl or .parquet file",
    )
    text_encoder: str = _field(
        "",
        "what encodes them: the folder of FLUX.1 or Qwen-Image, or words:D:P (hashed words)",
    )
    text_length: int = _field(0, "most tokens of a prompt; 0 is the encoder's own limit", low=0)
    text_dtype: str = _field(
        "bfloat16", "type of the text encoder's weights", choices=("float32", "bfloat16")
    )
    image_size: int = _field(
        1024,
        "side of the square crops of images, and before an autoencoder of latents; of prompts that "
        "of square images, other shapes have about as many pixels",
        low=8,
        most=2**14,
    )
    channels: int = _field(
        0,
        "images: 1 (grey) or 3 (colours); 0 is 1 if pictures have no colours, of which 64 are "
        "looked at",
        choices=(0, 1, 3),
    )
    mirror: bool = _field(False, "images: train on mirror images too")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How all devices of all processes share the work; the three sizes multiply to their number."""

    data: int = _field(-1, "parts of the batch with parameters of their own; -1 fills", low=-1)
    fsdp: int = _field(
        1,
        "parts of the batch that split the parameters, a divisor of the network's hidden and "
        "lora_rank; -1 fills, but where data is -1 too only as far as parts of hidden "
        "are whole tiles of 8, to 16 parts, and to the devices of a TPU slice",
        low=-1,
    )
    tensor: int = _field(1, "parts of heads and hidden layers; -1 fills", low=-1)
    student: str = _field("split", "parameters in training, and moments", choices=_PLACES)
    ema: str = _field("split", "averaged parameters", choices=_PLACES)
    teacher: str = _field("split", "the teacher's parameters when imitated", choices=_PLACES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessesConfig:
    """Time limits of a run of several processes."""

    start_seconds: int = _field(300, "until all processes have found each other", low=1, most=_DAY)
    heartbeat_seconds: int = _field(
        100,
        "after which a process that does not answer is lost, and the others stop",
        low=5,
        most=_DAY,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """The policy that the student predicts."""

    kind: str = _field(
        "gm",
        "policy: Gaussian mixture, direct x_0 grid, or ArcFlow's growing velocities",
        choices=("gm", "dx", "arc"),
    )
    num_components: int = _field(16, "K, mixture components (gm, arc)", low=1)
    logstd_hidden: int = _field(64, "hidden width of the logstd head (gm)", low=1)
    num_grid: int = _field(10, "N, grid points or coefficients (dx)", low=1)
    mode: str = _field("grid", "interpolation of x_0 (dx)", choices=("grid", "polynomial"))
    segment_size: float = _field(
        0.0,
        "raw-time length that the policy covers (dx); 0 is the longest training segment",
        low=0,
        high=1,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Warm-up, clipping after it, and a Karras EMA that starts after it."""

    kind: str = _field(
        "adamw",
        "update rule; muon is for the blocks' matrices and leaves the rest to adamw",
        choices=("adamw", "muon"),
    )
    learning_rate: float = _field(1e-3, "peak learning rate", above=0)
    warmup_steps: int = _field(100, "linear warm-up; clipping and EMA start at its end", low=0)
    decay: str = _field("constant", "after warm-up", choices=("constant", "cosine", "linear"))
    moment_dtype: str = _field(
        "float32", "type of the first moment's state", choices=("float32", "bfloat16")
    )
    beta1: float = _field(0.9, "Adam's first decay rate", low=0, high=0.9999)
    beta2: float = _field(0.95, "Adam's second decay rate", low=0, high=0.99999)
    weight_decay: float = _field(0.0, "decoupled weight decay", low=0)
    grad_clip: float = _field(50.0, "largest global gradient norm; 0 does not clip", low=0)
    ema_gamma: float = _field(7.0, "gamma of the Karras EMA; larger is shorter", above=0, most=1e6)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The flow-matching teacher: how it is trained when none is given, and how it is guided."""

    checkpoint: str = _field(
        "",
        "work directory of a run, or directory of checkpoints, with the teacher; empty trains one "
        "first in <workdir>/teacher",
    )
    weights: str = _field(
        "",
        "official weights to take the teacher from: .safetensors, .pth, or a folder of them, on a "
        "disk or in a bucket (gs://...)",
    )
    weights_format: str = _field(
        "",
        "whose names the weights have: empty is pi-Flow's release or diffusers; a dit may have "
        "those of the original DiT (and REPA), or of SiT",
        choices=("", "dit", "original_dit", "original_sit"),
    )
    steps: int = _field(3000, "training steps", low=1)
    batch_size: int = _field(128, "global batch; divisible by mesh.data times mesh.fsdp", low=1)
    label_dropout: float = _field(0.1, "probability of the null label", low=0, high=1)
    optimizer: OptimizerConfig = _field(OptimizerConfig, "")
    guidance_scale: float = _field(1.0, "guidance of the teacher; 1 is none", low=1)
    guidance_interval: tuple[float, float] = _field(
        (0.0, 1.0), "noise levels at which to guide, both ends included", low=0, high=1
    )
    orthogonal_guidance: float = _field(
        0.0, "share of the guidance parallel to x_0 that is removed", low=0, high=1
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Distillation by pi-ID."""

    steps: int = _field(3000, "training steps", low=1)
    batch_size: int = _field(128, "global batch; divisible by mesh.data times mesh.fsdp", low=1)
    microbatches: int = _field(
        1, "parts of a batch whose gradients are accumulated one after the other", low=1
    )
    optimizer: OptimizerConfig = _field(OptimizerConfig, "")
    initial: str = _field(
        "",
        "work directory of a run, or directory of checkpoints, of whose student the weights are "
        "where this one starts; empty starts at the teacher",
    )
    data_free: bool = _field(False, "start at noise and walk all segments in each step")
    nfe: int = _field(1, "segments, which is network evaluations per sample", **_EVALUATIONS)
    final_step_size_scale: float = _field(
        1.0, "length of the last segment over a base one", above=0, low=0.01, most=100
    )
    shift: float = _field(
        1.0, "shift of the time warp, teacher and student", above=0, low=1e-3, most=1e3
    )
    total_substeps: int = _field(
        128, "policy substeps per unit of raw time in training", **_SUBSTEPS
    )
    solver: str = _field(
        "euler",
        "of the policy's rollouts in training; multistep, of second order, needs fewer substeps",
        choices=("euler", "multistep"),
    )
    num_states: int = _field(2, "M, teacher queries per segment", **_EVALUATIONS)
    window_substeps: int = _field(0, "time-smoothing window; at most a segment's substeps", low=0)
    gm_dropout: float = _field(
        0.05, "dropout of components in the rolled-out policy", low=0, high=0.99
    )
    mixing_steps: int = _field(
        0, "steps over which the teacher's share of the trajectory decays to 0; 0 has none", low=0
    )
    loss_scale: float = _field(3.0, "factor of the loss", above=0)
    adaptive_power: float = _field(
        0.0,
        "p of a weight 1 / (error + 1e-3)^p of each sample and state; 0 is plain",
        low=0,
        high=1,
    )
    time_power: float = _field(
        0.0, "q of a weight t^q of the noise level of a state; 2 weighs x_0 alike", low=0, high=2
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured, at the end and while the student trains."""

    num_samples: int = _field(5000, "samples per system; noise and label fixed by index", low=2)
    batch_size: int = _field(
        500, "samples per jitted call; divisible by the devices of a process", low=1
    )
    teacher_steps: tuple[int, ...] = _field(
        (1, 2, 4, 8, 32, 128),
        "Euler steps of the teacher; the last is the one to match",
        **_EULER_STEPS,
    )
    system: str = _field(
        "student",
        "whose pictures --mode=sample makes; the teacher's take the last of teacher_steps",
        choices=("student", "teacher"),
    )
    substeps: int = _field(128, "policy substeps per unit of raw time when sampling", **_SUBSTEPS)
    nfe: int = _field(0, "the student's network evaluations; 0 is as trained", low=0, most=1024)
    temperature: float = _field(
        1.0,
        "of the mixture, in all evaluations but the last (gm); 1 leaves it",
        above=0,
        low=1e-3,
        high=1,
    )
    solver: str = _field(
        "multistep", "of the policy's rollouts when sampling", choices=("euler", "multistep")
    )
    seed: int = _field(0, "seed of the noise, which has its last 32 bits", **_SEED)
    grid_samples: int = _field(20, "columns of samples.png", low=1, most=1000)
    grid_classes: tuple[int, ...] = _field(
        (), "classes that --mode=sample shows, a row each; empty is all", low=0, may_be_empty=True
    )
    every: int = _field(0, "steps between looks at the student in training; 0 has none", low=0)
    every_samples: int = _field(1000, "samples of such a look", low=2)
    checkpoint: str = _field(
        "latest",
        "which checkpoint of the student; best is that of the smallest distance in training",
        choices=("latest", "best"),
    )
    weights: str = _field(
        "",
        "official student weights (.safetensors, .pth; gs://... too) in place of the run's "
        "checkpoint",
    )
    features: str = _field("", "file of the Inception weights whose features make an FID")
    reference: str = _field(
        "", "latents: ADM's reference statistics, such as VIRTUAL_imagenet256_labeled.npz"
    )
    images: str = _field(
        "",
        "prompts: the student's pictures, a folder of <place>-<seed>.png or an .npz file",
    )
    teacher_images: str = _field("", "prompts: the teacher's pictures of the same noise, likewise")
    clip: str = _field("", "prompts: folder of the CLIP that compares pictures with prompts")
    diversity_features: str = _field(
        "",
        "prompts: folder of the network that compares pictures of one prompt; empty is clip",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RivalsConfig:
    """The comparison of --mode=rivals: methods at equal compute, each with the student's settings.

    A method is a row of the table in `piflow_jax/rivals`, which docs/rivals.md describes.
    """

    methods: tuple[str, ...] = _field(
        (
            *("gm", "gm_2nfe", "gm_4nfe", "gm_adaptive", "arc"),
            *("meanflow", "shortcut", "consistency", "reflow", "dmd"),
        ),
        "what is compared; `+teacher` behind a method adds the teacher's training to its budget",
        distinct=True,
    )
    seeds: tuple[int, ...] = _field((0, 1, 2), "seeds of each method", distinct=True, **_SEED)
    seconds: float = _field(
        60.0, "training time of a method; on a CPU, time of its cores together", above=0, most=1e7
    )
    nfes: tuple[int, ...] = _field(
        (1, 2, 4), "evaluations per sample that are compared", distinct=True, **_EVALUATIONS
    )
    rounds: int = _field(
        10, "rounds in which the steps of all methods are timed in turn", low=1, most=10_000
    )
    pairs: int = _field(
        5000, "pairs of noise and endpoint, for methods that learn from them", low=1
    )
    pair_steps: int = _field(32, "the teacher's Euler steps for a pair", **_EULER_STEPS)
    fake_updates: int = _field(
        5, "updates of the fake network for one of the student (dmd)", low=1, most=1000
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
        0.0, "FLOP/s of a device at most, for the utilisation; 0 looks known devices up", low=0
    )
    compilation_cache: str = _field(
        "", "directory that keeps compiled programs between runs; empty keeps none"
    )
    topology: str = _field("", "TPU slice for --mode=compile, such as v5e:4x4")
    log_every: int = _field(20, "steps between metrics", low=1)
    checkpoint_every: int = _field(1000, "steps between checkpoints", low=1)
    keep_checkpoints: int = _field(2, "checkpoints kept per stage", low=1)

    @property
    def sampling_nfe(self) -> int:
        """The student's network evaluations when sampling: `evaluation.nfe`, or as trained."""
        return self.evaluation.nfe or self.train.nfe
