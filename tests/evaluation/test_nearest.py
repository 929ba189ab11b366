"""The nearest training image: against SciPy's distances."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from piflow_jax.evaluation import nearest, nearest_images

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(50, 4, 4, 2)).astype(np.float32)
SAMPLES = RNG.normal(size=(7, 4, 4, 2)).astype(np.float32)


@pytest.mark.parametrize("chunk", [4096, 50, 9])
def test_it_is_the_one_of_the_smallest_distance(monkeypatch, chunk):
    monkeypatch.setattr(nearest, "_CHUNK", chunk)
    distances = cdist(SAMPLES.reshape(7, -1), IMAGES.reshape(50, -1))
    np.testing.assert_array_equal(nearest_images(SAMPLES, IMAGES), distances.argmin(1))
    np.testing.assert_array_equal(nearest_images(IMAGES[::3], IMAGES), np.arange(50)[::3])


def test_sizes_must_agree():
    for images in (IMAGES[..., :1], IMAGES[:0]):
        with pytest.raises(ValueError, match=r"samples \[7, 4, 4, 2\] and images"):
            nearest_images(SAMPLES, images)
