"""The shape and conditions of data, as networks need them."""

import dataclasses
from typing import Any

from piflow_jax.config.fields import config_field as _field
from piflow_jax.models.vae import AutoencoderKL


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataShape:
    """The shape and conditions of data, as networks need them.

    Attributes:
      name: name of the data set.
      channels: channels `C` of a sample.
      sample_size: side of square images, in sites; for captions the longest side of any shape.
      sites: site axes of samples that are not square images; None for `(sample_size,) * 2`.
      num_classes: label `num_classes` is the null label.
      latent_scale: networks take `(latent - latent_shift) * latent_scale`, a number or one per
        channel; 1 for images.
      latent_shift: see `latent_scale`; 0 for images.
      vae: identity of the autoencoder that made the latents; empty for images, or if unknown.
      conditions: names, dtypes and shapes of conditions that are neither labels nor captions, such
        as `pose:float32:3x4`. A condition that is a single array has no name.
      text_features: width of the embeddings of captions' tokens; 0 for data with classes.
      pooled_features: width of the captions' pooled embeddings; 0 where there are none.
      references: largest number of reference images of a sample; 0 where there are none.
      released: the official weights are for this data, and it is not a set prepared here.
      stride: for released latents, pixels of the image per site, along one side.
      by_channel: released latents are scaled channel by channel, with the mean and the standard
        deviation in the autoencoder's own settings.
    """

    name: str
    channels: int = _field(low=1, most=2**16)
    # The table of positions grows with its square, for any weights.
    sample_size: int = _field(0, low=0, most=2**12)
    sites: tuple[int, ...] | None = _field(None, low=1, may_be_empty=True)
    num_classes: int = _field(0, low=0)
    latent_scale: float | tuple[float, ...] = _field(1.0, above=0)
    latent_shift: float | tuple[float, ...] = 0.0
    vae: str = ""
    conditions: tuple[str, ...] = _field((), may_be_empty=True)
    text_features: int = _field(0, low=0, most=2**20)
    pooled_features: int = _field(0, low=0, most=2**20)
    references: int = _field(0, low=0)
    released: bool = False
    stride: int = 8
    by_channel: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape `(*sites, C)` of a sample."""
        sites = (self.sample_size, self.sample_size) if self.sites is None else self.sites
        return (*sites, self.channels)

    def decoder(self, autoencoder: AutoencoderKL) -> AutoencoderKL:
        """The autoencoder with the scale and shift for decoding samples of these latents.

        Args:
          autoencoder: an autoencoder with the scale and shift in its own settings.

        Returns:
          The autoencoder with the scale and shift of the prepared set. Official weights use the
          autoencoder's own, and so do latents of prompts, which the set has already scaled.
        """
        if self.released or self.text_features:
            return autoencoder
        return autoencoder.clone(latent_scale=self.latent_scale, latent_shift=self.latent_shift)

    @classmethod
    def of(cls, name: str, source: Any) -> "DataShape":
        """Reads the shape and conditions of a source with this `name`."""
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


# Further facts that a source may state in addition to its shape.
_OPTIONAL = (
    *("num_classes", "latent_scale", "latent_shift", "vae"),
    *("text_features", "pooled_features", "references"),
)
