"""Nearest training images: they show whether samples are copies."""

import numpy as np

_CHUNK = 4096


def nearest_images(samples: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Finds the training image nearest to each sample, by the Euclidean distance of pixels.

    As is usual since generative adversarial networks (arXiv 1406.2661, Fig. 2).

    Args:
      samples: `[N, *sites, C]`.
      images: `[M, *sites, C]`.

    Returns:
      `int[N]`, places in `images`.

    Raises:
      ValueError: they differ in size, or there are no images.
    """
    if samples.shape[1:] != images.shape[1:] or not len(images):
        raise ValueError(
            f"samples {list(samples.shape)} and images {list(images.shape)} must be of one size, "
            "and at least one image"
        )
    samples = samples.reshape(len(samples), -1).astype(np.float32)
    best, place = np.full(len(samples), np.inf), np.zeros(len(samples), int)
    for first in range(0, len(images), _CHUNK):
        part = images[first : first + _CHUNK].reshape(-1, samples.shape[1])
        # Without the sample's own square, which is the same for all images.
        distances = np.einsum("md,md->m", part, part) - 2 * samples @ part.T
        found = distances.argmin(1)
        nearest = distances[np.arange(len(samples)), found]
        place = np.where(nearest < best, first + found, place)
        best = np.minimum(nearest, best)
    return place
