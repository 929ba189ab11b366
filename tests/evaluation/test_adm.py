"""ADM's figures, its files, and what may be called FID."""

import dataclasses
import hashlib
import io
import re
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.special
from scipy.spatial.distance import cdist

from piflow_jax.evaluation import adm, adm_files
from piflow_jax.evaluation.adm import (
    Activations,
    AdmFigures,
    InceptionNetwork,
    Moments,
    Protocol,
    image_batches,
    inception_score,
    measure_adm,
    read_reference,
    to_uint8,
    write_samples,
    write_statistics,
)
from piflow_jax.evaluation.frechet import GaussianStatistics, frechet_distance_from_statistics
from piflow_jax.models.inception import InceptionV3

PUBLISHED = "6726825d" + "0" * 56
OTHER = "ab" * 32


def moments_of(features, *cuts):
    moments = Moments.empty(features.shape[1])
    for batch in np.split(features, cuts):
        moments = moments.add(batch)
    return moments


def test_moments_of_batches_and_shards_are_numpys():
    features = np.random.default_rng(0).normal(size=(50, 6)) * np.arange(1, 7) + 1e4
    one, other = moments_of(features[:30], 1, 7, 20), moments_of(features[30:], 12)
    together = one.merge(Moments.empty(6)).merge(other)
    assert together.count == 50
    mean, covariance = together.statistics()
    np.testing.assert_allclose(mean, features.mean(0), rtol=1e-14)
    np.testing.assert_allclose(covariance, np.cov(features, rowvar=False), rtol=1e-9, atol=1e-9)
    assert mean.dtype == covariance.dtype == np.float64
    assert Moments.empty(6).merge(Moments.empty(6)).count == 0


def test_moments_of_float32_features_are_taken_in_float64():
    features = (np.random.default_rng(1).normal(size=(40, 3)) + 300).astype(np.float32)
    found = moments_of(features, 13).statistics()
    exact = features.astype(np.float64)
    np.testing.assert_allclose(found.covariance, np.cov(exact, rowvar=False), rtol=1e-10)


def test_moments_refuse_what_they_cannot_be_of():
    moments = Moments.empty(3)
    with pytest.raises(ValueError, match="NaN or infinity in 1 of 2"):
        moments.add(np.array([[0.0, 1, 2], [np.nan, 1, 2]]))
    with pytest.raises(ValueError, match="dimension"):
        moments.add(np.zeros((2, 4)))
    with pytest.raises(ValueError, match="dimension"):
        moments.merge(Moments.empty(1))
    with pytest.raises(ValueError, match="two samples, got 1"):
        moments.add(np.ones((1, 3))).statistics()


@pytest.mark.parametrize(("n", "m"), [(20, 30), (20, 400), (400, 500)])
def test_frechet_distance_agrees_with_the_matrix_root(n, m):
    # Rectified and correlated like a network's features; two of the three are rank-deficient.
    rng = np.random.default_rng(2)
    d = 64
    mix = rng.normal(size=(d, d)) * np.exp(-np.arange(d) / d * 4)[:, None] / np.sqrt(d)
    a, b = np.abs(rng.normal(size=(n, d)) @ mix), np.abs(rng.normal(size=(m, d)) @ mix * 1.1)
    one, other = moments_of(a, 11).statistics(), moments_of(b, 7).statistics()
    found = frechet_distance_from_statistics(one, other)
    root = scipy.linalg.sqrtm(one.covariance @ other.covariance).real
    shift = np.sum((a.mean(0) - b.mean(0)) ** 2)
    spread = np.trace(one.covariance + other.covariance)
    assert found == pytest.approx(shift + spread - 2 * np.trace(root), rel=1e-6)
    # The trace of the root is the nuclear norm of the centred features' product, which needs no
    # root of anything.
    product = (a - a.mean(0)) @ (b - b.mean(0)).T / np.sqrt((n - 1) * (m - 1))
    nuclear = scipy.linalg.svdvals(product).sum()
    assert found == pytest.approx(shift + spread - 2 * nuclear, rel=1e-6)


def test_inception_score_agrees_with_its_formula_split_by_split():
    logits = np.random.default_rng(3).normal(size=(25, 8)) * 2
    scores = []
    for part in (logits[:10], logits[10:20], logits[20:]):
        p = scipy.special.softmax(part, axis=1)
        scores.append(np.exp(np.mean(np.sum(p * (np.log(p) - np.log(p.mean(0))), axis=1))))
    assert inception_score(logits, 10) == pytest.approx(np.mean(scores), rel=1e-12)
    assert inception_score(logits.astype(np.float32), 10) == pytest.approx(np.mean(scores))
    # The default split is 5000, ADM's.
    repeated = np.concatenate([np.tile(logits[:10], (500, 1)), np.tile(logits[10:20], (100, 1))])
    assert inception_score(repeated) == pytest.approx(np.mean(scores[:2]), rel=1e-9)


def test_inception_score_at_its_ends():
    assert inception_score(np.ones((12, 5))) == pytest.approx(1, abs=1e-12)
    certain = np.where(np.arange(10)[:, None] % 5 == np.arange(5), 2000.0, -2000.0)
    assert inception_score(certain) == pytest.approx(5, rel=1e-12)
    with pytest.raises(ValueError, match="`logits`"):
        inception_score(np.full((3, 3), np.inf))
    with pytest.raises(ValueError, match="`split_size`"):
        inception_score(certain, 0)


def test_bytes_are_clipped_and_rounded():
    levels = np.arange(256)
    images = levels / 127.5 - 1
    np.testing.assert_array_equal(to_uint8(images), levels)
    np.testing.assert_array_equal(to_uint8(images + 0.003), levels)  # less than half a level
    np.testing.assert_array_equal(to_uint8(images - 0.003), levels)
    np.testing.assert_array_equal(to_uint8([-3.0, 5.0]), [0, 255])
    with pytest.raises(ValueError, match="NaN"):
        to_uint8([0.0, np.nan])


IMAGES = np.random.default_rng(4).integers(0, 256, (11, 5, 4, 3)).astype(np.uint8)


def test_samples_are_what_numpy_and_adm_read(tmp_path):
    path = tmp_path / "samples.npz"
    write_samples(path, iter(np.split(IMAGES, [4, 8])), np.arange(11, dtype=np.int32) % 3)
    with np.load(path) as archive:
        assert archive.files == ["arr_0", "arr_1"]
        np.testing.assert_array_equal(archive["arr_0"], IMAGES)
        np.testing.assert_array_equal(archive["arr_1"], np.arange(11) % 3)
    assert archive.zip is None and [p.name for p in tmp_path.iterdir()] == ["samples.npz"]
    batches = list(image_batches(path, 4))
    assert [len(batch) for batch in batches] == [4, 4, 3]
    np.testing.assert_array_equal(np.concatenate(batches), IMAGES)
    np.savez_compressed(path, arr_0=IMAGES)  # as others write them
    np.testing.assert_array_equal(np.concatenate(list(image_batches(path, 100))), IMAGES)


@pytest.mark.parametrize(
    ("batches", "labels", "message"),
    [
        ([IMAGES], np.arange(10), "11 images for 10"),
        ([IMAGES], np.arange(12), "11 images for 12"),
        ([IMAGES[:4], IMAGES[4:, :3]], np.arange(11), r"uint8\[7, 3, 4, 3\]"),
        ([IMAGES / 255.0], np.arange(11), "float64"),
        ([IMAGES[0]], np.arange(11), "B, H, W, 3"),
        ([IMAGES[..., :1]], np.arange(11), "B, H, W, 3"),
        ([IMAGES], np.arange(11.0), "`labels`"),
        ([], np.zeros(0, int), "`labels`"),
    ],
)
def test_samples_that_do_not_fit_leave_no_file(tmp_path, batches, labels, message):
    with pytest.raises(ValueError, match=message):
        write_samples(tmp_path / "samples.npz", batches, labels)
    assert not list(tmp_path.iterdir())


def test_images_of_another_kind_or_cut_short_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, arr_0=IMAGES.astype(np.float32))
    with pytest.raises(ValueError, match="arr_0 must be uint8"):
        next(image_batches(path))
    np.savez(path, arr_0=np.asfortranarray(IMAGES))
    with pytest.raises(ValueError, match="arr_0 must be uint8"):
        next(image_batches(path))
    np.savez(path, arr_0=IMAGES)
    with zipfile.ZipFile(path) as archive:
        data = archive.read("arr_0.npy")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", data[:-1])
    with pytest.raises(ValueError, match="ends before image 11"):
        list(image_batches(path))


@pytest.fixture
def small(monkeypatch):
    """Statistics of 4 and 3 features instead of 2048 and 2023."""
    monkeypatch.setattr(adm_files, "POOL_FEATURES", 4)
    monkeypatch.setattr(adm_files, "SPATIAL_FEATURES", 3)


def random_statistics(seed, dimension):
    features = np.random.default_rng(seed).normal(size=(9, dimension))
    return GaussianStatistics(features.mean(0), np.cov(features, rowvar=False))


def adm_file(path, **extra):
    pool, spatial = random_statistics(5, 4), random_statistics(6, 3)
    np.savez(path, mu=pool[0], sigma=pool[1], mu_s=spatial[0], sigma_s=spatial[1], **extra)
    return pool, spatial


def test_a_reference_of_adm_is_read(tmp_path, small):
    path = tmp_path / "VIRTUAL.npz"
    pool, spatial = adm_file(path, arr_0=IMAGES)
    reference = read_reference(path)
    assert reference.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (reference.count, reference.feature_network, reference.images) == (None, None, 11)
    for found, expected in ((reference.pool, pool), (reference.spatial, spatial)):
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    reference.check(PUBLISHED)
    with pytest.raises(ValueError, match="names no feature network"):
        reference.check(OTHER)


def test_a_reference_of_ours_says_how_many_and_of_what(tmp_path, small):
    path = tmp_path / "ours.npz"
    pool, spatial = random_statistics(5, 4), random_statistics(6, 3)
    write_statistics(path, pool, spatial, count=9, feature_network=OTHER)
    reference = read_reference(path)
    assert (reference.count, reference.feature_network, reference.images) == (9, OTHER, 0)
    np.testing.assert_array_equal(reference.pool.covariance, pool.covariance)
    np.testing.assert_array_equal(reference.spatial.mean, spatial.mean)
    assert [p.name for p in tmp_path.iterdir()] == ["ours.npz"]
    reference.check(OTHER)
    with pytest.raises(ValueError, match="made with the feature network abababab"):
        reference.check(PUBLISHED)
    with np.load(path) as archive:  # ADM's evaluator looks for these
        assert {"mu", "sigma", "mu_s", "sigma_s"} < set(archive.files)


def test_images_alone_are_a_reference_for_any_network(tmp_path):
    path = tmp_path / "images.npz"
    np.savez(path, arr_0=IMAGES)
    reference = read_reference(path)
    assert reference.pool is None and reference.images == 11
    reference.check(OTHER)


def test_a_missing_or_unfit_reference_is_refused(tmp_path, small):
    path = tmp_path / "VIRTUAL.npz"
    with pytest.raises(FileNotFoundError) as error:
        read_reference(path)
    assert str(path) in str(error.value)
    assert "imagenet/256/VIRTUAL_imagenet256_labeled.npz" in str(error.value)
    np.savez(path, mu=np.zeros(4), sigma=np.eye(4))  # of another code: no spatial features
    with pytest.raises(ValueError, match="must have mu, sigma, mu_s, sigma_s or arr_0"):
        read_reference(path)
    np.savez(path, mu=np.zeros(4), sigma=np.eye(4), mu_s=np.zeros(2), sigma_s=np.eye(2))
    with pytest.raises(ValueError, match="not of 3"):
        read_reference(path)
    np.savez(path, labels=np.zeros(4))
    with pytest.raises(ValueError, match="must have"):
        read_reference(path)


def archive(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


PICTURES = archive(arr_0=np.zeros((2, 8, 8, 3), np.uint8))
# Of a reference's file, its bytes and what is said.
DAMAGED = {
    "empty": (b"", "is damaged"),
    "a text": (b"hello", "is damaged"),
    "cut short": (PICTURES[:-9], "is damaged"),
    "a flipped bit": (PICTURES.replace(bytes(40), bytes(39) + b"\x01", 1), "is damaged"),
    "floats": (archive(arr_0=np.zeros((2, 8, 8, 3))), "must be uint8"),
    "another number of axes": (archive(arr_0=np.zeros(9, np.uint8)), "must be uint8"),
    "NaN": (
        archive(mu=np.full(4, np.nan), sigma=np.eye(4), mu_s=np.zeros(3), sigma_s=np.eye(3)),
        "not finite",
    ),
    "texts": (
        archive(mu=np.array("x"), sigma=np.eye(4), mu_s=np.zeros(3), sigma_s=np.eye(3)),
        "is damaged",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_reference_is_named(tmp_path, small, case):
    path = tmp_path / "x.npz"
    content, message = DAMAGED[case]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        read_reference(path)
        list(image_batches(path))
    assert str(path) in str(raised.value)


PROTOCOL = Protocol(
    samples=50000,
    label_rule="index mod 1000",
    seed=17,
    nfe=2,
    substeps=128,
    solver="multistep",
    temperature=0.7,
    guidance=1.25,
    decoder="sd-vae-ft-ema",
    dtype="bfloat16",
    feature_network=PUBLISHED,
    reference="VIRTUAL_imagenet256_labeled.npz",
    reference_digest="cd" * 32,
)
FIGURES = AdmFigures(
    frechet=2.8512,
    spatial_frechet=4.6,
    inception_score=251.04,
    precision=0.8265,
    recall=None,
    reference_images=10000,
    protocol=PROTOCOL,
)


def test_a_protocol_prints_all_that_it_holds():
    text = str(PROTOCOL)
    for field in dataclasses.fields(PROTOCOL):
        value = str(getattr(PROTOCOL, field.name))
        assert re.search(rf"(?<![\w.]){re.escape(value)}(?![\w])", text), field.name
    for constant in ("299", "127.5", "5000", "k = 3"):
        assert constant in text
    assert "1 network evaluation," in str(dataclasses.replace(PROTOCOL, nfe=1))


def test_only_figures_of_the_published_features_are_called_fid():
    text = str(FIGURES)
    assert text.startswith("FID 2.851, sFID 4.600, Inception Score 251.040, precision 0.8265, no")
    assert "10000 reference images" in text and str(PROTOCOL) in text
    other = dataclasses.replace(PROTOCOL, feature_network=OTHER)
    text = str(dataclasses.replace(FIGURES, protocol=other))
    # The protocol's list of constants names the score that ADM defines; the figures do not.
    figures = text.split(" (against")[0]
    assert "FID" not in text and "Inception" not in figures
    assert figures.startswith("Frechet distance of features abababab 2.851")


class Network:
    """Stands for `InceptionNetwork`: four pooled features and three spatial ones."""

    def __init__(self, digest):
        self.digest = digest

    def activations(self, images):
        flat = images.reshape(len(images), -1).astype(np.float32) / 255
        return Activations(flat[:, :4], flat[:, 20:23])

    def logits(self, pool):
        return pool * 5


def by_definition(real, made):
    """Precision and recall as in ADM's evaluator: the radius is the fourth smallest distance to
    all of the own set, oneself included."""

    def inside(queries, centres):
        radii = np.sort(cdist(centres, centres), axis=1)[:, 3]
        return np.mean((cdist(queries, centres) <= radii).any(axis=1))

    return inside(made, real), inside(real, made)


def test_all_figures_of_samples_against_images(tmp_path):
    rng = np.random.default_rng(7)
    real = rng.integers(0, 256, (40, 5, 4, 3)).astype(np.uint8)
    made = rng.integers(30, 200, (60, 5, 4, 3)).astype(np.uint8)
    path = tmp_path / "real.npz"
    np.savez(path, arr_0=real)
    reference, network = read_reference(path), Network(OTHER)
    protocol = dataclasses.replace(
        PROTOCOL, samples=60, feature_network=OTHER, reference_digest=reference.digest
    )
    figures = measure_adm(np.split(made, [25]), network, reference, protocol)
    a, b = network.activations(made), network.activations(real)
    for found, x, y in (
        (figures.frechet, a.pool, b.pool),
        (figures.spatial_frechet, a.spatial, b.spatial),
    ):
        covariances = [np.cov(z, rowvar=False) for z in (x, y)]
        root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
        shift = np.sum((x.mean(0) - y.mean(0)) ** 2)
        expected = shift + np.trace(covariances[0] + covariances[1] - 2 * root)
        assert found == pytest.approx(expected, rel=1e-5)
    assert figures.inception_score == pytest.approx(inception_score(a.pool * 5), rel=1e-9)
    precision, recall = by_definition(b.pool, a.pool)
    assert (figures.precision, figures.recall) == pytest.approx((precision, recall))
    assert 0 < recall < precision <= 1 and figures.reference_images == 40

    for wrong in ({"samples": 61}, {"feature_network": PUBLISHED}, {"reference_digest": OTHER}):
        with pytest.raises(ValueError, match="`protocol`"):
            measure_adm([made], network, reference, dataclasses.replace(protocol, **wrong))
    with pytest.raises(ValueError, match="no images"):
        measure_adm([], network, reference, protocol)


def test_statistics_are_taken_from_the_reference_where_it_has_them(tmp_path, small):
    path = tmp_path / "VIRTUAL.npz"
    pool, spatial = adm_file(path)
    reference = read_reference(path)
    protocol = dataclasses.replace(PROTOCOL, samples=11, reference_digest=reference.digest)
    network = Network(PUBLISHED)
    figures = measure_adm([IMAGES], network, reference, protocol)
    activations = network.activations(IMAGES)
    for found, theirs, features in (
        (figures.frechet, pool, activations.pool),
        (figures.spatial_frechet, spatial, activations.spatial),
    ):
        ours = moments_of(features).statistics()
        assert found == pytest.approx(frechet_distance_from_statistics(ours, theirs))
    assert figures.precision is None and figures.recall is None
    # Images give precision and recall only: the statistics remain those of the whole data set.
    adm_file(path, arr_0=IMAGES[:6])
    reference = read_reference(path)
    protocol = dataclasses.replace(protocol, reference_digest=reference.digest)
    both = measure_adm([IMAGES], network, reference, protocol)
    assert both.frechet == figures.frechet and both.recall == 1
    with pytest.raises(ValueError, match="names no feature network"):
        measure_adm([IMAGES], Network(OTHER), reference, protocol)


def test_the_network_runs_in_padded_batches(monkeypatch):
    module = InceptionV3(num_classes=5)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 75, 75, 3)))
    rng = np.random.default_rng(8)
    params = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32) / 20 + (leaf.ndim == 1), shapes
    )
    # Compiled in a third of the time, without the resize (which `test_inception` covers).
    run = jax.jit(lambda p, x: module.apply(p, x, resize=False))
    batches = []

    def activations(params, images):
        batches.append(images.shape)
        output = run(params, images)
        return output.pool, output.spatial.reshape(len(images), -1)

    monkeypatch.setattr(adm, "_activations", activations)
    monkeypatch.setattr(adm, "SPATIAL_FEATURES", 3 * 3 * 7)
    network = InceptionNetwork(params=params, digest=PUBLISHED, batch_size=2)
    images = rng.integers(0, 256, (3, 75, 75, 3)).astype(np.uint8)
    found = network.activations(images)
    assert batches == [(2, 75, 75, 3)] * 2
    assert found.pool.shape == (3, 2048) and found.spatial.shape == (3, 63)
    alone = network.activations(images[2:])
    np.testing.assert_array_equal(found.pool[2:], alone.pool)
    assert np.abs(found.pool[0] - found.pool[2]).max() > 0
    kernel = np.asarray(params["params"]["fc_kernel"])
    np.testing.assert_allclose(network.logits(found.pool), found.pool @ kernel, rtol=1e-4)
    assert network.activations(images[:0]).pool.shape == (0, 2048)
    for bad in (images / 255.0, images[0], images[..., :1]):
        with pytest.raises(ValueError, match="uint8"):
            network.activations(bad)
    assert network.published and not dataclasses.replace(network, digest=OTHER).published
