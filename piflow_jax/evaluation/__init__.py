"""Figures for generated images in a fixed feature space, and pictures of them."""

from piflow_jax.evaluation.diversity import class_diversity
from piflow_jax.evaluation.evaluator import (
    Figures,
    index_labels,
    index_noise,
    measure,
    sample_by_index,
)
from piflow_jax.evaluation.features import FEATURE_SPACES, FeatureNetwork, load_features
from piflow_jax.evaluation.floor import Floor, half_split_floor
from piflow_jax.evaluation.frechet import (
    GaussianStatistics,
    frechet_distance,
    frechet_distance_from_statistics,
    gaussian_statistics,
)
from piflow_jax.evaluation.images import save_grid
from piflow_jax.evaluation.precision_recall import PrecisionRecall, precision_recall
from piflow_jax.evaluation.report import Report, Row

__all__ = [
    "FEATURE_SPACES",
    "FeatureNetwork",
    "Figures",
    "Floor",
    "GaussianStatistics",
    "PrecisionRecall",
    "Report",
    "Row",
    "class_diversity",
    "frechet_distance",
    "frechet_distance_from_statistics",
    "gaussian_statistics",
    "half_split_floor",
    "index_labels",
    "index_noise",
    "load_features",
    "measure",
    "precision_recall",
    "sample_by_index",
    "save_grid",
]
