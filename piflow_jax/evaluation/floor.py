"""The floor of the figures: real data measured against other real data."""

import dataclasses

import numpy as np
from numpy.typing import ArrayLike

from piflow_jax.evaluation.checks import checked_features
from piflow_jax.evaluation.frechet import frechet_distance
from piflow_jax.evaluation.precision_recall import precision_recall
from piflow_jax.keys import shuffled

_SPLIT_KEY = 20251  # fixes the splits forever


@dataclasses.dataclass(frozen=True, kw_only=True)
class Floor:
    """Figures of one half of the real data against the other, averaged over fixed splits.

    Attributes:
      frechet: Mean squared Frechet distance between the halves.
      frechet_std: Its standard deviation over the splits, which shows its random variation.
      precision: Mean precision of one half against the other.
      recall: Mean recall; equals the precision up to random variation.
      half_size: Samples per half. The distance has a bias of roughly `1 / half_size`, so a model
        measured with more samples can fall below this floor.
      splits: Number of splits.
    """

    frechet: float
    frechet_std: float
    precision: float
    recall: float
    half_size: int
    splits: int


def half_split_floor(features: ArrayLike, *, splits: int = 4, k: int = 3) -> Floor:
    """Splits real data into random halves and compares them as a model with its data.

    Args:
      features: Features [N, D] of real data; for odd N each split leaves one out.
      splits: Number of splits. They are the same for equal N on every machine.
      k: The neighbour that sets the radius of precision and recall.

    Returns:
      The figures, averaged over splits.

    Raises:
      ValueError: If `features` is malformed, has fewer than `2 (k + 1)` samples or a NaN or
        infinity, or `splits` is less than 1.
    """
    features = checked_features(features, "features", minimum=2 * (k + 1))
    if not isinstance(splits, (int, np.integer)) or splits < 1:
        raise ValueError(f"`splits` must be a positive integer, got {splits!r}")
    half = len(features) // 2
    distances, precisions, recalls = [], [], []
    for split in range(splits):
        order = shuffled(len(features), (_SPLIT_KEY, split))
        one, other = features[order[:half]], features[order[half : 2 * half]]
        distances.append(frechet_distance(one, other))
        precision, recall = precision_recall(one, other, k=k)
        precisions.append(precision)
        recalls.append(recall)
    return Floor(
        frechet=float(np.mean(distances)),
        frechet_std=float(np.std(distances)),
        precision=float(np.mean(precisions)),
        recall=float(np.mean(recalls)),
        half_size=half,
        splits=int(splits),
    )
