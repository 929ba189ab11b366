import numpy as np
import pytest
from scipy.spatial.distance import cdist
from sklearn.neighbors import NearestNeighbors

from piflow_jax.evaluation import precision_recall
from piflow_jax.evaluation.precision_recall import _CHUNK_ELEMENTS, _kth_smallest, _squared_radii


def by_brute_force(real, generated, k):
    """Equation 1 and 2 of the paper, radii from scikit-learn, distances from SciPy, in float64."""

    def covered(queries, centres):
        # The nearest of the k + 1 neighbours of a member is the member itself.
        radii = NearestNeighbors(n_neighbors=k + 1).fit(centres).kneighbors(centres)[0][:, -1]
        return np.mean(np.any(cdist(queries, centres) <= radii[None, :], axis=1))

    return covered(generated, real), covered(real, generated)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize(("n", "m", "d"), [(200, 333, 4), (97, 64, 16), (7, 6, 2)])
def test_agrees_with_brute_force(n, m, d, k):
    rng = np.random.default_rng(n + k)
    real = rng.normal(size=(n, d)) + 5
    generated = rng.normal(size=(m, d)) * 0.9 + 5.2
    found = precision_recall(real, generated, k=k)
    np.testing.assert_allclose(found, by_brute_force(real, generated, k), atol=1e-6)


def test_agrees_with_brute_force_over_several_chunks():
    rng = np.random.default_rng(0)
    real, generated = rng.normal(size=(1500, 8)), rng.normal(size=(1801, 8))
    assert 3 * _CHUNK_ELEMENTS < 1801 * 1801  # several chunks, and a padded last one
    found = precision_recall(real, generated)
    np.testing.assert_allclose(found, by_brute_force(real, generated, 3), atol=1e-3)


def test_radii_agree_with_scikit_learn():
    points = np.random.default_rng(1).normal(size=(700, 10)).astype(np.float32)
    radii = NearestNeighbors(n_neighbors=4).fit(points).kneighbors(points)[0][:, -1]
    np.testing.assert_allclose(np.sqrt(_squared_radii(points, 3)), radii, rtol=1e-4)


@pytest.mark.parametrize(("columns", "k"), [(3, 3), (31, 2), (32, 4), (100, 7), (257, 3)])
def test_kth_smallest_counts_duplicates(columns, k):
    values = np.random.default_rng(2).integers(0, 9, (50, columns)).astype(np.float32)
    np.testing.assert_array_equal(_kth_smallest(values, k), np.sort(values, axis=1)[:, k - 1])


def test_extremes():
    rng = np.random.default_rng(3)
    real = rng.normal(size=(200, 5))
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, real + 100) == (0.0, 0.0)
    one_mode = np.concatenate([real, real + 100])
    assert precision_recall(one_mode, real) == (1.0, 0.5)  # half of the real data is never made
    assert precision_recall(real, one_mode) == (0.5, 1.0)


GOOD = np.random.default_rng(4).normal(size=(9, 3))


@pytest.mark.parametrize(
    "bad", [GOOD[:3], np.where(GOOD > 1, np.nan, GOOD), GOOD[:, 0], GOOD[:, :2]]
)
def test_malformed_features_are_refused_by_name(bad):
    with pytest.raises(ValueError, match="`real`"):
        precision_recall(bad, GOOD)
    with pytest.raises(ValueError, match="`generated`"):
        precision_recall(GOOD, bad)


@pytest.mark.parametrize("k", [0, -1, 2.5])
def test_impossible_k_is_refused(k):
    with pytest.raises(ValueError, match="`k`"):
        precision_recall(GOOD, GOOD, k=k)
