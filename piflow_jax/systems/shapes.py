"""What a network has to know of its data."""

import dataclasses
from typing import Any

from piflow_jax.models.vae import AutoencoderKL

__all__ = ["DataShape"]


def _number(default: Any = dataclasses.MISSING, **bounds: float) -> Any:
    """A field with the bounds that `check_group` keeps."""
    return dataclasses.field(default=default, metadata=bounds)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataShape:
    """What a network has to know of its data.

    Attributes:
      name: the data set.
      channels: `C`.
      sample_size: side of square images, in sites; of captions the longest side of any shape.
      sites: site axes of samples that are not square images; None for `(sample_size,) * 2`.
      num_classes: label `num_classes` is the null label.
      latent_scale: networks see `(latent - latent_shift) * latent_scale`, a number or one for each
        channel; 1 for images.
      latent_shift: see `latent_scale`; 0 for images.
      vae: identity of the autoencoder that made the latents; empty for images, or if not known.
      conditions: names, types and shapes of conditions that are neither labels nor captions, such
        as `pose:float32:3x4`; one without a name is a condition that is a single array.
      text_features: width of the embeddings of captions' tokens; 0 for data with classes.
      pooled_features: width of the captions' pooled embeddings; 0 where there are none.
      released: this is what official weights are for, and of no set that was prepared here.
    """

    name: str
    channels: int = _number(low=1, most=2**16)
    # The table of positions grows by its square, whatever is in the weights.
    sample_size: int = _number(0, low=0, most=2**12)
    sites: tuple[int, ...] | None = _number(None, low=1, may_be_empty=True)
    num_classes: int = _number(0, low=0)
    latent_scale: float | tuple[float, ...] = _number(1.0, above=0)
    latent_shift: float | tuple[float, ...] = 0.0
    vae: str = ""
    conditions: tuple[str, ...] = _number((), may_be_empty=True)
    text_features: int = _number(0, low=0, most=2**20)
    pooled_features: int = _number(0, low=0, most=2**20)
    released: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape `(*sites, C)` of a sample."""
        sites = (self.sample_size, self.sample_size) if self.sites is None else self.sites
        return (*sites, self.channels)

    def decoder(self, autoencoder: AutoencoderKL) -> AutoencoderKL:
        """The autoencoder as it decodes samples of these latents.

        Args:
          autoencoder: with the scale and shift of its own settings.

        Returns:
          It with those of the prepared set. Official weights go by the autoencoder's own, and so do
          latents of prompts, which the set has already scaled.
        """
        if self.released or self.text_features:
            return autoencoder
        return autoencoder.clone(latent_scale=self.latent_scale, latent_shift=self.latent_shift)

    @classmethod
    def of(cls, name: str, source: Any) -> "DataShape":
        """What a source, known as `name`, says of its samples."""
        *sites, channels = source.shape
        square = len(sites) == 2 and sites[0] == sites[1]
        known = {key: getattr(source, key) for key in _OPTIONAL if hasattr(source, key)}
        return cls(
            name=name,
            channels=channels,
            sample_size=sites[0] if square else 0,
            sites=None if square else tuple(sites),
            **known,
        )


# What a source may know besides its shape.
_OPTIONAL = (
    *("num_classes", "latent_scale", "latent_shift", "vae"),
    *("text_features", "pooled_features"),
)
