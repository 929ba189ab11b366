"""Figures for generated images in a fixed feature space, and pictures of them."""

from piflow_jax.evaluation.diversity import class_diversity
from piflow_jax.evaluation.features import FeatureNetwork, load_features
from piflow_jax.evaluation.floor import Floor, half_split_floor
from piflow_jax.evaluation.frechet import (
    GaussianStatistics,
    frechet_distance,
    frechet_distance_from_statistics,
    gaussian_statistics,
)
from piflow_jax.evaluation.images import save_grid
from piflow_jax.evaluation.precision_recall import PrecisionRecall, precision_recall

__all__ = [
    "FeatureNetwork",
    "Floor",
    "GaussianStatistics",
    "PrecisionRecall",
    "class_diversity",
    "frechet_distance",
    "frechet_distance_from_statistics",
    "gaussian_statistics",
    "half_split_floor",
    "load_features",
    "precision_recall",
    "save_grid",
]
