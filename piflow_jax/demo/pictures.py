"""Pictures of the page: arrays in, bytes out."""

import base64
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image, PngImagePlugin

from piflow_jax.convert import open_autoencoder
from piflow_jax.data.picture_sets import center_crop
from piflow_jax.data.pictures import PictureError, picture_sizes, read_picture
from piflow_jax.evaluation import draw_grid
from piflow_jax.models.vae import picture_decoder

# Of the mixture's components, the heaviest first; all further ones share the last.
COLOURS = (
    *("#4e79a7", "#f28e2b", "#59a14f", "#b07aa1", "#edc948", "#76b7b2", "#e15759", "#9c755f"),
    *("#a0cbe8", "#ffbe7d", "#8cd17d", "#d4a6c8", "#f1ce63", "#499894", "#ff9d9a", "#d7b5a6"),
    "#a9aeb4",
)
_MOST_PIXELS = 2**25  # of a picture that is sent
_FRAME, _FIRST, _LAST = 70, 700, 1800  # milliseconds that frames of an animation stay


def film(frames: np.ndarray) -> np.ndarray:
    """Frames `uint8[F, H, W, 3]` next to each other, `uint8[H, F W, 3]`."""
    return np.concatenate(list(frames), axis=1)


def png(pixels: np.ndarray, facts: Mapping[str, Any] | None = None) -> bytes:
    """A PNG.

    Args:
      pixels: `uint8[H, W, 3]`.
      facts: what its text chunk `piflow_jax` says, as JSON.

    Returns:
      The file.
    """
    text = PngImagePlugin.PngInfo()
    if facts is not None:
        text.add_text("piflow_jax", json.dumps(dict(facts)))
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG", pnginfo=text)
    return file.getvalue()


def as_uri(pixels: np.ndarray) -> str:
    """Pixels `uint8[H, W, 3]` as the address of a PNG that holds itself."""
    return f"data:image/png;base64,{base64.b64encode(png(pixels)).decode()}"


def animation(
    rows: Sequence[tuple[str, np.ndarray]], columns: Sequence[str] = (), scale: int | None = None
) -> bytes:
    """Rows of images that move, with captions, as an animated WebP that starts again.

    Args:
      rows: captions and images `[F, N, H, W, 1 or 3]` in [-1, 1], of the same number of frames.
      columns: captions above the columns.
      scale: screen pixels per image pixel, see `draw_grid`.

    Returns:
      The file.
    """
    count = len(rows[0][1])
    frames = [
        draw_grid([(caption, images[i]) for caption, images in rows], scale, columns)
        for i in range(count)
    ]
    durations = [_FIRST, *[_FRAME] * (count - 2), _LAST]
    file = io.BytesIO()
    options = {"save_all": True, "append_images": frames[1:], "loop": 0, "lossless": True}
    frames[0].save(file, format="WebP", duration=durations[:count], **options)
    return file.getvalue()


def weight_order(weights: np.ndarray) -> np.ndarray:
    """Components by the weight that they have at last, the heaviest first.

    Args:
      weights: `[F, *sites, K]`.

    Returns:
      Numbers of components `[K]`.
    """
    last = weights[-1].reshape(-1, weights.shape[-1]).mean(axis=0)
    return np.argsort(-last, kind="stable")


def _in_colours(weights: np.ndarray) -> np.ndarray:
    """Weights `[..., min(K, colours)]` in the order of colours, the rest summed up in the last."""
    ordered = np.asarray(weights, np.float64)[..., weight_order(weights)]
    own = len(COLOURS) - 1
    if ordered.shape[-1] <= own:
        return ordered
    rest = ordered[..., own:].sum(axis=-1, keepdims=True)
    return np.concatenate([ordered[..., :own], rest], axis=-1)


def weight_shares(weights: np.ndarray) -> np.ndarray:
    """The share of each colour at each time, a mean over sites.

    Args:
      weights: `[F, *sites, K]`, with a sum of 1 over components.

    Returns:
      `[F, n]`, with a sum of 1; `n` is at most the number of `COLOURS`.
    """
    found = _in_colours(weights)
    return found.reshape(len(found), -1, found.shape[-1]).mean(axis=1)


def weight_maps(weights: np.ndarray) -> np.ndarray:
    """Which components have the weight of each site.

    Args:
      weights: `[F, H, W, K]`.

    Returns:
      `uint8[F, H, W, 3]`, the mean of the components' colours.
    """
    found = _in_colours(weights)
    palette = np.asarray([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in COLOURS], float)
    return np.rint(found @ palette[: found.shape[-1]]).astype(np.uint8)


def as_sample(
    picture: bytes, size: int, channels: int, inverted: bool = False, name: str = "the picture"
) -> np.ndarray:
    """A picture as a student's data has it.

    Args:
      picture: a file of any format that Pillow reads.
      size: side of samples.
      channels: 1 or 3.
      inverted: dark becomes light.
      name: what messages call it.

    Returns:
      `float32[size, size, channels]` in [-1, 1], its centre.

    Raises:
      PictureError: it cannot be read, or is larger than 32 million pixels.
    """
    (height, width), _ = picture_sizes(picture, name)
    if height * width > _MOST_PIXELS:
        raise PictureError(name, f"it has {height}x{width} pixels, at most {_MOST_PIXELS:,} do")
    pixels = read_picture(picture, name)
    crop = center_crop(pixels, size)
    if channels == 1:
        crop = np.asarray(Image.fromarray(crop).convert("L"))[..., None]
    values = np.float32(crop) / 127.5 - 1
    return -values if inverted else values


def decoder_of(data: Any, vae: str | Path | None) -> Callable[[jax.Array], jax.Array] | None:
    """What makes pictures of samples.

    Args:
      data: the `DataShape` of the samples.
      vae: weights of their autoencoder, as of `Drawer.load`.

    Returns:
      From latents `[N, H, W, C]`; None where samples are pixels.

    Raises:
      ValueError: the autoencoder is missing, another's, or of no use.
    """
    if data.channels in (1, 3):
        if vae is not None:
            raise ValueError("this student's samples are pixels: leave --vae out")
        return None
    if vae is None:
        raise ValueError(
            f"samples are latents of {data.channels} channels: pass --vae, the autoencoder's "
            "weights"
        )
    module, params = open_autoencoder(vae)
    if module.latent_channels != data.channels:
        raise ValueError(
            f"--vae makes latents with {module.latent_channels} channels, the student's samples "
            f"have {data.channels}"
        )
    return picture_decoder(data.decoder(module), params)
