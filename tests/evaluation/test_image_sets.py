"""Sets of pictures from folders and archives; features that are computed once."""

import numpy as np
import pytest
from PIL import Image

from piflow_jax.evaluation.image_sets import cached_features, centre_patch, open_images, resized


def picture(place, seed, size=(5, 7)):
    return np.random.default_rng([place, seed]).integers(0, 256, (*size, 3), np.uint8)


def write(folder, pairs):
    folder.mkdir(exist_ok=True)
    for place, seed in pairs:
        Image.fromarray(picture(place, seed)).save(folder / f"{place}-{seed}.png")
    return folder


PAIRS = [(10, 0), (2, 1), (2, 0)]


def test_a_folder_is_ordered_by_prompt_and_seed(tmp_path):
    tmp_path = tmp_path / "runs [1]"  # which would be a pattern
    tmp_path.mkdir()
    images = open_images(write(tmp_path / "set", PAIRS))
    assert images.places.tolist() == [2, 2, 10] and images.seeds.tolist() == [0, 1, 0]
    for number, pair in enumerate([(2, 0), (2, 1), (10, 0)]):
        np.testing.assert_array_equal(images[number], picture(*pair))
    Image.fromarray(picture(3, 0)[..., 0]).save(tmp_path / "set" / "3.png")  # grey, no seed
    # What a run that was killed had under way.
    (tmp_path / "set" / ".00004-0.0f3a.png").write_bytes(b"half a picture")
    images = open_images(tmp_path / "set")
    assert images.places.tolist() == [2, 2, 3, 10] and images[2].shape == (5, 7, 3)


def test_an_archive_is_ordered_likewise(tmp_path):
    path = tmp_path / "set.npz"
    arrays = {"images": np.stack([picture(*pair) for pair in PAIRS])}
    np.savez(path, **arrays)
    assert open_images(path).places.tolist() == [0, 1, 2]
    places, seeds = np.array(PAIRS).T
    np.savez(path, **arrays, place=places, seed=seeds)
    images = open_images(path)
    assert images.places.tolist() == [2, 2, 10]
    np.testing.assert_array_equal(images[1], picture(2, 1))


def test_what_is_wrong_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such pictures"):
        open_images(tmp_path / "absent")
    with pytest.raises(ValueError, match="has no pictures"):
        open_images(tmp_path)
    folder = write(tmp_path / "set", PAIRS)
    Image.fromarray(picture(2, 0)).save(folder / "2.png")
    with pytest.raises(ValueError, match="several pictures of one prompt with the same seed"):
        open_images(folder)
    Image.fromarray(picture(2, 0)).save(folder / "fox.png")
    with pytest.raises(ValueError, match=r"fox\.png is not named <place>-<seed>\.png"):
        open_images(folder)
    path = tmp_path / "set.npz"
    np.savez(path, images=np.zeros((2, 4, 4, 3)))
    with pytest.raises(ValueError, match=r"needs `images`: uint8"):
        open_images(path)
    np.savez(path, images=np.zeros((2, 4, 4, 3), np.uint8), place=np.zeros(2))
    with pytest.raises(ValueError, match="`place` must be 2 integers"):
        open_images(path)
    path.write_text("x")
    with pytest.raises(ValueError, match=r"no folder of PNG files and no \.npz file"):
        open_images(path)


def test_features_are_computed_once_and_anew_for_new_files(tmp_path):
    pairs = [(i, 0) for i in range(150)]
    folder, cache = write(tmp_path / "set", pairs), tmp_path / "cache"
    calls = []

    def extract(images):
        calls.append(len(images))
        if len(calls) == 2 and len(pairs) == 150 and not killed:
            killed.append(True)
            raise KeyboardInterrupt
        return np.stack([image.mean(axis=(0, 1)) for image in images])

    killed = []
    with pytest.raises(KeyboardInterrupt):
        cached_features(open_images(folder), extract, cache, "means")
    calls.clear()
    progress = []
    found = cached_features(
        open_images(folder), extract, cache, "means", lambda *now: progress.append(now)
    )
    assert calls == [64, 22] and progress == [(64, 150), (128, 150), (150, 150)]
    expected = [picture(i, 0).mean(axis=(0, 1)) for i in range(150)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    cached_features(open_images(folder), extract, cache, "means")
    assert calls == [64, 22]
    cached_features(open_images(folder), extract, cache, "other network")
    assert calls == [64, 22, 64, 64, 22]
    Image.fromarray(picture(7, 7, (9, 9))).save(folder / "149-0.png")
    changed = cached_features(open_images(folder), extract, cache, "means")
    assert calls[5:] == [22]
    np.testing.assert_allclose(changed[149], picture(7, 7, (9, 9)).mean(axis=(0, 1)), rtol=1e-6)
    assert not list(cache.glob(".*"))


def test_patches_are_central_and_whole():
    image = picture(0, 0, (301, 400))
    patch = centre_patch(image)
    assert patch.shape == (299, 299, 3)
    np.testing.assert_array_equal(patch, image[1:300, 50:349])
    with pytest.raises(ValueError, match="299 pixels does not fit into 298x400"):
        centre_patch(image[:298])


def test_resizing_keeps_a_plane_and_has_no_alias():
    rows, columns = np.meshgrid(np.arange(598), np.arange(897), indexing="ij")
    ramp = np.stack([rows / 4, columns / 4, rows * 0 + 99], axis=-1)
    found = resized(ramp.round().astype(np.uint8))
    centre_rows = ((np.arange(299) + 0.5) * 2 - 0.5) / 4
    centre_columns = ((np.arange(299) + 0.5) * 3 - 0.5) / 4
    inner = slice(4, -4)
    np.testing.assert_allclose(found[inner, 5, 0], centre_rows[inner], atol=1)
    np.testing.assert_allclose(found[5, inner, 1], centre_columns[inner], atol=1)
    assert (found[..., 2] == 99).all()
    # Of what is finer than the result can show, the mean remains.
    noise = np.random.default_rng(0).integers(0, 256, (1196, 1196, 3), np.uint8)
    assert noise.std() > 70 and resized(noise).std() < 25
