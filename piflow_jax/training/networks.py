"""Networks of a configuration, and the spec by which a checkpoint says what it holds.

A spec is a flat dictionary of JSON values in a checkpoint's metadata: everything that changes what
the weights mean, and nothing that does not (compute dtype, remat, attention).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from piflow_jax.config import Config, ModelConfig, PolicyConfig, TrainConfig
from piflow_jax.data.latents import SD_VAE_SCALE, LatentsSource
from piflow_jax.models import ArcHead, DiT, DXHead, GMHead, VelocityHead

__all__ = [
    "IMAGENET_LATENTS",
    "DataShape",
    "StudentSettings",
    "abstract_params",
    "init_params",
    "rival_network",
    "rival_spec",
    "student_network",
    "student_settings",
    "student_spec",
    "teacher_network",
    "teacher_settings",
    "teacher_spec",
]

_COMPUTE_ONLY = ("dtype", "remat", "scan_unroll", "attention")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataShape:
    """What a network has to know of its data.

    Attributes:
      name: the data set.
      sample_size: side of the square images, in sites.
      channels: `C`.
      num_classes: label `num_classes` is the null label.
      latent_scale: networks see `(latent - latent_shift) * latent_scale`; 1 for images.
      latent_shift: see `latent_scale`; 0 for images.
      vae: identity of the autoencoder that made the latents; empty for images, or if not known.
    """

    name: str
    sample_size: int
    channels: int
    num_classes: int
    latent_scale: float = 1.0
    latent_shift: float = 0.0
    vae: str = ""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape `(H, W, C)` of a sample."""
        return self.sample_size, self.sample_size, self.channels

    @classmethod
    def of(cls, name: str, source) -> "DataShape":
        """What a source of images or of latents, known as `name`, says of itself."""
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


# Latents of 256x256 images under the autoencoder of Stable Diffusion.
IMAGENET_LATENTS = DataShape(
    name="imagenet", sample_size=32, channels=4, num_classes=1000, latent_scale=SD_VAE_SCALE
)


def _network(model: ModelConfig, data: DataShape, head) -> DiT:
    return DiT(
        patch_size=model.patch_size,
        in_channels=data.channels,
        hidden=model.hidden,
        num_heads=model.num_heads,
        depth=model.depth,
        mlp_ratio=model.mlp_ratio,
        num_classes=data.num_classes,
        sample_size=data.sample_size,
        time_scale=model.time_scale,
        head=head,
        dtype=jnp.dtype(model.dtype),
        remat=model.remat,
        scan_unroll=model.scan_unroll,
        attention=None if model.attention == "default" else model.attention,
    )


def teacher_network(model: ModelConfig, data: DataShape) -> DiT:
    """The network that predicts velocities."""
    return _network(model, data, VelocityHead())


def student_network(model: ModelConfig, policy: PolicyConfig, data: DataShape) -> DiT:
    """The network that predicts policies."""
    if policy.kind == "gm":
        head = GMHead(policy.num_components, policy.logstd_hidden)
    elif policy.kind == "arc":
        head = ArcHead(policy.num_components)
    else:
        # Polynomial coefficients beyond the first start at zero only with the skip.
        head = DXHead(policy.num_grid, input_skip=policy.mode == "polynomial")
    return _network(model, data, head)


def rival_network(model: ModelConfig, data: DataShape, *, two_times: bool) -> DiT:
    """The same network as the teacher's, for a rival: of one time or of two."""
    return teacher_network(model, data).clone(two_times=two_times)


def init_params(module: DiT, key: jax.Array) -> Any:
    """Fresh variables of a network; traceable."""
    size = module.sample_size
    x, t = jnp.zeros((1, size, size, module.in_channels)), jnp.zeros((1,))
    second = (t,) if module.two_times else ()
    return module.init(key, x, t, jnp.zeros((1,), jnp.int32), *second)


def abstract_params(module: DiT) -> Any:
    """Shapes and dtypes of a network's variables, without computing any."""
    return jax.eval_shape(lambda: init_params(module, jax.random.key(0)))


def _model_spec(model: ModelConfig, data: DataShape) -> dict[str, Any]:
    spec = {f"data.{key}": value for key, value in dataclasses.asdict(data).items()}
    values = dataclasses.asdict(model)
    return spec | {f"model.{key}": values[key] for key in values if key not in _COMPUTE_ONLY}


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
    return (
        {"kind": "student"}
        | _model_spec(config.model, data)
        | {f"policy.{key}": policy[key] for key in used}
        | {f"train.{key}": getattr(train, key) for key in sampling}
    )


def rival_spec(config: Config, data: DataShape, method: str) -> dict[str, Any]:
    """What a rival's checkpoint says of itself; no student, whose network predicts a policy."""
    spec = {"kind": "rival", "method": method, "train.shift": config.train.shift}
    return spec | _model_spec(config.model, data)


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
      The settings; what a spec does not hold has its default.

    Raises:
      ValueError: if the spec is not a student's.
    """
    _check_kind(spec, "student")
    return StudentSettings(
        model=ModelConfig(**_group(spec, "model")),
        policy=PolicyConfig(**_group(spec, "policy")),
        train=TrainConfig(**_group(spec, "train")),
        data=DataShape(**_group(spec, "data")),
    )


def teacher_settings(spec: Mapping[str, Any]) -> tuple[ModelConfig, DataShape]:
    """Reads a teacher's spec back, see `student_settings`."""
    _check_kind(spec, "teacher")
    return ModelConfig(**_group(spec, "model")), DataShape(**_group(spec, "data"))


def _check_kind(spec: Mapping[str, Any], kind: str) -> None:
    if spec.get("kind") != kind:
        raise ValueError(f"this checkpoint holds a {spec.get('kind')}, not a {kind}")


def _group(spec: Mapping[str, Any], name: str) -> dict[str, Any]:
    prefix = f"{name}."
    return {
        key.removeprefix(prefix): value for key, value in spec.items() if key.startswith(prefix)
    }
