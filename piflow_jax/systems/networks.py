"""The table of networks: everything that depends on the network of teacher and student.

The rest of the package uses a `Network`: pure functions of its variables. Ours are Flax modules; a
user's own networks are in `piflow_jax.systems.own`.
"""

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from piflow_jax.config import Config, ConfigError, ModelConfig, PolicyConfig, TeacherConfig
from piflow_jax.data.latents import SD_VAE_SCALE
from piflow_jax.data.reference_sizes import (
    flux2_scale,
    flux2_size,
    kontext_size,
    qwen_edit_size,
)
from piflow_jax.keys import seed_key
from piflow_jax.models import DiT, VelocityHead
from piflow_jax.models.flux import FLUX_TARGETS, Flux
from piflow_jax.models.flux2 import FLUX2_TARGETS, Flux2
from piflow_jax.models.lora import LoRA
from piflow_jax.models.quantized import BLOCKS, is_quantized
from piflow_jax.models.qwen_image import QWEN_TARGETS, QwenImage
from piflow_jax.systems.built_in import BuiltIn
from piflow_jax.systems.conditioning import ClassLabels, Conditioning, Text
from piflow_jax.systems.network import Network, Variables
from piflow_jax.systems.own import network_of_function
from piflow_jax.systems.policies import POLICIES
from piflow_jax.systems.shapes import DataShape


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkKind:
    """A row of `NETWORKS`.

    Attributes:
      network: makes the network from settings, data and the student's policy; None for a teacher.
      conditioning: makes the conditioning from the network's own settings.
      spec: keys of the network's own settings without which a checkpoint's weights mean nothing.
      data_spec: fields of `DataShape` without which they mean nothing.
      official: data of the official weights; None if there are none.
      latents: data of the official weights for other latents, by the value of
        `config.data.latents`; see `official_data`.
      formats: official layouts of a teacher's weights; the first is the default.
      targets: layers with adapters in a student; None if all of its layers are trained.
      added: keys of `spec` that older checkpoints lack, with the value that this means.
      reference_size: `(height, width, side) -> (height, width)`, the size in pixels at which it
        reads a reference image of `height` x `width`. A square one is read at `side` x `side`.
        None if it reads none.
      reference_scale: the size to which it scales the image first, with the same arguments, if it
        then cuts it at its centre to `reference_size`. None if it scales to `reference_size`.
      named: whether a spec names the network; the spec of a DiT never did.
      takes_guidance: whether a student can take the guidance scale as an input.
      of_caller: True if only the caller has the function that makes it.
    """

    network: Callable[[ModelConfig, DataShape, PolicyConfig | None], Network]
    conditioning: Callable[[Any], Conditioning]
    spec: tuple[str, ...]
    data_spec: tuple[str, ...]
    official: DataShape | None = None
    latents: Mapping[str, DataShape] = dataclasses.field(default_factory=dict)
    formats: tuple[str, ...] = ()
    targets: tuple[str, ...] | None = None
    added: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    reference_size: Callable[[int, int, int], tuple[int, int]] | None = None
    reference_scale: Callable[[int, int, int], tuple[int, int]] | None = None
    named: bool = True
    takes_guidance: bool = False
    of_caller: bool = False


Module = Callable[[ModelConfig, DataShape, Mapping[str, Any]], nn.Module]


def _built_in(module: Module) -> Callable[..., BuiltIn]:
    """Makes networks of one of our modules, from settings, data and the fields that all share."""

    def network(model: ModelConfig, data: DataShape, policy: PolicyConfig | None) -> BuiltIn:
        kind, own = NETWORKS[model.network], model.own
        common = {
            "patch_size": own.patch_size,
            "in_channels": data.channels,
            "hidden": own.hidden,
            "num_heads": own.num_heads,
            "head": VelocityHead() if policy is None else POLICIES[policy.kind].head(policy),
            "dtype": jnp.dtype(model.dtype),
            "remat": model.remat,
            "scan_unroll": model.scan_unroll,
            "attention": None if model.attention == "default" else model.attention,
        }
        if kind.targets is not None and policy is not None:
            common["lora"] = LoRA(kind.targets, rank=own.lora_rank, dropout=own.lora_dropout)
        base = getattr(own, "base_dtype", "")
        kernels = base if base in BLOCKS else ""
        return BuiltIn(module(model, data, common), kind.conditioning(own), kernels)

    return network


def _dit(model: ModelConfig, data: DataShape, common: Mapping[str, Any]) -> DiT:
    own = model.dit
    return DiT(
        depth=own.depth,
        mlp_ratio=own.mlp_ratio,
        num_classes=data.num_classes,
        sample_size=data.sample_size,
        time_scale=own.time_scale,
        **common,
    )


def _flux(model: ModelConfig, data: DataShape, common: Mapping[str, Any]) -> Flux:
    own = model.flux
    return Flux(
        double_depth=own.depth,
        single_depth=own.single_depth,
        pooled_features=data.pooled_features,
        guidance_embed=own.distilled_guidance > 0,
        **_reading_text(model, data),
        **common,
    )


def _qwen_image(model: ModelConfig, data: DataShape, common: Mapping[str, Any]) -> QwenImage:
    return QwenImage(depth=model.qwen_image.depth, **_reading_text(model, data), **common)


def _flux2(model: ModelConfig, data: DataShape, common: Mapping[str, Any]) -> Flux2:
    own = model.flux2
    return Flux2(
        double_depth=own.depth,
        single_depth=own.single_depth,
        guidance_embed=own.distilled_guidance > 0,
        **_reading_text(model, data),
        **common,
    )


def _reading_text(model: ModelConfig, data: DataShape) -> dict[str, Any]:
    own = model.own
    return {
        "text_features": data.text_features,
        "axes_dims_rope": tuple(own.rope_axes),
        # Float32 computations see the time exactly as given.
        "time_dtype": jnp.promote_types(model.dtype, own.time_dtype),
        "param_dtype": jnp.dtype("bfloat16" if own.base_dtype in BLOCKS else own.base_dtype),
    }


_SIZES = ("patch_size", "hidden", "num_heads", "depth")
_TEXT_SPEC = ("rope_axes", "time_dtype", "references")
_TEXT_ADDED = {"time_dtype": "float32", "references": 0}
_TEXT_DATA = ("name", "channels", "text_features", "pooled_features")

NETWORKS: dict[str, NetworkKind] = {
    "dit": NetworkKind(
        network=_built_in(_dit),
        conditioning=lambda own: ClassLabels(),
        spec=(*_SIZES, "mlp_ratio", "time_scale"),
        data_spec=(
            *("name", "sample_size", "channels", "num_classes"),
            *("latent_scale", "latent_shift", "vae"),
        ),
        # 256x256 images, encoded by the autoencoder of Stable Diffusion.
        official=DataShape(
            released=True,
            name="latents",
            sample_size=32,
            channels=4,
            num_classes=1000,
            latent_scale=SD_VAE_SCALE,
        ),
        latents={
            # The same images, encoded by the VA-VAE of REPA-E (arXiv 2504.10483).
            "va_vae": DataShape(
                released=True,
                name="latents",
                sample_size=16,
                channels=32,
                num_classes=1000,
                stride=16,
                by_channel=True,
            ),
        },
        formats=("dit", "original_dit", "original_sit"),
        named=False,
        takes_guidance=True,
    ),
    "flux": NetworkKind(
        network=_built_in(_flux),
        conditioning=lambda own: Text(
            pooled=True, guidance=own.distilled_guidance, references=own.references
        ),
        spec=(*_SIZES, "single_depth", "distilled_guidance", *_TEXT_SPEC),
        added=_TEXT_ADDED,
        data_spec=_TEXT_DATA,
        # 1024x1024 images, with captions embedded by T5 and CLIP.
        official=DataShape(
            released=True,
            name="prompts",
            sample_size=128,
            channels=16,
            text_features=4096,
            pooled_features=768,
        ),
        formats=("flux",),
        targets=FLUX_TARGETS,
        reference_size=kontext_size,
    ),
    "qwen_image": NetworkKind(
        network=_built_in(_qwen_image),
        conditioning=lambda own: Text(masked=True, references=own.references),
        spec=(*_SIZES, *_TEXT_SPEC),
        added=_TEXT_ADDED,
        data_spec=_TEXT_DATA,
        # 1024x1024 images, with captions embedded by Qwen2.5-VL.
        official=DataShape(
            released=True, name="prompts", sample_size=128, channels=16, text_features=3584
        ),
        formats=("qwen_image",),
        targets=QWEN_TARGETS,
        reference_size=qwen_edit_size,
    ),
    "flux2": NetworkKind(
        network=_built_in(_flux2),
        conditioning=lambda own: Text(guidance=own.distilled_guidance, references=own.references),
        spec=(*_SIZES, "single_depth", "distilled_guidance", *_TEXT_SPEC),
        data_spec=_TEXT_DATA,
        # 1024x1024 images, with captions embedded by three layers of Mistral 3.
        official=DataShape(
            released=True, name="prompts", sample_size=128, channels=32, text_features=15360
        ),
        formats=("flux2",),
        targets=FLUX2_TARGETS,
        reference_size=flux2_size,
        reference_scale=flux2_scale,
    ),
}

# The spec of such a network consists of its name and its data; its own settings are in its code.
_OF_FUNCTIONS = NetworkKind(
    network=lambda model, data, policy: network_of_function(model.network, data, policy),
    conditioning=lambda own: ClassLabels(),
    spec=(),
    data_spec=(*NETWORKS["dit"].data_spec, "sites", "conditions"),
    of_caller=True,
)


def network_kind(model: ModelConfig) -> NetworkKind:
    """The row of one of our networks, or the row shared by all networks that a function makes.

    Args:
      model: the network's settings.

    Returns:
      The row.

    Raises:
      ConfigError: no network has this name; the message gives the nearest name.
    """
    if model.network in NETWORKS:
        return NETWORKS[model.network]
    if ":" in model.network:
        return _OF_FUNCTIONS
    near = difflib.get_close_matches(model.network, NETWORKS, n=1)
    raise ConfigError(
        f"config.model.network must be one of {', '.join(NETWORKS)} or a function of yours as "
        f"package.module:function, got {model.network!r}"
        + (f"; did you mean {near[0]!r}?" if near else "")
    )


def official_data(config: Config) -> DataShape | None:
    """Data of the official weights that a configuration is for.

    Args:
      config: the run's settings.

    Returns:
      The shape and conditions of the data; None if there are no official weights.
    """
    kind = network_kind(config.model)
    data = kind.latents.get(config.data.latents, kind.official)
    changes = config.model.own.official_data()
    return dataclasses.replace(data, **changes) if data is not None and changes else data


def teacher_network(model: ModelConfig, data: DataShape) -> Network:
    """The network that predicts velocities.

    Args:
      model: the network's settings.
      data: shape and conditions of the data.

    Returns:
      The network.

    Raises:
      ConfigError: `model.network` is neither a row of `NETWORKS` nor a function.
    """
    return network_kind(model).network(model, data, None)


def student_network(
    model: ModelConfig,
    policy: PolicyConfig,
    data: DataShape,
    guidance: TeacherConfig | None = None,
) -> Network:
    """The network that predicts policies; for some networks, the teacher's with adapters.

    Args:
      model: the network's settings.
      policy: the policy's settings.
      data: shape and conditions of the data.
      guidance: the teacher's guidance. If it has a range, the scale is an input of the network.

    Returns:
      The network.

    Raises:
      ConfigError: see `teacher_network`, or this network cannot take the scale as an input.
    """
    network = network_kind(model).network(model, data, policy)
    if guidance is None or not guidance.guidance_range:
        return network
    check_takes_guidance(model)
    return network.taking_guidance(guidance.guidance_scale, guidance.guidance_range)


def check_takes_guidance(model: ModelConfig) -> None:
    """Raises ConfigError if students of this network cannot take the guidance scale as an input."""
    if not network_kind(model).takes_guidance:
        able = " or ".join(repr(name) for name, kind in NETWORKS.items() if kind.takes_guidance)
        raise ConfigError(
            f"config.teacher.guidance_range is for config.model.network = {able} and must be empty "
            f"with {model.network!r}"
        )


def in_few_bits(base_dtype: str | None) -> bool:
    """Whether a base of this `base_dtype` is rounded when it is loaded; see `Network.kept`."""
    return base_dtype in BLOCKS


def without_scales(tree: Any) -> Any:
    """A tree of a network's variables, or of what belongs to each, as `Network.exact` has it.

    Of a kernel in few bits it has what belongs to the numbers, and not what belongs to the scales.
    """
    return jax.tree.map(
        lambda leaf: leaf.array.qvalue if is_quantized(leaf) else leaf, tree, is_leaf=is_quantized
    )


def named_variables(network: Network) -> Variables:
    """The same, in boxes with the names of their axes if they have any."""
    return jax.eval_shape(network.named, seed_key(0))
