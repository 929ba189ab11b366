"""The Frechet distance as a loss, against closed forms and finite differences in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax.evaluation import frechet_distance_from_statistics
from piflow_jax.flow.frechet import Gaussian, Moments, frechet_distance, frechet_loss

D = 6


def covariance(rng, rank=None):
    factor = rng.normal(size=(D, rank or D + 2))
    return factor @ factor.T / factor.shape[1]


def root_of(matrix):
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def moments_of(features):
    """Mean and covariance of a batch that stands for all samples."""
    centred = features - features.mean(0)[None]
    return Gaussian(features.mean(0), centred.T @ centred / len(features))


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("rank", [None, 2], ids=["regular", "target of rank 2"])
def test_the_gradient_is_that_of_the_distance_of_a_batch(rank):
    rng = np.random.default_rng(0)
    features, mean = 1.5 * rng.normal(size=(20, D)) + 0.3, rng.normal(size=D)
    target = covariance(rng, rank)
    root = root_of(target)

    def exact(features):
        return frechet_distance_from_statistics(tuple(moments_of(features)), (mean, target))

    ours = moments_of(features)
    value, found = jax.value_and_grad(frechet_loss)(features, ours, mean, root)
    if rank is None:  # all samples together have the distance itself
        np.testing.assert_allclose(value, exact(features), rtol=1e-9)
    np.testing.assert_allclose(
        frechet_distance(ours, mean, root), exact(features), rtol=1e-9, atol=1e-7
    )
    # Beside a singular target, the exact function rounds its roots of zero to 1e-8.
    step, atol = (1e-5, 1e-8) if rank is None else (1e-3, 1e-4)
    expected = np.zeros_like(features)
    for index in np.ndindex(3, D):  # three examples say enough
        moved = features.copy()
        for sign in (1, -1):
            moved[index] = features[index] + sign * step
            expected[index] += sign * exact(moved) / (2 * step)
    np.testing.assert_allclose(found[:3], expected[:3], atol=atol)


@pytest.mark.parametrize(("shift", "scale"), [(0.5, 1.0), (0.0, 1.7), (-0.4, 0.6)])
def test_between_round_gaussians_it_is_known(shift, scale):
    """`D ((m - n)^2 + (s - r)^2)` between `N(m, s^2)` and `N(n, r^2)` in D dimensions."""
    ours = Gaussian(jnp.full(D, shift), scale**2 * jnp.eye(D))
    found = frechet_distance(ours, jnp.zeros(D), jnp.eye(D))
    np.testing.assert_allclose(found, D * (shift**2 + (scale - 1) ** 2), rtol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_features_that_are_right_get_no_gradient(dtype):
    rng = np.random.default_rng(1)
    target, mean = covariance(rng), rng.normal(size=D)
    root, right = jnp.asarray(root_of(target), dtype), Gaussian(mean, target)
    features = jnp.asarray(rng.normal(size=(8, D)), dtype)
    right = jax.tree.map(lambda a: jnp.asarray(a, dtype), right)
    wrong = right._replace(mean=right.mean + 1)
    sizes = [
        float(jnp.abs(jax.grad(frechet_loss)(features, ours, right.mean, root)).max())
        for ours in (right, wrong)
    ]
    assert sizes[0] < (1e-3 if dtype == jnp.float32 else 1e-10) < 1e-2 < sizes[1]


@pytest.mark.parametrize("spread", [0.0, 1.0], ids=["no samples", "samples on a line"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_covariances_without_an_inverse_give_a_finite_gradient(dtype, spread):
    """As in the first steps of a run."""
    features = jnp.outer(jnp.linspace(-1, 1, 5, dtype=dtype), jnp.ones(D, dtype))
    ours = moments_of(features * spread)
    value, grads = jax.value_and_grad(frechet_loss)(
        features, ours, jnp.zeros(D, dtype), jnp.eye(D, dtype=dtype)
    )
    assert grads.dtype == dtype and np.isfinite(value) and np.isfinite(grads).all()
    # Norms of gradients are sums of squares.
    assert np.isfinite(jnp.sum(jnp.square(grads)))


def test_moments_are_those_of_all_batches_and_then_of_the_latest():
    rng = np.random.default_rng(2)
    batches = rng.normal(size=(4, 5, D)) + np.arange(4)[:, None, None]
    moments = Moments.none(D)
    for batch in batches[:3]:
        moments = moments.add(jnp.asarray(batch), most=3)
    found, expected = moments.gaussian(), moments_of(batches[:3].reshape(-1, D))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), found, expected)
    # From then on, a third of the mean is the newest batch's.
    first = moments.add(jnp.asarray(batches[3]), most=3).first
    np.testing.assert_allclose(first, 2 / 3 * moments.first + batches[3].mean(0) / 3, rtol=1e-9)
