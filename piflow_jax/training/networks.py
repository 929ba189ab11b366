"""Networks of a configuration, and the spec by which a checkpoint says what it holds.

A spec is a flat dictionary of JSON values in a checkpoint's metadata: everything that changes what
the weights mean, and nothing that does not (compute dtype, remat, attention).
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from piflow_jax.config import (
    Config,
    ConfigError,
    ModelConfig,
    PolicyConfig,
    TrainConfig,
    base_config,
    check_group,
    parse,
)
from piflow_jax.data.latents import SD_VAE_SCALE, LatentsSource
from piflow_jax.flow.schedule import longest_segment
from piflow_jax.models import ArcHead, DiT, DXHead, GMHead, VelocityHead, student_from_teacher
from piflow_jax.models.flux import FLUX_TARGETS, Flux
from piflow_jax.models.lora import LoRA, initial_trained, merge, split
from piflow_jax.models.qwen_image import QWEN_TARGETS, QwenImage

__all__ = [
    "IMAGENET_LATENTS",
    "TEXT_LATENTS",
    "TEXT_LENGTH",
    "DataShape",
    "Network",
    "StudentSettings",
    "abstract_params",
    "check_policy_config",
    "completed",
    "init_params",
    "initial_student",
    "policy_config",
    "spec_of",
    "student_network",
    "student_settings",
    "student_spec",
    "teacher_network",
    "teacher_settings",
    "teacher_spec",
    "trained_part",
    "with_base",
]

Network = DiT | Flux | QwenImage

# Keys of `ModelConfig` that change what a network's weights mean, in the specs.
_MEANT_BY = {
    "dit": ("patch_size", "hidden", "num_heads", "depth", "mlp_ratio", "time_scale"),
    "flux": (
        *("network", "patch_size", "hidden", "num_heads", "depth", "single_depth", "rope_axes"),
        *("distilled_guidance", "time_dtype"),
    ),
    "qwen_image": (
        *("network", "patch_size", "hidden", "num_heads", "depth", "rope_axes"),
        "time_dtype",
    ),
}
# Of `DataShape`; networks that read text know neither classes nor one size.
_DATA_MEANT_BY_CLASSES = (
    *("name", "sample_size", "channels", "num_classes"),
    *("latent_scale", "latent_shift", "vae"),
)
_DATA_MEANT_BY_TEXT = ("name", "channels", "text_features", "pooled_features")
# What older specs lack, and what that means.
_ADDED = {"data.vae": "", "model.time_dtype": "float32"}


def _number(default: float = dataclasses.MISSING, **bounds: float) -> Any:
    """A field with the bounds that `check_group` keeps."""
    return dataclasses.field(default=default, metadata=bounds)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataShape:
    """What a network has to know of its data.

    Attributes:
      name: the data set.
      sample_size: side of the square images, in sites; of captions the longest side of any shape.
      channels: `C`.
      num_classes: label `num_classes` is the null label.
      latent_scale: networks see `(latent - latent_shift) * latent_scale`; 1 for images.
      latent_shift: see `latent_scale`; 0 for images.
      vae: identity of the autoencoder that made the latents; empty for images, or if not known.
      text_features: width of the embeddings of captions' tokens; 0 for data with classes.
      pooled_features: width of the captions' pooled embeddings; 0 where there are none.
    """

    name: str
    channels: int = _number(low=1)
    sample_size: int = _number(0, low=0)
    num_classes: int = _number(0, low=0)
    latent_scale: float = _number(1.0, above=0)
    latent_shift: float = 0.0
    vae: str = ""
    text_features: int = _number(0, low=0)
    pooled_features: int = _number(0, low=0)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape `(H, W, C)` of a sample."""
        return self.sample_size, self.sample_size, self.channels

    @classmethod
    def of(cls, name: str, source) -> "DataShape":
        """What a source of images or of latents, known as `name`, says of itself."""
        if hasattr(source, "text_features"):
            return cls._of_captions(name, source)
        height, _, channels = source.shape
        latent = {}
        if isinstance(source, LatentsSource):
            made = source.manifest
            latent = {"latent_scale": made["scale"], "latent_shift": made["shift"]}
            latent["vae"] = made["vae"]
        return cls(
            name=name,
            sample_size=height,
            channels=channels,
            num_classes=source.num_classes,
            **latent,
        )

    @classmethod
    def _of_captions(cls, name: str, source) -> "DataShape":
        # Prompts alone do not say what latents they are for: those of either network's autoencoder.
        return cls(
            name=name,
            sample_size=max(max(bucket) for bucket in source.buckets),
            channels=source.latent_channels or TEXT_LATENTS["flux"].channels,
            num_classes=getattr(source, "num_classes", 0),
            vae=source.manifest["latents"] if hasattr(source, "manifest") else "",
            text_features=source.text_features,
            pooled_features=source.pooled_features,
        )


# Latents of 256x256 images under the autoencoder of Stable Diffusion.
IMAGENET_LATENTS = DataShape(
    name="imagenet", sample_size=32, channels=4, num_classes=1000, latent_scale=SD_VAE_SCALE
)


# Latents of 1024x1024 images for FLUX.1, with embeddings of T5 and CLIP; Qwen-Image's latents have
# the same shape, its embeddings are those of Qwen2.5-VL.
TEXT_LATENTS = {
    "flux": DataShape(
        name="prompts",
        sample_size=128,
        channels=16,
        num_classes=0,
        text_features=4096,
        pooled_features=768,
    ),
    "qwen_image": DataShape(
        name="prompts", sample_size=128, channels=16, num_classes=0, text_features=3584
    ),
}

# Tokens of a caption in the recipes of both.
TEXT_LENGTH = 512


def _network(model: ModelConfig, data: DataShape, head, lora: LoRA | None = None) -> Network:
    common = {
        "patch_size": model.patch_size,
        "in_channels": data.channels,
        "hidden": model.hidden,
        "num_heads": model.num_heads,
        "head": head,
        "dtype": jnp.dtype(model.dtype),
        "remat": model.remat,
        "scan_unroll": model.scan_unroll,
        "attention": None if model.attention == "default" else model.attention,
    }
    if model.network == "dit":
        return DiT(
            depth=model.depth,
            mlp_ratio=model.mlp_ratio,
            num_classes=data.num_classes,
            sample_size=data.sample_size,
            time_scale=model.time_scale,
            **common,
        )
    common |= {
        "text_features": data.text_features,
        "axes_dims_rope": tuple(model.rope_axes),
        # What is computed in float32 sees the time that it is given.
        "time_dtype": jnp.dtype(model.time_dtype if model.dtype == "bfloat16" else "float32"),
        "param_dtype": jnp.dtype(model.base_dtype),
        "lora": lora,
    }
    if model.network == "qwen_image":
        return QwenImage(depth=model.depth, **common)
    return Flux(
        double_depth=model.depth,
        single_depth=model.single_depth,
        pooled_features=data.pooled_features,
        guidance_embed=model.distilled_guidance > 0,
        **common,
    )


def teacher_network(model: ModelConfig, data: DataShape) -> Network:
    """The network that predicts velocities."""
    return _network(model, data, VelocityHead())


def student_network(model: ModelConfig, policy: PolicyConfig, data: DataShape) -> Network:
    """The network that predicts policies; one that reads text is its teacher's with adapters."""
    if policy.kind == "gm":
        head = GMHead(policy.num_components, policy.logstd_hidden)
    elif policy.kind == "arc":
        head = ArcHead(policy.num_components)
    else:
        # Polynomial coefficients beyond the first start at zero only with the skip.
        head = DXHead(policy.num_grid, input_skip=policy.mode == "polynomial")
    targets = {"dit": None, "flux": FLUX_TARGETS, "qwen_image": QWEN_TARGETS}[model.network]
    lora = targets and LoRA(targets, rank=model.lora_rank, dropout=model.lora_dropout)
    return _network(model, data, head, lora)


def init_params(module: Network, key: jax.Array) -> Any:
    """Fresh variables of a network; traceable."""
    return module.init(key, *(jnp.zeros(leaf.shape, leaf.dtype) for leaf in module.example()))


def abstract_params(module: Network) -> Any:
    """Shapes and dtypes of a network's variables, without computing any."""
    return jax.eval_shape(lambda: init_params(module, jax.random.key(0)))


def trained_part(module: Network, params: Any) -> Any:
    """What training changes of a network's variables, or of their shapes.

    Args:
      module: the network.
      params: its variables.

    Returns:
      All of them; of a network with adapters these, the head and the last modulation. The rest is
      its base.
    """
    return params if getattr(module, "lora", None) is None else split(params)[1]


def with_base(module: Network, trained: Any, base: Any) -> Any:
    """The inverse of `trained_part`; copies nothing.

    Args:
      module: the network.
      trained: what training changes.
      base: the teacher's variables, whose head is left out; unused without adapters.

    Returns:
      The network's variables.
    """
    return trained if getattr(module, "lora", None) is None else merge(base, trained)


def initial_student(key: jax.Array, student: Network, teacher: Network, teacher_params: Any) -> Any:
    """The trained part of a student that starts at its teacher; traceable.

    Args:
      key: random key.
      student: the student's network.
      teacher: the teacher's network.
      teacher_params: its variables.

    Returns:
      Variables for `with_base`.
    """
    keys = jax.random.split(key)
    if isinstance(student, DiT):
        fresh = init_params(student, keys[0])
        return student_from_teacher(keys[1], student, fresh, teacher_params, teacher=teacher)
    return initial_trained(keys[1], student, teacher_params)


def _model_spec(model: ModelConfig, data: DataShape) -> dict[str, Any]:
    kept = _DATA_MEANT_BY_CLASSES if model.network == "dit" else _DATA_MEANT_BY_TEXT
    spec = {f"data.{key}": getattr(data, key) for key in kept}
    values = {key: getattr(model, key) for key in _MEANT_BY[model.network]}
    values = {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}
    return spec | {f"model.{key}": value for key, value in values.items()}


def teacher_spec(config: Config, data: DataShape) -> dict[str, Any]:
    """What a teacher's checkpoint says of itself."""
    return {"kind": "teacher"} | _model_spec(config.model, data)


def student_spec(config: Config, data: DataShape) -> dict[str, Any]:
    """What a student's checkpoint says of itself: network, policy and how it samples."""
    train, policy = config.train, dataclasses.asdict(config.policy)
    used = {
        "gm": ("kind", "num_components", "logstd_hidden"),
        "arc": ("kind", "num_components"),
        "dx": ("kind", "num_grid", "mode", "segment_size"),
    }[config.policy.kind]
    sampling = ("nfe", "final_step_size_scale", "shift", "total_substeps")
    adapters = {} if config.model.network == "dit" else {"model.lora_rank": config.model.lora_rank}
    return (
        {"kind": "student"}
        | _model_spec(config.model, data)
        | adapters
        | {f"policy.{key}": policy[key] for key in used}
        | {f"train.{key}": getattr(train, key) for key in sampling}
    )


def policy_config(policy: PolicyConfig, train: TrainConfig) -> dict[str, Any]:
    """What files of the release say of a student's policy."""
    config = {"type": {"gm": "GMFlow", "dx": "DX"}.get(policy.kind, policy.kind)}
    if policy.kind == "dx":
        longest = longest_segment(train.nfe, train.final_step_size_scale)
        config["segment_size"] = policy.segment_size or longest
        config |= {"shift": train.shift, "mode": policy.mode}
    return config


def check_policy_config(text: str | None, policy: PolicyConfig, train: TrainConfig) -> None:
    """Raises ConfigError if a file says something else of its policy than the settings do."""
    try:
        found = {} if text is None else dict(json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"its policy_config is damaged: {error}") from error
    for key, value in policy_config(policy, train).items():
        there = found.get(key, value)
        if there != value and not (
            isinstance(there, float) and math.isclose(there, value, rel_tol=1e-5)
        ):
            raise ConfigError(
                f"its policy_config has the {key} {there!r}, the settings make it {value!r}"
            )


def spec_of(metadata: Mapping[str, str]) -> Mapping[str, Any] | None:
    """The spec in a weight file's metadata, None without one; ConfigError for a damaged one."""
    text = metadata.get("piflow_jax")
    try:
        return None if text is None else dict(json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"the settings in its metadata are damaged: {error}") from error


def completed(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's spec with what has been added to specs since it was made."""
    return _ADDED | spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudentSettings:
    """A student's settings as its checkpoint has them."""

    model: ModelConfig
    policy: PolicyConfig
    train: TrainConfig
    data: DataShape


def student_settings(spec: Mapping[str, Any]) -> StudentSettings:
    """Reads a student's spec back.

    Args:
      spec: what `student_spec` made, after a trip through JSON.

    Returns:
      The settings; what has been added to specs since this one was made has its default.

    Raises:
      ConfigError: the spec is not a student's, something is missing in it, or it holds what the
        schema of configurations refuses.
    """
    settings = _settings(spec, "student")
    _check_complete(spec, student_spec(settings, settings.data))
    return settings


def teacher_settings(spec: Mapping[str, Any]) -> tuple[ModelConfig, DataShape]:
    """Reads a teacher's spec back, see `student_settings`."""
    settings = _settings(spec, "teacher")
    _check_complete(spec, teacher_spec(settings, settings.data))
    return settings.model, settings.data


def _settings(spec: Mapping[str, Any], kind: str) -> StudentSettings:
    """The settings of a spec, checked by the schema as those of a configuration."""
    if not isinstance(spec, Mapping) or spec.get("kind") != kind:
        found = spec.get("kind") if isinstance(spec, Mapping) else spec
        raise ConfigError(f"this holds a {found}, not a {kind}")
    config = base_config().to_dict()
    groups: dict[str, dict[str, Any]] = {name: {} for name in ("model", "policy", "train", "data")}
    for key, value in spec.items():
        group, _, name = key.partition(".")
        if group in groups and name:
            groups[group][name] = value
        elif key != "kind":
            raise ConfigError(f"unknown key {key}; this version reads {', '.join(groups)}")
    data = check_group(DataShape, groups.pop("data"), "data", complete=False)
    for group, values in groups.items():
        config[group] |= values
    # Not in a spec: the kind of data, and what a mixture alone has.
    reads_text = config["model"]["network"] != "dit"
    config["data"]["name"] = "prompts" if reads_text else "digits"
    if config["policy"]["kind"] == "dx":
        config["train"]["gm_dropout"] = 0.0
    parsed = parse(config, None)
    if data.sample_size % parsed.model.patch_size:
        raise ConfigError(
            f"model.patch_size ({parsed.model.patch_size}) must divide data.sample_size "
            f"({data.sample_size})"
        )
    return StudentSettings(model=parsed.model, policy=parsed.policy, train=parsed.train, data=data)


def _check_complete(spec: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    missing = sorted(set(wanted) - set(completed(spec)))
    if missing:
        raise ConfigError(f"the settings lack {', '.join(missing)}")
