"""JPEG files to cached latents: killed, resumed, shared by processes, always the same bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from piflow_jax.data.latents import LATENTS, LatentsError, load_latents_source
from piflow_jax.data.picture_sets import PictureFolder, center_crop
from piflow_jax.models.vae import AutoencoderKL
from piflow_jax.modes.autoencoder import Autoencoder, tree_digest
from piflow_jax.modes.prepare import prepare

SIZES = [(16, 16), (20, 16), (37, 40), (16, 31), (50, 33), (18, 17), (16, 24)]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("train")
    rng = np.random.default_rng(0)
    for index, size in enumerate(SIZES):
        folder = root / f"n0{index // 3}"
        folder.mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.JPEG", quality=95)
    return PictureFolder(root)


@pytest.fixture(scope="module")
def vae():
    module = AutoencoderKL(channels=(16, 32), layers_per_block=1, norm_groups=8)
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    return Autoencoder(module, params, tree_digest(params))


SETTINGS = {"image_size": 16, "shard_size": 3, "batch_size": 2}


@pytest.fixture(scope="module")
def whole(images, vae, tmp_path_factory):
    """A set that was prepared in one go."""
    directory = tmp_path_factory.mktemp("whole")
    progress = []
    manifest = prepare(
        images, vae, directory, **SETTINGS, on_progress=lambda *now: progress.append(now)
    )
    assert progress == [(1, 3), (2, 3), (3, 3)]
    assert manifest["vae"] == tree_digest(vae.params)
    assert manifest["source"] == images.description
    return directory


def contents(directory):
    return {
        f"{path.relative_to(directory)}": path.read_bytes()
        for pattern in ("*", "*/*")
        for path in directory.glob(pattern)
        if path.is_file()
    }


def test_the_set_holds_the_moments_of_image_and_mirror_image(whole, images, vae):
    module, params, _ = vae
    source = load_latents_source(whole, expect_vae=tree_digest(params), expect_scale=0.18215)
    assert (len(source), source.shape, source.num_classes) == (7, (8, 8, 4), 3)
    encode = jax.jit(lambda x: module.apply(params, x, method="encode"))
    for index in range(7):
        image, label, key = images[index]
        crop = center_crop(image, 16)
        found = source[index]
        assert found["condition"] == label and source.key(index) == key
        for flip, pixels in enumerate((crop, crop[:, ::-1])):
            mean, logvar = encode(pixels[None].astype(np.float32) / 127.5 - 1)
            np.testing.assert_allclose(found["x"]["mean"][flip], mean[0], rtol=2e-3, atol=1e-3)
            np.testing.assert_allclose(found["x"]["std"][flip], np.exp(logvar[0] / 2), rtol=2e-3)
        # The two are told apart: the test would see them exchanged or equal.
        assert np.abs(found["x"]["mean"][0] - found["x"]["mean"][1]).max() > 0.1


class Killed(Exception):
    pass


def test_killed_between_shards_it_goes_on_to_the_same_bytes(whole, images, vae, place):
    def kill(done, total):
        raise Killed

    for left in (3, 2):
        with pytest.raises(Killed):
            prepare(images, vae, place, **SETTINGS, on_progress=kill)
        assert len(list(place.glob("*-of-*"))) == 4 - left
        with pytest.raises(LatentsError, match=r"latents\.json is missing"):
            load_latents_source(place)
    progress = []
    prepare(images, vae, place, **SETTINGS, on_progress=lambda *now: progress.append(now))
    assert progress == [(1, 1)]
    assert contents(place) == contents(whole)


def test_killed_within_a_shard_it_goes_on_to_the_same_bytes(whole, images, vae, place):
    class Dying:
        class_names, description = images.class_names, images.description

        def __len__(self):
            return len(images)

        def __getitem__(self, index):
            if index == 5:
                raise Killed
            return images[index]

    with pytest.raises(Killed):
        prepare(Dying(), vae, place, **SETTINGS)
    assert len(list(place.glob("*-of-*"))) == 1
    assert not list((place / "preparation").glob("00001.*"))
    prepare(images, vae, place, **SETTINGS)
    assert contents(place) == contents(whole)


def test_two_processes_make_what_one_makes(whole, images, vae, place):
    def run(index):
        return prepare(images, vae, place, **SETTINGS, process_index=index, process_count=2)

    assert run(1) is None
    assert [path.name[-14:] for path in place.glob("*-of-*")] == ["00001-of-00003"]
    manifest = run(0)
    assert contents(place) == contents(whole)
    assert run(1) == manifest == LATENTS.finalize(place)  # nothing left to do


def test_a_truncated_shard_is_made_again(whole, images, vae, place):
    prepare(images, vae, place, **SETTINGS)
    (path,) = place.glob("*-00000-of-*")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(LatentsError, match=path.name):
        LATENTS.finalize(place)
    progress = []
    prepare(images, vae, place, **SETTINGS, on_progress=lambda *now: progress.append(now))
    assert progress == [(1, 1)] and contents(place) == contents(whole)


def test_any_number_of_devices_shares_a_step(images, vae, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "local_device_count", lambda: 3 * len(jax.local_devices()))
    assert prepare(images, vae, tmp_path, **SETTINGS)["num_examples"] == len(SIZES)


def test_going_on_with_other_weights_is_refused(whole, images, vae):
    params = jax.tree.map(lambda leaf: leaf + 1, vae.params)
    other = Autoencoder(vae.module, params, tree_digest(params))
    with pytest.raises(LatentsError, match="was begun differently: vae was"):
        prepare(images, other, whole, **SETTINGS)
    with pytest.raises(LatentsError, match="shard_size was 3, is 4; remove it, or name another"):
        prepare(images, vae, whole, **{**SETTINGS, "shard_size": 4})


def test_the_identity_is_of_names_shapes_types_and_values():
    params = {"a": np.zeros((2, 3), np.float32), "b": np.ones(3, np.float32)}
    identity = tree_digest(params)
    assert identity == tree_digest(jax.tree.map(jnp.asarray, dict(reversed(params.items()))))
    others = [
        {"a": params["a"], "c": params["b"]},
        {"a": params["a"].reshape(3, 2), "b": params["b"]},
        {"a": params["a"].astype(np.int32), "b": params["b"]},
        {"a": params["a"], "b": np.array([1, 1, 2], np.float32)},
    ]
    assert len({identity, *map(tree_digest, others)}) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"process_index": 2, "process_count": 2}, "process_index"),
        ({"batch_size": 0}, "batch_size"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"shard_size": 0}, "shard_size"),
    ],
)
def test_impossible_settings_are_refused(images, vae, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        prepare(images, vae, tmp_path, **{**SETTINGS, **change})
