"""Figures for generated images in a fixed feature space, and grids of such images."""

from piflow_jax.evaluation.diversity import class_diversity
from piflow_jax.evaluation.evaluator import (
    Figures,
    IndexSampler,
    index_labels,
    least_real_samples,
    least_samples,
    measure,
)
from piflow_jax.evaluation.features import FeatureNetwork, load_features, read_features
from piflow_jax.evaluation.floor import Floor, half_split_floor
from piflow_jax.evaluation.frechet import (
    GaussianStatistics,
    frechet_distance,
    frechet_distance_from_statistics,
    gaussian_statistics,
)
from piflow_jax.evaluation.images import as_levels, as_pictures, draw_grid, save_grid
from piflow_jax.evaluation.nearest import nearest_images
from piflow_jax.evaluation.precision_recall import PrecisionRecall, precision_recall
from piflow_jax.evaluation.report import Report, Row

__all__ = [
    "FeatureNetwork",
    "Figures",
    "Floor",
    "GaussianStatistics",
    "IndexSampler",
    "PrecisionRecall",
    "Report",
    "Row",
    "as_levels",
    "as_pictures",
    "class_diversity",
    "draw_grid",
    "frechet_distance",
    "frechet_distance_from_statistics",
    "gaussian_statistics",
    "half_split_floor",
    "index_labels",
    "least_real_samples",
    "least_samples",
    "load_features",
    "measure",
    "nearest_images",
    "precision_recall",
    "read_features",
    "save_grid",
]
