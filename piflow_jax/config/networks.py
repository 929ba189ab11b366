"""The schema of networks: the settings of each, and those that all of them have."""

import dataclasses
from typing import ClassVar

from piflow_jax.config.fields import config_field as _field


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """The settings of one network. A network that is not in the table has its settings in code.

    Attributes:
      whole: a device holds the whole network and draws samples alone.
      blocks: the network's own parameters are trained, and those in `blocks` are matrices for Muon.
    """

    whole: ClassVar[bool] = True
    blocks: ClassVar[bool] = False

    def shared_widths(self) -> dict[str, int]:
        """Sizes by key that `config.mesh.fsdp` has to divide."""
        return {}

    def official_data(self) -> dict[str, int]:
        """Facts of the data of official weights of these sizes, where they differ from others'."""
        return {}

    def check(self, key: str) -> str | None:
        """Finds values that are possible alone and contradict each other; `key` is the group's.

        Returns:
          A sentence that names them, or None.
        """
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig(NetworkConfig):
    """Sizes of every network here."""

    patch_size: int = _field(
        2, "side of a patch in sites; it must divide the side of the image", low=1
    )
    hidden: int = _field(
        64, "width of the tokens; divisible by 4 and by num_heads", low=4, most=2**20
    )
    num_heads: int = _field(4, "attention heads", low=1)
    depth: int = _field(
        3, "transformer blocks; for FLUX.1 and FLUX.2, those with two streams", low=1
    )

    def shared_widths(self) -> dict[str, int]:
        """See `NetworkConfig`."""
        return {"hidden": self.hidden}

    def check(self, key: str) -> str | None:
        """See `NetworkConfig`."""
        if self.hidden % 4 or self.hidden % self.num_heads:
            return (
                f"{key}.hidden must be divisible by 4 and by {key}.num_heads ({self.num_heads}), "
                f"got {self.hidden}"
            )
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiTConfig(TransformerConfig):
    """The class-conditional DiT (`model.network = "dit"`)."""

    blocks = True

    mlp_ratio: float = _field(
        4.0, "hidden width of an MLP, relative to `hidden`", above=0, most=1024
    )
    time_scale: float = _field(1000.0, "factor of t at the network's input", above=0)

    def check(self, key: str) -> str | None:
        """See `NetworkConfig`."""
        if int(self.hidden * self.mlp_ratio) < 1:
            return (
                f"{key}.mlp_ratio times {key}.hidden ({self.hidden}) must be at least 1, got "
                f"{self.mlp_ratio}"
            )
        return super().check(key)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptedConfig(TransformerConfig):
    """A network that reads text, whose students are low-rank adapters on the teacher's weights.

    Attributes:
      coordinates: coordinates of a token, see `rope_axes`.
    """

    whole: ClassVar[bool] = False
    coordinates: ClassVar[int] = 3

    rope_axes: tuple[int, ...] = _field(
        (16, 56, 56), "features of a head for frame, row and column", low=2
    )
    lora_rank: int = _field(256, "rank of the student's adapters", low=1)
    lora_dropout: float = _field(
        0.0, "dropout of the adapters' inputs in training", low=0, high=0.99
    )
    base_dtype: str = _field(
        "float32",
        "dtype of the parameters that distillation does not train. int8, float8_e4m3fn and int4 "
        "are for the matrices of the blocks; the other parameters are then in bfloat16",
        choices=("float32", "bfloat16", "int8", "float8_e4m3fn", "int4"),
    )
    time_dtype: str = _field(
        "float32",
        "dtype to which times are rounded, as in the training of the releases, if the network "
        "computes in this dtype",
        choices=("float32", "bfloat16"),
    )

    references: int = _field(
        0,
        "largest number of reference images of a sample, for networks that edit images; 0 means "
        "text to image",
        low=0,
        most=64,
    )

    def shared_widths(self) -> dict[str, int]:
        """See `NetworkConfig`."""
        return {"hidden": self.hidden, "lora_rank": self.lora_rank}

    def check(self, key: str) -> str | None:
        """See `NetworkConfig`."""
        axes, wanted = self.rope_axes, self.coordinates
        fits = len(axes) == wanted and sum(axes) * self.num_heads == self.hidden
        if not fits or any(a % 2 for a in axes):
            number = {3: "three", 4: "four"}[wanted]
            return (
                f"{key}.rope_axes must be {number} even numbers that add up to {key}.hidden / "
                f"{key}.num_heads ({self.hidden} / {self.num_heads}), got {axes}"
            )
        return super().check(key)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FluxConfig(AdaptedConfig):
    """FLUX.1 (`model.network = "flux"`)."""

    single_depth: int = _field(38, "blocks with one stream, after the others", low=1)
    distilled_guidance: float = _field(
        3.5, "guidance scale at the network's input; 0 if it has no such input", low=0
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class QwenImageConfig(AdaptedConfig):
    """Qwen-Image (`model.network = "qwen_image"`)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flux2Config(AdaptedConfig):
    """FLUX.2 (`model.network = "flux2"`), [dev] or [klein]."""

    coordinates = 4

    rope_axes: tuple[int, ...] = _field(
        (32, 32, 32, 32), "features of a head for time, row, column and place in the text", low=2
    )
    single_depth: int = _field(48, "blocks with one stream, after the others", low=1)
    distilled_guidance: float = _field(
        4.0, "guidance scale at the network's input; 0 if it has no such input", low=0
    )
    text_features: int = _field(
        15360,
        "width of the text embeddings for the official weights: 15360 for FLUX.2 [dev], 7680 and "
        "12288 for [klein] 4B and 9B. A prepared set records its own",
        low=1,
        most=2**20,
    )

    def official_data(self) -> dict[str, int]:
        """See `NetworkConfig`."""
        return {"text_features": self.text_features}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network of teacher and student. The student adds its own head, and adapters."""

    network: str = _field(
        "dit",
        "dit (conditioned on classes), flux, qwen_image or flux2 (conditioned on text), each with "
        "its settings in the group of that name, or a function of your own as "
        "`package.module:function`, see docs/extending.md",
    )
    dtype: str = _field("float32", "compute dtype", choices=("float32", "bfloat16"))
    remat: str = _field(
        "none",
        "what the backward pass computes again to save memory",
        choices=("none", "full", "dots", "dots_no_batch"),
    )
    scan_unroll: int = _field(1, "blocks per iteration of the scan over layers", low=1, most=256)
    attention: str = _field(
        "default",
        "implementation of attention: cudnn is for GPUs, splash for TPUs; where the chosen one is "
        "not available, JAX's own is used and the log says so",
        choices=("default", "xla", "cudnn", "splash"),
    )
    dit: DiTConfig = _field(DiTConfig, "")
    flux: FluxConfig = _field(FluxConfig, "")
    qwen_image: QwenImageConfig = _field(QwenImageConfig, "")
    flux2: Flux2Config = _field(Flux2Config, "")

    @property
    def own(self) -> NetworkConfig:
        """The settings of the chosen network."""
        own = vars(self).get(self.network)
        return own if isinstance(own, NetworkConfig) else NetworkConfig()
