"""Frechet distance between Gaussians fitted to two sets of features.

D. C. Dowson and B. V. Landau, "The Frechet distance between multivariate normal distributions",
J. Multivariate Analysis 12 (1982); used on network features by M. Heusel et al., "GANs trained by a
two time-scale update rule converge to a local Nash equilibrium" (arXiv 1706.08500), as FID.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from piflow_jax.evaluation.checks import check_same_dimension, checked_features


class GaussianStatistics(NamedTuple):
    """Mean float64[D] and unbiased covariance float64[D, D] of a set of features."""

    mean: np.ndarray
    covariance: np.ndarray


def gaussian_statistics(features: ArrayLike) -> GaussianStatistics:
    """Fits a Gaussian.

    Args:
      features: [N, D], `N >= 2`; fewer samples than dimensions are allowed.

    Returns:
      Mean and covariance (normalised by N - 1, as the common FID codes do), in float64.

    Raises:
      ValueError: If `features` has another shape, fewer than two samples, or a NaN or infinity.
    """
    features = checked_features(features, "features")
    mean = features.mean(axis=0)
    centred = features - mean
    return GaussianStatistics(mean, centred.T @ centred / (len(features) - 1))


def frechet_distance(features_a: ArrayLike, features_b: ArrayLike) -> float:
    """Returns the (squared) Frechet distance between Gaussians fitted to two sets of features.

    The estimate is biased upwards, by about `D (D + 1) / 4 (1/N + 1/M)` for whitened features of
    equal distributions. Compare only figures with the same sample counts.

    Args:
      features_a: [N, D], `N >= 2`.
      features_b: [M, D], `M >= 2`.

    Returns:
      `|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))`, in squared units of the features; 0 for
      equal means and covariances.

    Raises:
      ValueError: If an argument has another shape, fewer than two samples, or a NaN or infinity.
    """
    features_a = checked_features(features_a, "features_a")
    features_b = checked_features(features_b, "features_b")
    check_same_dimension(features_a, features_b, ("features_a", "features_b"))
    return frechet_distance_from_statistics(
        gaussian_statistics(features_a), gaussian_statistics(features_b)
    )


def frechet_distance_from_statistics(
    statistics_a: tuple[ArrayLike, ArrayLike], statistics_b: tuple[ArrayLike, ArrayLike]
) -> float:
    """Returns the (squared) Frechet distance between two Gaussians.

    `tr((C_a C_b)^(1/2))` is computed as the trace of the root of the symmetric matrix `C_a^(1/2)
    C_b C_a^(1/2)`, which has the same eigenvalues. Unlike a root of the product, it works with
    singular covariances and has no imaginary part to drop.

    Args:
      statistics_a: `(mean [D], covariance [D, D])`.
      statistics_b: Like `statistics_a`.

    Returns:
      The distance, in squared units of the features.

    Raises:
      ValueError: If shapes do not match, a value is NaN or infinite, or a covariance is not
        symmetric or clearly not positive semi-definite.
    """
    mean_a, covariance_a = _checked_statistics(statistics_a, "statistics_a")
    mean_b, covariance_b = _checked_statistics(statistics_b, "statistics_b")
    check_same_dimension(mean_a, mean_b, ("statistics_a", "statistics_b"))
    root_a = _symmetric_root(covariance_a)
    product = root_a @ covariance_b @ root_a
    eigenvalues = np.linalg.eigvalsh((product + product.T) / 2)
    cross = np.sqrt(np.maximum(eigenvalues, 0)).sum()
    spread = np.trace(covariance_a) + np.trace(covariance_b) - 2 * cross
    return max(float(np.sum((mean_a - mean_b) ** 2) + spread), 0.0)


def _checked_statistics(
    statistics: tuple[ArrayLike, ArrayLike], argument: str
) -> tuple[np.ndarray, np.ndarray]:
    mean, covariance = (np.asarray(part, np.float64) for part in statistics)
    if mean.ndim != 1 or covariance.shape != mean.shape * 2:
        raise ValueError(
            f"`{argument}` must be a mean [D] and a covariance [D, D], "
            f"got {list(mean.shape)} and {list(covariance.shape)}"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError(f"`{argument}` has a NaN or infinity")
    if np.abs(covariance - covariance.T).max() > 1e-6 * np.abs(covariance).max():
        raise ValueError(f"the covariance in `{argument}` is not symmetric")
    eigenvalues = np.linalg.eigvalsh(covariance)
    if eigenvalues[0] < -1e-6 * np.abs(eigenvalues).max():
        raise ValueError(
            f"the covariance in `{argument}` is not positive semi-definite: "
            f"its smallest eigenvalue is {eigenvalues[0]:.3g}"
        )
    return mean, covariance


def _symmetric_root(matrix: np.ndarray) -> np.ndarray:
    """The positive semi-definite square root; eigenvalues below zero by rounding count as zero."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
