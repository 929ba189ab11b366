"""Diversity within a class: the mean distance between two samples of the same label.

It transfers the pairwise LPIPS diversity of J.-Y. Zhu et al., "Toward multimodal image-to-image
translation" (arXiv 1711.11586), to classes, with the Euclidean distance of a feature space. A
student that lost modes of its teacher shows it here first.
"""

import numpy as np
from numpy.typing import ArrayLike

from piflow_jax.evaluation.checks import checked_features

_DISTANCES = 2**22  # at a time, float64


def class_diversity(features: ArrayLike, labels: ArrayLike) -> float:
    """Returns the mean pairwise Euclidean distance within a class, averaged over classes.

    Args:
      features: [N, D].
      labels: Integers [N]. Classes with a single sample have no pair and are left out.

    Returns:
      The mean over classes of the mean distance over unordered pairs of distinct samples, in units
      of the features. Duplicates of a sample count as pairs at distance zero.

    Raises:
      ValueError: If `features` is malformed or has a NaN or infinity, `labels` does not fit it, or
        no class has two samples.
    """
    features = checked_features(features, "features")
    labels = np.asarray(labels)
    if labels.shape != features.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"`labels` must be {len(features)} integers, one for each sample, "
            f"got {labels.dtype}{list(labels.shape)}"
        )
    classes = [features[labels == label] for label in np.unique(labels)]
    means = [_mean_pairwise_distance(members) for members in classes if len(members) > 1]
    if not means:
        raise ValueError("`labels` has no class with two samples, so there is no pair to compare")
    return float(np.mean(means))


def _mean_pairwise_distance(points: np.ndarray) -> float:
    """Mean distance between distinct rows of `points`: float64[n, D], as a float."""
    points = points - points.mean(axis=0)  # limits the cancellation below
    squares = np.einsum("nd,nd->n", points, points)
    n, total = len(points), 0.0
    rows = max(1, _DISTANCES // n)
    for first in range(0, n, rows):
        part = slice(first, first + rows)
        distances = squares[part, None] + squares - 2 * points[part] @ points.T
        np.fill_diagonal(distances[:, first:], 0)
        total += np.sqrt(np.maximum(distances, 0)).sum()
    return float(total / (n * (n - 1)))
