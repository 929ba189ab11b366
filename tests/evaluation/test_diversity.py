import tracemalloc

import numpy as np
import pytest
from scipy.spatial.distance import pdist

from piflow_jax.evaluation import class_diversity


def test_agrees_with_scipy():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(120, 7)).astype(np.float32) + 30
    labels = rng.integers(0, 4, 120)
    features[labels == 2] *= 3  # classes of unequal spread and size: their mean is not the pairs'
    expected = np.mean([pdist(features[labels == c].astype(np.float64)).mean() for c in range(4)])
    assert class_diversity(features, labels) == pytest.approx(expected, rel=1e-9)


def test_a_large_class_takes_less_than_the_matrix_of_its_distances():
    features = np.random.default_rng(2).normal(size=(5000, 3))
    tracemalloc.start()
    found = class_diversity(features, np.zeros(5000, int))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == pytest.approx(pdist(features).mean(), rel=1e-9)
    assert peak < 8 * 5000**2


def test_two_points():
    assert class_diversity([[0.0, 0.0], [3.0, 4.0]], [1, 1]) == pytest.approx(5)


def test_classes_far_apart_do_not_count():
    features = np.array([[0.0], [1.0], [1000.0], [1003.0]])
    assert class_diversity(features, [0, 0, 1, 1]) == pytest.approx(2)


def test_collapsed_classes_have_none():
    features = np.repeat(np.random.default_rng(1).normal(size=(3, 5)), 10, axis=0)
    assert class_diversity(features, np.repeat(np.arange(3), 10)) == pytest.approx(0, abs=1e-6)


def test_a_class_of_one_is_left_out():
    assert class_diversity([[0.0], [2.0], [9.0]], [0, 0, 1]) == pytest.approx(2)


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        ([[0.0], [np.nan]], [0, 0], "`features`"),
        ([[0.0], [1.0]], [0], "`labels`"),
        ([[0.0], [1.0]], [0.0, 0.0], "`labels`"),
        ([[0.0], [1.0]], [0, 1], "`labels` has no class with two"),
    ],
)
def test_malformed_input_is_refused_by_name(features, labels, message):
    with pytest.raises(ValueError, match=message):
        class_diversity(features, labels)
