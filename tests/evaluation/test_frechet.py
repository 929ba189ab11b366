import numpy as np
import pytest
import scipy.linalg

from piflow_jax.evaluation import (
    frechet_distance,
    frechet_distance_from_statistics,
    gaussian_statistics,
)


def random_covariance(rng, dimension, rank=None):
    factor = rng.normal(size=(dimension, rank or dimension + 3))
    return factor @ factor.T / factor.shape[1]


def test_one_dimensional_closed_form():
    # Between N(m, s^2) and N(n, r^2): (m - n)^2 + (s - r)^2.
    distance = frechet_distance_from_statistics(([1.0], [[4.0]]), ([-2.0], [[0.25]]))
    assert distance == pytest.approx(9 + 1.5**2, rel=1e-12)


def test_commuting_covariances_closed_form():
    rng = np.random.default_rng(0)
    rotation = np.linalg.qr(rng.normal(size=(7, 7)))[0]
    a, b = rng.uniform(0.1, 5, (2, 7))
    mean_a, mean_b = rng.normal(size=(2, 7))
    expected = np.sum((mean_a - mean_b) ** 2) + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
    distance = frechet_distance_from_statistics(
        (mean_a, rotation * a @ rotation.T), (mean_b, rotation * b @ rotation.T)
    )
    assert distance == pytest.approx(expected, rel=1e-10)


def test_general_covariances_agree_with_scipys_matrix_root():
    rng = np.random.default_rng(1)
    a, b = random_covariance(rng, 12), random_covariance(rng, 12)
    mean_a, mean_b = rng.normal(size=(2, 12))
    root = scipy.linalg.sqrtm(a @ b).real
    expected = np.sum((mean_a - mean_b) ** 2) + np.trace(a + b - 2 * root)
    distance = frechet_distance_from_statistics((mean_a, a), (mean_b, b))
    assert distance == pytest.approx(expected, rel=1e-9)
    assert distance == pytest.approx(
        frechet_distance_from_statistics((mean_b, b), (mean_a, a)), rel=1e-9
    )


def test_rank_deficient_covariances():
    # Orthogonal supports do not interact: the distance is the sum of the traces.
    a, b = np.diag([3.0, 1.0, 0, 0]), np.diag([0, 0, 2.0, 0])
    zero = np.zeros(4)
    assert frechet_distance_from_statistics((zero, a), (zero, b)) == pytest.approx(6, abs=1e-12)
    # A subspace in common: compare with the closed form inside that subspace.
    rng = np.random.default_rng(2)
    basis = np.linalg.qr(rng.normal(size=(20, 5)))[0]
    small_a, small_b = random_covariance(rng, 5), random_covariance(rng, 5)
    expected = np.trace(small_a + small_b - 2 * scipy.linalg.sqrtm(small_a @ small_b).real)
    embedded = [(np.zeros(20), basis @ small @ basis.T) for small in (small_a, small_b)]
    assert frechet_distance_from_statistics(*embedded) == pytest.approx(expected, rel=1e-6)


def test_equal_sets_are_at_distance_zero_even_with_few_samples():
    features = np.random.default_rng(3).normal(size=(5, 30)).astype(np.float32)
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-6)


def test_from_samples_agrees_with_numpys_statistics():
    rng = np.random.default_rng(4)
    a, b = rng.normal(size=(60, 6)), 2 * rng.normal(size=(80, 6)) + 1
    statistics = gaussian_statistics(a)
    np.testing.assert_allclose(statistics.mean, np.mean(a, axis=0))
    np.testing.assert_allclose(statistics.covariance, np.cov(a, rowvar=False))
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_a_large_common_offset_costs_no_precision():
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=(2, 200, 4))
    assert frechet_distance(a + 1e6, b + 1e6) == pytest.approx(frechet_distance(a, b), rel=1e-6)


def test_the_stated_bias_holds_for_white_features():
    rng = np.random.default_rng(6)
    n, m, d = 600, 900, 20
    found = np.mean(
        [frechet_distance(rng.normal(size=(n, d)), rng.normal(size=(m, d))) for _ in range(10)]
    )
    # The docstring's covariance part and the means' part, D (1/N + 1/M).
    assert found == pytest.approx((d * (d + 1) / 4 + d) * (1 / n + 1 / m), rel=0.1)


GOOD = np.random.default_rng(7).normal(size=(9, 3))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.full((9, 3), np.nan), "NaN or infinity in 9 of 9"),
        (GOOD[:1], "1 samples; at least 2"),
        (GOOD[0], r"shape \[N, D\]"),
        (np.ones((9, 4)), "dimension"),
        (np.ones((9, 3), int), "floating"),
    ],
)
def test_malformed_features_are_refused_by_name(bad, message):
    with pytest.raises(ValueError, match=f"features_a.*{message}"):
        frechet_distance(bad, GOOD)
    with pytest.raises(ValueError, match="features_b"):
        frechet_distance(GOOD, bad)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ((np.zeros(2), np.eye(3)), "mean"),
        ((np.zeros(2), np.array([[1.0, 0.5], [0.0, 1.0]])), "not symmetric"),
        ((np.zeros(2), np.diag([1.0, -0.5])), "positive semi-definite"),
        ((np.zeros(2), np.diag([1.0, np.inf])), "infinity"),
        ((np.zeros(3), np.eye(3)), "dimension"),
    ],
)
def test_malformed_statistics_are_refused_by_name(bad, message):
    good = (np.zeros(2), np.eye(2))
    for arguments, name in (((bad, good), "statistics_a"), ((good, bad), "statistics_b")):
        with pytest.raises(ValueError) as error:
            frechet_distance_from_statistics(*arguments)
        assert name in str(error.value) and message in str(error.value)
