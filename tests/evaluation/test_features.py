import jax
import numpy as np
import pytest

from piflow_jax.data import load_digits_source
from piflow_jax.evaluation import features as feature_lib
from piflow_jax.evaluation import frechet_distance, load_features

DIGESTS = {
    "digits": "25ea0571cf5ba0e331a21050d8ec1ee4522f65451232ded0e244316b4e75cb04",
    "fashion_mnist": "b259c656084e62942a1a3f0cda8d14bcf99138b2890fe9a7f60b0f1dd654d656",
    "mnist": "8da71a34b042d5b11b2ec6258b7fb58b1d786e7a3905cbcf1b9a4c9a952341f5",
}


def by_loops(network, image):
    """The network for one image, in float64, written out pixel by pixel."""
    weights = {key: np.asarray(value, np.float64) for key, value in network.parameters.items()}
    hidden = np.clip(image.astype(np.float64), -1, 1)
    for index, stride in enumerate(network.strides):
        kernel, size = weights[f"conv{index}_kernel"], hidden.shape[0]
        out_size = -(-size // stride)
        # "SAME": what is missing is padded, the odd pixel at the end.
        total = max((out_size - 1) * stride + 3 - size, 0)
        before = total // 2
        padded = np.pad(hidden, ((before, total - before), (before, total - before), (0, 0)))
        out = np.empty((out_size, out_size, kernel.shape[-1]))
        for y in range(out_size):
            for x in range(out_size):
                patch = padded[y * stride : y * stride + 3, x * stride : x * stride + 3]
                out[y, x] = np.tensordot(patch, kernel, 3) + weights[f"conv{index}_bias"]
        hidden = out / (1 + np.exp(-out))
    raw = hidden.reshape(-1) @ weights["dense_kernel"] + weights["dense_bias"]
    return (raw - weights["mean"]) / weights["scale"]


@pytest.mark.parametrize("name", DIGESTS)
def test_the_network_is_what_its_documentation_says(name):
    network = load_features(name)
    rng = np.random.default_rng(0)
    images = rng.uniform(-1.3, 1.3, (2, *network.shape)).astype(np.float32)
    expected = np.stack([by_loops(network, image) for image in images])
    found = network.extract(images)
    assert found.shape == (2, network.dimension) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", DIGESTS)
def test_shipped_weights_have_not_changed(name):
    # Every figure in docs/ is in this space; new weights mean new figures.
    network = load_features(name)
    assert network.digest == DIGESTS[name]
    arrays = {key: np.asarray(value) for key, value in network.parameters.items()}
    assert feature_lib.weight_digest(arrays) == network.digest
    arrays["mean"] = arrays["mean"] + np.float32(1e-6)
    assert feature_lib.weight_digest(arrays) != network.digest


def test_batching_does_not_show():
    network, source = load_features("digits"), load_digits_source()
    every = network.extract(source.x)
    assert every.shape == (1797, 32)
    np.testing.assert_allclose(network.extract(source.x[:1]), every[:1], atol=1e-5)
    np.testing.assert_allclose(network.extract(source.x[500:530]), every[500:530], atol=1e-5)
    assert network.extract(source.x[:0]).shape == (0, 32)


def test_one_compilation_serves_every_number_of_images():
    network, source = load_features("digits"), load_digits_source()
    network.extract(source.x[:3])
    before = feature_lib._standardised._cache_size()
    network.extract(source.x[:700])
    network.extract(source.x[:1])
    assert feature_lib._standardised._cache_size() == before


def test_real_digits_are_standardised_and_well_conditioned():
    source = load_digits_source()
    features = load_features("digits").extract(source.x).astype(np.float64)
    np.testing.assert_allclose(features.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(features.std(axis=0), 1, atol=1e-4)
    eigenvalues = np.linalg.eigvalsh(np.cov(features.T))
    assert eigenvalues[-1] / eigenvalues[0] < 300
    within = np.mean([features[source.condition == c].var(axis=0).mean() for c in range(10)])
    assert within > 0.4  # classes have not collapsed


def test_a_linear_rule_on_the_features_names_the_digits():
    source = load_digits_source()
    features = load_features("digits").extract(source.x)
    design = np.concatenate([features, np.ones((1797, 1))], axis=1)
    solution = np.linalg.lstsq(design, np.eye(10)[source.condition], rcond=None)[0]
    assert np.mean(np.argmax(design @ solution, axis=1) == source.condition) > 0.97


def test_the_distance_grows_with_damage():
    source, network = load_digits_source(), load_features("digits")
    real = network.extract(source.x)
    noise = np.random.default_rng(0).normal(size=source.x.shape)
    distances = [
        frechet_distance(real, network.extract(source.x + level * noise))
        for level in (0.1, 0.2, 0.4, 0.8)
    ]
    assert distances == sorted(distances)
    assert distances[0] < 0.1 and distances[-1] > 1


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((3, 8, 8)), r"`images` must have the shape \[N, 8, 8, 1\]"),
        (np.zeros((3, 28, 28, 1)), r"`images` must have the shape \[N, 8, 8, 1\]"),
        (np.full((3, 8, 8, 1), np.nan), "`images` has NaN or infinity in 3 of 3"),
    ],
)
def test_malformed_images_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        load_features("digits").extract(images)


def test_unknown_space_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'faces'.*'digits', 'mnist', 'fashion_mnist'"):
        load_features("faces")


def test_weights_are_small_and_accept_jax_arrays():
    for name in DIGESTS:
        assert feature_lib.weight_path(name).stat().st_size < 300_000
    images = jax.numpy.zeros((2, 8, 8, 1))
    assert load_features("digits").extract(images).shape == (2, 32)
