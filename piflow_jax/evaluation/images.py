"""Pictures of samples: rows of images with captions, as one PNG."""

import os
import textwrap
from collections.abc import Sequence

import numpy as np
from etils import epath
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw, ImageFont

from piflow_jax.whole_files import replacing

_TARGET = 48  # least size in pixels of an image if no scale is given
_FONT_SIZE = 15
_COLUMN_FONT_SIZE = 12
_LINE = 20
_MARGIN = 12
_GAP = 4
_ROW_GAP = 10
_CAPTION_CHARACTERS = 26
_PAPER = (255, 255, 255)
_INK = (32, 32, 32)


def save_grid(
    path: str | os.PathLike,
    rows: Sequence[tuple[str, ArrayLike]],
    scale: int | None = None,
    columns: Sequence[str] = (),
) -> None:
    """Writes rows of images as a PNG, see `draw_grid`.

    Args:
      path: File to write; its directory must exist.
      rows: Captions and images `[N, H, W, C]`.
      scale: Screen pixels per image pixel.
      columns: Captions above the columns.

    Raises:
      ValueError: See `draw_grid`.
    """
    with replacing(epath.Path(path)) as under_way:
        draw_grid(rows, scale, columns).save(under_way, format="PNG", optimize=True)


def draw_grid(
    rows: Sequence[tuple[str, ArrayLike]], scale: int | None = None, columns: Sequence[str] = ()
) -> Image.Image:
    """Draws rows of images, each with a caption on its left.

    Args:
      rows: Pairs of a caption and images [N, H, W, C] in [-1, 1] (clipped to it), with C = 1 (grey)
        or 3 (RGB). Rows may differ in N and in the image size. Long captions are wrapped.
      scale: Screen pixels per image pixel, nearest neighbour. By default the smallest scale that
        makes the smallest image at least 48 pixels high and as wide as the caption above it.
      columns: Captions above the images of the first row, such as names of classes.

    Returns:
      The picture, in RGB.

    Raises:
      ValueError: If there is no row, a row has another shape or a NaN, or `scale` is not a positive
        integer.
    """
    if not rows:
        raise ValueError("`rows` is empty")
    pictures = [_as_bytes(caption, images) for caption, images in rows]
    font = ImageFont.load_default(size=_FONT_SIZE)
    above = ImageFont.load_default(size=_COLUMN_FONT_SIZE)
    if scale is None:
        scale = max(-(-_TARGET // min(images.shape[1] for images in pictures)), 1)
        widest = max(map(above.getlength, columns), default=0)
        scale = max(scale, -int(-widest // pictures[0].shape[2]))
    if not isinstance(scale, (int, np.integer)) or scale < 1:
        raise ValueError(f"`scale` must be a positive integer, got {scale!r}")
    captions = [textwrap.wrap(caption, _CAPTION_CHARACTERS) for caption, _ in rows]
    strips = [
        _strip(np.repeat(np.repeat(images, scale, axis=1), scale, axis=2)) for images in pictures
    ]
    lines = [line for caption in captions for line in caption]
    left = _MARGIN + int(max((font.getlength(line) for line in lines), default=-_MARGIN)) + _MARGIN
    heights = [
        max(strip.shape[0], _LINE * len(caption))
        for strip, caption in zip(strips, captions, strict=True)
    ]
    width = left + max(strip.shape[1] for strip in strips) + _MARGIN
    heading = _LINE if columns else 0
    height = heading + sum(heights) + _ROW_GAP * (len(rows) - 1) + 2 * _MARGIN
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    side = pictures[0].shape[2] * scale
    for number, column in enumerate(columns[: len(pictures[0])]):
        middle = left + number * (side + _GAP) + side / 2
        draw.text((middle, _MARGIN + _LINE / 2), column, _INK, above, anchor="mm")
    top = _MARGIN + heading
    for strip, caption, row_height in zip(strips, captions, heights, strict=True):
        first = top + (row_height - _LINE * len(caption)) / 2 + _LINE / 2
        for number, line in enumerate(caption):
            draw.text((_MARGIN, first + _LINE * number), line, _INK, font, anchor="lm")
        sheet.paste(Image.fromarray(strip), (left, top + (row_height - strip.shape[0]) // 2))
        top += row_height + _ROW_GAP
    return sheet


def as_pictures(samples: ArrayLike) -> np.ndarray:
    """Samples of any shape as pictures for display.

    Args:
      samples: `[N, *sites, C]`.

    Returns:
      `[N, H, W, 1 or 3]`. Images stay as they are, or keep their first three channels. Volumes show
      their middle slice. Sequences and points become grey images with one column per site and one
      row per channel.
    """
    samples = np.asarray(samples, np.float32)
    while samples.ndim > 4:
        samples = samples[:, samples.shape[1] // 2]
    if samples.ndim < 4:
        rows = samples.reshape(len(samples), -1, samples.shape[-1])
        return np.swapaxes(rows, 1, 2)[..., None]
    channels = samples.shape[-1]
    return samples if channels in (1, 3) else samples[..., : 3 if channels > 3 else 1]


def as_levels(images: ArrayLike) -> np.ndarray:
    """Images as the bytes that are displayed.

    Args:
      images: `[..., 1 or 3]` in [-1, 1] (clipped to it).

    Returns:
      `uint8[..., 3]`, from 0 at -1 to 255 at 1.
    """
    images = np.asarray(images, np.float32)
    levels = np.rint((np.clip(images, -1, 1) + 1) * 127.5).astype(np.uint8)
    return np.broadcast_to(levels, (*levels.shape[:-1], 3))


def _as_bytes(caption: str, images: ArrayLike) -> np.ndarray:
    """Images uint8[N, H, W, 3] from [N, H, W, C] in [-1, 1]."""
    images = np.asarray(images, np.float32)
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape:
        raise ValueError(
            f"`rows`: the images of {caption!r} must have the shape [N, H, W, 1 or 3], "
            f"got {list(images.shape)}"
        )
    if np.isnan(images).any():
        raise ValueError(f"`rows`: the images of {caption!r} have NaN")
    return as_levels(images)


def _strip(images: np.ndarray) -> np.ndarray:
    """Joins images uint8[N, H, W, 3] side by side, with `_GAP` pixels of paper between them."""
    count, height, width, _ = images.shape
    strip = np.full((height, count * (width + _GAP) - _GAP, 3), _PAPER, np.uint8)
    for index, image in enumerate(images):
        start = index * (width + _GAP)
        strip[:, start : start + width] = image
    return strip
