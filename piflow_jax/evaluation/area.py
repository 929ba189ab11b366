"""Averages images over areas, so that features of large images cost no more than of small ones.

Source: the `INTER_AREA` interpolation of OpenCV.
"""

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

__all__ = ["area_averaged", "sites_within"]


def sites_within(shape: tuple[int, ...], most: int) -> tuple[int, int]:
    """The largest `(H, W)` with the same proportions and no side above a limit.

    Args:
      shape: `(H, W, C)`.
      most: upper limit for the longest side.

    Returns:
      `(H, W)`, each at least 1; those of `shape` if they are within the limit.
    """
    height, width = shape[:2]
    scale = min(most / max(height, width), 1.0)
    return max(round(height * scale), 1), max(round(width * scale), 1)


def area_averaged(images: ArrayLike, sites: tuple[int, int]) -> jax.Array:
    """Means over rectangles that divide images evenly; a pixel on a border counts by its share.

    Args:
      images: `[B, H, W, C]`.
      sites: `(h, w)`, neither above `(H, W)`.

    Returns:
      `[B, h, w, C]`; the images themselves if they already have these sites.
    """
    images = jnp.asarray(images)
    if images.shape[1:3] == tuple(sites):
        return images
    rows, columns = map(_shares, sites, images.shape[1:3])
    exact = jax.lax.Precision.HIGHEST
    return jnp.einsum("hH,wW,bHWc->bhwc", rows, columns, images, precision=exact)


def _shares(intervals: int, pixels: int) -> np.ndarray:
    """Share `float32[intervals, pixels]` that each interval takes of each pixel of a line."""
    edges = np.linspace(0, pixels, intervals + 1)
    left, right = edges[:-1, None], edges[1:, None]
    pixel = np.arange(pixels)
    overlap = np.minimum(right, pixel + 1) - np.maximum(left, pixel)
    return (np.maximum(overlap, 0) * intervals / pixels).astype(np.float32)
