"""Principal components against an SVD, and averages over areas against means of blocks."""

import numpy as np
import pytest

from piflow_jax.evaluation.area import area_averaged, sites_within
from piflow_jax.evaluation.components import PrincipalComponents


def correlated(count, shape, seed=0):
    """Images whose numbers go together, in [-1, 1]."""
    rng = np.random.default_rng(seed)
    size = int(np.prod(shape))
    mixed = rng.normal(size=(count, size)) @ (rng.normal(size=(size, size)) / size)
    return np.tanh(mixed).astype(np.float32).reshape(count, *shape)


@pytest.mark.parametrize("count", [200, 30])  # 30 images have 29 directions
def test_components_are_those_of_an_svd(count):
    images = correlated(count, (5, 4, 3))
    space = PrincipalComponents.of([images[:70], images[70:]] if count > 70 else [images])
    flat = images.reshape(count, -1).astype(np.float64)
    centred = flat - flat.mean(axis=0)
    _, scales, directions = np.linalg.svd(centred, full_matrices=False)
    kept = min(48, count - 1)
    expected = centred @ directions[:kept].T / scales[:kept] * np.sqrt(count - 1)
    found = space.extract(images)
    assert found.shape == (count, kept) and found.dtype == np.float32
    signs = np.sign(np.sum(found * expected, axis=0))
    np.testing.assert_allclose(found * signs, expected, atol=2e-3)


def test_real_features_are_standardised_and_decorrelated():
    images = correlated(300, (6, 6, 1))
    covariance = np.cov(PrincipalComponents.of([images]).extract(images).T)
    np.testing.assert_allclose(covariance, np.eye(36), atol=1e-3)


def test_the_space_depends_on_the_images_alone():
    images = correlated(100, (4, 4, 1))
    digest = PrincipalComponents.of([images]).digest
    assert len(digest) == 64 and digest == PrincipalComponents.of([images]).digest
    assert digest != PrincipalComponents.of([images[1:]]).digest


def test_kept_components_are_the_same():
    images = correlated(60, (34, 8, 1))
    space = PrincipalComponents.of([images])
    again = PrincipalComponents.of_arrays(space.arrays())
    assert again.digest == space.digest and space.sites == (32, 8)
    np.testing.assert_array_equal(again.extract(images), space.extract(images))


def test_samples_are_clipped_as_pictures_are():
    images = correlated(50, (4, 4, 1))
    space = PrincipalComponents.of([images])
    clipped = np.clip(9 * images, -1, 1)
    np.testing.assert_array_equal(space.extract(9 * images), space.extract(clipped))


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (np.zeros((9, 4, 4, 1), np.float32), "all images are the same"),
        (np.full((9, 4, 4, 1), np.nan, np.float32), "NaN"),
    ],
)
def test_images_without_components_are_refused(images, words):
    with pytest.raises(ValueError, match=words):
        PrincipalComponents.of([images])


def test_other_images_are_refused():
    space = PrincipalComponents.of([correlated(50, (4, 4, 1))])
    with pytest.raises(ValueError, match=r"must have the shape \[N, 4, 4, 1\]"):
        space.extract(np.zeros((2, 4, 4, 3), np.float32))
    with pytest.raises(ValueError, match="NaN or infinity in 2 of 2"):
        space.extract(np.full((2, 4, 4, 1), np.nan))


@pytest.mark.parametrize("sites", [(4, 6), (5, 5), (1, 7), (13, 20)])
def test_averages_are_means_of_blocks(sites):
    images = np.random.default_rng(0).uniform(-1, 1, (3, 13, 20, 2)).astype(np.float32)
    # Each pixel as so many small ones that all rectangles have whole numbers of them.
    fine = images.repeat(sites[0], axis=1).repeat(sites[1], axis=2)
    expected = fine.reshape(3, sites[0], 13, sites[1], 20, 2).mean(axis=(2, 4), dtype=np.float64)
    np.testing.assert_allclose(area_averaged(images, sites), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "most", "sites"),
    [((8, 8, 1), 32, (8, 8)), ((64, 64, 3), 32, (32, 32)), ((300, 100, 3), 64, (64, 21))],
)
def test_sides_are_shortened_together(shape, most, sites):
    assert sites_within(shape, most) == sites
