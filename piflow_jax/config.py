"""What a configuration may say: one schema, checked before anything is compiled.

`configs/*.py` fill an `ml_collections.ConfigDict` made by `base_config`; `parse` turns it into the
frozen dataclasses below, or refuses it with the key and the allowed range. Each field's metadata is
its documentation; `python -m piflow_jax.config` prints `docs/configuration.md`.
"""

import dataclasses
import math
import types
import typing
from typing import Any

import ml_collections

__all__ = [
    "Config",
    "ConfigError",
    "DataConfig",
    "EvaluationConfig",
    "ModelConfig",
    "PolicyConfig",
    "TeacherConfig",
    "TrainConfig",
    "base_config",
    "parse",
]


class ConfigError(ValueError):
    """A configuration names an unknown key, a wrong type or an impossible value."""


def _field(default: Any, doc: str, *, low=None, high=None, above=None, choices=None):
    """A config field with its documentation and its allowed values (bounds are inclusive)."""
    metadata = {"doc": doc, "low": low, "high": high, "above": above, "choices": choices}
    if dataclasses.is_dataclass(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which data set."""

    name: str = _field("digits", "data set", choices=("digits", "mnist", "imagenet"))
    data_dir: str = _field(
        "", "where prepared data lies (imagenet: its latents); empty is the TFDS default"
    )
    images: str = _field(
        "", "what --mode=prepare reads: a folder of class folders, a .tar, or tfds[:DATA_DIR]"
    )
    vae: str = _field("", "weights of the autoencoder: a .safetensors file or its folder")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The DiT that teacher and student share, but for the student's head."""

    patch_size: int = _field(2, "side of a patch in sites; divides the image", low=1)
    hidden: int = _field(64, "width of the tokens; divisible by 4 and by num_heads", low=4)
    num_heads: int = _field(4, "attention heads", low=1)
    depth: int = _field(3, "transformer blocks", low=1)
    mlp_ratio: float = _field(4.0, "hidden width of an MLP over `hidden`", above=0)
    time_scale: float = _field(1000.0, "the network sees t times this", above=0)
    dtype: str = _field("float32", "compute dtype", choices=("float32", "bfloat16"))
    remat: str = _field(
        "none",
        "what the backward pass recomputes",
        choices=("none", "full", "dots", "dots_no_batch"),
    )
    scan_unroll: int = _field(1, "blocks per iteration of the scan over layers", low=1)
    attention: str = _field(
        "default", "implementation of the attention", choices=("default", "xla", "cudnn")
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """The policy that the student predicts."""

    kind: str = _field("gm", "policy: Gaussian mixture or direct x_0 grid", choices=("gm", "dx"))
    num_components: int = _field(16, "K, mixture components (gm)", low=1)
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
    beta1: float = _field(0.9, "Adam's first decay rate", low=0, high=0.9999)
    beta2: float = _field(0.95, "Adam's second decay rate", low=0, high=0.99999)
    weight_decay: float = _field(0.0, "decoupled weight decay", low=0)
    grad_clip: float = _field(50.0, "largest global gradient norm; 0 does not clip", low=0)
    ema_gamma: float = _field(7.0, "gamma of the Karras EMA; larger is shorter", above=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The flow-matching teacher: how it is trained when none is given, and how it is guided."""

    checkpoint: str = _field(
        "", "directory of a teacher's checkpoints; empty trains one first in <workdir>/teacher"
    )
    weights: str = _field(
        "", "official weights to take the teacher from: .safetensors, .pth, or a folder of them"
    )
    weights_format: str = _field(
        "dit",
        "whose names the weights have: pi-Flow's release, the original DiT (and REPA), or SiT",
        choices=("dit", "original_dit", "original_sit"),
    )
    steps: int = _field(3000, "training steps", low=1)
    batch_size: int = _field(128, "global batch; divisible by the number of devices", low=1)
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
    batch_size: int = _field(128, "global batch; divisible by the number of devices", low=1)
    microbatches: int = _field(
        1, "parts of a batch whose gradients are accumulated one after the other", low=1
    )
    optimizer: OptimizerConfig = _field(OptimizerConfig, "")
    data_free: bool = _field(False, "start at noise and walk all segments in each step")
    nfe: int = _field(1, "segments, which is network evaluations per sample", low=1)
    final_step_size_scale: float = _field(
        1.0, "length of the last segment over a base one", above=0
    )
    shift: float = _field(1.0, "shift of the time warp, teacher and student", above=0)
    total_substeps: int = _field(128, "policy substeps per unit of raw time in training", low=1)
    num_states: int = _field(2, "M, teacher queries per segment", low=1)
    window_substeps: int = _field(0, "time-smoothing window; at most a segment's substeps", low=0)
    gm_dropout: float = _field(
        0.05, "dropout of components in the rolled-out policy", low=0, high=0.99
    )
    mixing_steps: int = _field(
        0, "steps over which the teacher's share of the trajectory decays to 0; 0 has none", low=0
    )
    loss_scale: float = _field(3.0, "factor of the loss", above=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured at the end."""

    num_samples: int = _field(5000, "samples per system; noise and label fixed by index", low=2)
    batch_size: int = _field(500, "samples per jitted call; divisible by the devices", low=1)
    teacher_steps: tuple[int, ...] = _field(
        (1, 2, 4, 8, 32, 128), "Euler steps of the teacher; the last is the one to match", low=1
    )
    substeps: int = _field(128, "policy substeps per unit of raw time when sampling", low=1)
    seed: int = _field(0, "seed of the noise", low=0)
    grid_samples: int = _field(20, "columns of samples.png", low=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A run: data, network, teacher, policy, distillation, evaluation."""

    seed: int = _field(0, "seed of initialisation, data order and training noise", low=0)
    data: DataConfig = _field(DataConfig, "")
    model: ModelConfig = _field(ModelConfig, "")
    teacher: TeacherConfig = _field(TeacherConfig, "")
    policy: PolicyConfig = _field(PolicyConfig, "")
    train: TrainConfig = _field(TrainConfig, "")
    evaluation: EvaluationConfig = _field(EvaluationConfig, "")
    topology: str = _field("", "TPU slice for --mode=compile, such as v5e:4x4")
    log_every: int = _field(20, "steps between metrics", low=1)
    checkpoint_every: int = _field(1000, "steps between checkpoints", low=1)
    keep_checkpoints: int = _field(2, "checkpoints kept per stage", low=1)


def base_config() -> ml_collections.ConfigDict:
    """A configuration with every key at its default, to be changed by a config file."""
    return _as_config_dict(Config())


def _as_config_dict(node: Any) -> ml_collections.ConfigDict:
    values = {}
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        values[field.name] = _as_config_dict(value) if dataclasses.is_dataclass(value) else value
    return ml_collections.ConfigDict(values)


def parse(config: ml_collections.ConfigDict, num_devices: int = 1) -> Config:
    """Checks a configuration and freezes it.

    Args:
      config: what a config file made and flags changed.
      num_devices: devices that share a batch.

    Returns:
      The frozen configuration.

    Raises:
      ConfigError: on an unknown or missing key, a wrong type, a value out of range, or values that
        contradict each other. The message names the key and what is allowed.
    """
    parsed = _parse_node(Config, config, "")
    _check_together(parsed, num_devices)
    return parsed


def _parse_node(cls: type, config: Any, prefix: str) -> Any:
    if not isinstance(config, ml_collections.ConfigDict | dict):
        raise ConfigError(f"config.{prefix[:-1]} must be a group of keys, got {config!r}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(set(config) - set(fields))
    if unknown:
        raise ConfigError(
            f"unknown key config.{prefix}{unknown[0]}; "
            f"config{'.' + prefix[:-1] if prefix else ''} has {', '.join(fields)}"
        )
    hints = typing.get_type_hints(cls)
    values = {}
    for name, field in fields.items():
        if name not in config:
            raise ConfigError(f"missing key config.{prefix}{name} ({field.metadata['doc']})")
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            values[name] = _parse_node(hint, config[name], f"{prefix}{name}.")
        else:
            values[name] = _parse_value(
                config[name], hint, field.metadata, f"config.{prefix}{name}"
            )
    return cls(**values)


def _parse_value(value: Any, hint: Any, allowed: types.MappingProxyType, key: str) -> Any:
    if typing.get_origin(hint) is tuple:
        items = typing.get_args(hint)
        if not isinstance(value, tuple | list):
            raise ConfigError(f"{key} must be a tuple, got {value!r}")
        if items[-1] is not Ellipsis and len(value) != len(items):
            raise ConfigError(f"{key} must have {len(items)} entries, got {value!r}")
        if not value:
            raise ConfigError(f"{key} must not be empty")
        return tuple(_parse_value(entry, items[0], allowed, key) for entry in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{key} must be of type {hint.__name__}, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key} must be finite, got {value}")
    low, high, above, choices = (allowed[name] for name in ("low", "high", "above", "choices"))
    if choices is not None and value not in choices:
        raise ConfigError(f"{key} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    if above is not None and not value > above:
        raise ConfigError(f"{key} must be above {above}, got {value}")
    if (low is not None and value < low) or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"in [{low}, {high}]"
        raise ConfigError(f"{key} must be {bounds}, got {value}")
    return value


def _check_together(config: Config, num_devices: int) -> None:
    """Refuses values that are possible alone and not together."""
    model, train, policy, teacher = config.model, config.train, config.policy, config.teacher
    if model.hidden % 4 or model.hidden % model.num_heads:
        raise ConfigError(
            f"config.model.hidden must be divisible by 4 and by config.model.num_heads "
            f"({model.num_heads}), got {model.hidden}"
        )
    if model.scan_unroll > model.depth:
        raise ConfigError(
            f"config.model.scan_unroll must be in [1, config.model.depth = {model.depth}], "
            f"got {model.scan_unroll}"
        )
    for key, batch in (
        ("teacher.batch_size", teacher.batch_size),
        ("train.batch_size", train.batch_size),
        ("evaluation.batch_size", config.evaluation.batch_size),
    ):
        if batch % num_devices:
            raise ConfigError(
                f"config.{key} must be divisible by the {num_devices} devices, got {batch}"
            )
    if train.batch_size % (train.microbatches * num_devices):
        raise ConfigError(
            f"config.train.microbatches times the {num_devices} devices must divide "
            f"config.train.batch_size ({train.batch_size}), got {train.microbatches}"
        )
    if teacher.checkpoint and teacher.weights:
        raise ConfigError(
            "config.teacher.checkpoint and config.teacher.weights are both given; empty one of them"
        )
    low, high = teacher.guidance_interval
    if low > high:
        raise ConfigError(
            f"config.teacher.guidance_interval must be (low, high) with low <= high, "
            f"got {teacher.guidance_interval}"
        )
    if (
        teacher.guidance_scale > 1
        and teacher.label_dropout == 0
        and not (teacher.checkpoint or teacher.weights)
    ):
        raise ConfigError(
            "config.teacher.label_dropout must be above 0 to train a teacher for guidance "
            f"(config.teacher.guidance_scale is {teacher.guidance_scale})"
        )
    shortest = min(1.0, train.final_step_size_scale) / (train.nfe - 1 + train.final_step_size_scale)
    room = max(round(shortest * train.total_substeps), 1)
    if train.window_substeps > room:
        raise ConfigError(
            f"config.train.window_substeps must be in [0, {room}], the substeps of the shortest "
            f"segment, got {train.window_substeps}"
        )
    if policy.kind == "dx" and train.gm_dropout > 0:
        raise ConfigError(
            "config.train.gm_dropout drops mixture components and must be 0 with "
            f"config.policy.kind = 'dx', got {train.gm_dropout}"
        )
    longest = max(1.0, train.final_step_size_scale) / (train.nfe - 1 + train.final_step_size_scale)
    if policy.kind == "dx" and 0 < policy.segment_size < longest - 1e-9:
        raise ConfigError(
            f"config.policy.segment_size must be 0 or at least the longest segment, {longest:.6g}, "
            f"got {policy.segment_size}"
        )
    for stage, optimizer, steps in (
        ("teacher", teacher.optimizer, teacher.steps),
        ("train", train.optimizer, train.steps),
    ):
        if optimizer.decay != "constant" and optimizer.warmup_steps >= steps:
            raise ConfigError(
                f"config.{stage}.optimizer.warmup_steps must be below config.{stage}.steps "
                f"({steps}) for a schedule that decays, got {optimizer.warmup_steps}"
            )


def reference() -> str:
    """The documentation of every key, as Markdown."""
    lines = [
        "# Configuration keys",
        "",
        "Made by `python -m piflow_jax.config > docs/configuration.md`. Any key can be overridden",
        "on the command line: `--config.train.steps=100`. Unknown keys, wrong types and impossible",
        "values are refused before anything is compiled.",
    ]

    def table(cls, prefix):
        hints = typing.get_type_hints(cls)
        rows, groups = [], []
        for field in dataclasses.fields(cls):
            hint, meta = hints[field.name], field.metadata
            if dataclasses.is_dataclass(hint):
                groups.append((hint, f"{prefix}.{field.name}"))
                continue
            name = getattr(hint, "__name__", str(hint)) if not typing.get_args(hint) else str(hint)
            rows.append(
                f"| `{field.name}` | {name} | `{field.default!r}` "
                f"| {_range(meta)} | {meta['doc']} |"
            )
        if rows:
            lines.extend(["", f"## `{prefix}`", "", cls.__doc__.strip(), ""])
            lines.extend(
                ["| key | type | default | allowed | meaning |", "| --- " * 5 + "|", *rows]
            )
        for hint, name in groups:
            table(hint, name)

    table(Config, "config")
    return "\n".join(lines) + "\n"


def _range(meta: types.MappingProxyType) -> str:
    if meta["choices"]:
        return ", ".join(f"`{choice}`" for choice in meta["choices"])
    if meta["above"] is not None:
        return f"> {meta['above']}"
    if meta["high"] is not None:
        return f"{meta['low']} to {meta['high']}"
    return f">= {meta['low']}" if meta["low"] is not None else ""


if __name__ == "__main__":
    print(reference(), end="")
