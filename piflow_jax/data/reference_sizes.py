"""Sizes in pixels at which editing networks read their reference images.

Source: the pipelines of FLUX.1 Kontext, Qwen-Image-Edit and FLUX.2 in `diffusers`, to which the
tests compare.
"""

import math

__all__ = ["flux2_scale", "flux2_size", "kontext_size", "qwen_edit_size"]

# Width and height of images that FLUX.1 Kontext was trained on, of 1024x1024 pixels in all.
_KONTEXT = (
    *((672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328)),
    *((832, 1248), (880, 1184), (944, 1104), (1024, 1024)),
)
_KONTEXT_SIDE, _KONTEXT_MULTIPLE = 1024, 16
_QWEN_MULTIPLE = 32
_FLUX2_MULTIPLE = 16


def kontext_size(height: int, width: int, side: int) -> tuple[int, int]:
    """Size of a reference of FLUX.1 Kontext: the nearest of 17 aspect ratios.

    Args:
      height: Height of the picture.
      width: Width of the picture.
      side: Side of a square reference; others have about as many pixels.

    Returns:
      Height and width, multiples of 16. At a side of 1,024 they are those of the release.
    """
    known = (*_KONTEXT, *((b, a) for a, b in _KONTEXT[:-1]))
    _, *best = min((abs(width / height - w / h), w, h) for w, h in known)
    sides = (length * side / _KONTEXT_SIDE / _KONTEXT_MULTIPLE for length in reversed(best))
    return tuple(max(round(length), 1) * _KONTEXT_MULTIPLE for length in sides)


def qwen_edit_size(height: int, width: int, side: int) -> tuple[int, int]:
    """Size of a reference of Qwen-Image-Edit: the picture's own aspect ratio.

    Args:
      height: Height of the picture.
      width: Width of the picture.
      side: Side of a square reference; others have about as many pixels.

    Returns:
      Height and width, multiples of 32.
    """
    wide = math.sqrt(side * side * (width / height))
    lengths = wide / (width / height), wide
    return tuple(max(round(length / _QWEN_MULTIPLE), 1) * _QWEN_MULTIPLE for length in lengths)


def flux2_scale(height: int, width: int, side: int) -> tuple[int, int]:
    """Size to which a reference of FLUX.2 is scaled: its own, unless it has too many pixels.

    Args:
      height: Height of the picture.
      width: Width of the picture.
      side: Side of a square of as many pixels as a reference has at most.

    Returns:
      Height and width, at least 16; the picture is then cut to `flux2_size`.
    """
    scale = 1.0
    if height * width > side * side:
        scale = math.sqrt(side * side / (width * height))
    return tuple(max(int(length * scale), _FLUX2_MULTIPLE) for length in (height, width))


def flux2_size(height: int, width: int, side: int) -> tuple[int, int]:
    """Size of a reference of FLUX.2: what is left of `flux2_scale` in multiples of 16.

    Args:
      height: Height of the picture.
      width: Width of the picture.
      side: See `flux2_scale`.

    Returns:
      Height and width, multiples of 16.
    """
    lengths = flux2_scale(height, width, side)
    return tuple(length - length % _FLUX2_MULTIPLE for length in lengths)
