"""Pictures of the user's own, from a folder to pixels, a student, figures and a grid."""

import io
import shutil
import tarfile

import jax
import numpy as np
import pytest
from PIL import Image

from piflow_jax.config import parse
from piflow_jax.data.images import load_images_source
from piflow_jax.modes import run
from piflow_jax.modes.compile import _data
from piflow_jax.systems.shapes import DataShape
from tests import tiny

SIZE = 8
# Colours that survive every format, of pictures wider than high.
SHADES = {"dark": (20, 30, 40), "light": (200, 210, 220)}
PER_CLASS = 8


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setattr("piflow_jax.modes.command._start", lambda *_: None)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "pictures"
    for name, shade in SHADES.items():
        (root / name).mkdir(parents=True)
        for index in range(PER_CLASS):
            pixels = np.full((12, 28, 3), shade, np.uint8)
            pixels[:, :4] = 255  # the sides are cut off
            pixels[4 : 4 + index % 4] += 8
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root


def settings(images, **data):
    config = tiny.get_config()
    config.data.name = "images"
    config.data.images = str(images)
    config.data.image_size = SIZE
    config.data.update(data)
    return config


def labels_and_shades(directory):
    source = load_images_source(directory)
    batch = source.gather(np.arange(len(source)))
    corners = np.rint((batch["x"][:, 0, 0] + 1) * 127.5).astype(int)
    labels = batch["condition"].tolist()
    return source, list(zip(labels, map(tuple, corners.tolist()), strict=True))


EXPECTED = [(label, shade) for label, shade in enumerate(SHADES.values()) for _ in range(PER_CLASS)]


def saved(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


def test_a_folder_becomes_pixels_in_the_work_directory(folder, tmp_path):
    assert run("prepare", settings(folder), tmp_path / "run") == 0
    source, found = labels_and_shades(tmp_path / "run" / "data")
    assert source.class_names == tuple(SHADES) and source.shape == (SIZE, SIZE, 3)
    assert found == EXPECTED


def test_a_tar_file_becomes_the_same_set(folder, tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(folder, arcname="x")
    for name, images in (("a", folder), ("b", tmp_path / "x.tar")):
        assert run("prepare", settings(images, data_dir=str(tmp_path / name)), tmp_path) == 0
    a, b = ((tmp_path / name / "images.json").read_bytes() for name in "ab")
    assert a == b


ORIENTED = Image.Exif()
ORIENTED[274] = 3  # upside down
HALVES = np.repeat(np.array([[0, 255]], np.uint8), 16, axis=0).repeat(8, axis=1)  # dark left half


def halves(mode):
    return Image.fromarray(HALVES).convert(mode)


def transparent():
    picture = Image.fromarray(np.zeros((16, 16, 4), np.uint8))  # black, where it is seen
    picture.paste((0, 0, 0, 255), (0, 0, 8, 16))
    return picture


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("1.png", saved(halves("1"), format="PNG")),
        ("p.gif", saved(halves("P"), format="GIF")),
        ("cmyk.jpg", saved(halves("CMYK"), format="JPEG", quality=100)),
        ("16.png", saved(Image.fromarray(HALVES.astype(np.uint16) * 257), format="PNG")),
        ("alpha.webp", saved(transparent(), format="WEBP", lossless=True)),
        ("turned.jpg", saved(halves("L").rotate(180), format="JPEG", exif=ORIENTED, quality=100)),
        ("x.tif", saved(halves("RGB"), format="TIFF")),
        ("x.bmp", saved(halves("RGB"), format="BMP")),
        ("x.tga", saved(halves("RGB"), format="TGA")),
    ],
)
def test_a_picture_of_any_format_in_no_class_folder_is_grey_if_it_has_no_colours(
    tmp_path, name, content
):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / name).write_bytes(content)
    assert run("prepare", settings(tmp_path / "pictures"), tmp_path) == 0
    source = load_images_source(tmp_path / "data")
    assert (source.shape, source.num_classes) == ((SIZE, SIZE, 1), 1)
    np.testing.assert_allclose(source[0]["x"][:, :3], -1, atol=0.05)
    np.testing.assert_allclose(source[0]["x"][:, 5:], 1, atol=0.05)


def test_refused_pictures_are_listed_and_can_be_left_out(folder, tmp_path, capfd):
    (folder / "light" / "broken.png").write_text("hello")
    for mode in ("prepare", "train"):
        assert run(mode, settings(folder), tmp_path) == 2
        said = capfd.readouterr().err
        assert f"{folder}/light/broken.png is not a readable image: " in said
        assert "skip_refused" in said and "Traceback" not in said
    assert run("prepare", settings(folder, skip_refused=True), tmp_path) == 0
    assert labels_and_shades(tmp_path / "data")[1] == EXPECTED


@pytest.fixture
def without_training(monkeypatch):
    """`--mode=train` up to the opened data, which it returns."""
    opened = []
    monkeypatch.setattr(
        "piflow_jax.modes.train._train",
        lambda config, workdir: opened.append(load_images_source(config.data.data_dir)),
    )
    return opened


def test_train_prepares_what_is_not_prepared_and_continues_what_is_unfinished(
    folder, tmp_path, without_training, monkeypatch
):
    monkeypatch.setattr("piflow_jax.data.images._SHARD_IMAGES", 3)
    config = settings(folder)
    data = tmp_path / "data"
    with monkeypatch.context() as patch:
        patch.setattr("piflow_jax.data.images._cropped", killed_after(7))
        with pytest.raises(Killed):
            run("train", config, tmp_path)
    first = sorted(data.glob("*-of-*"))
    assert len(first) == 2 and not (data / "images.json").exists()
    before = [path.stat().st_mtime_ns for path in first]
    assert run("train", config, tmp_path) == 0
    assert [path.stat().st_mtime_ns for path in first] == before
    assert len(without_training[0]) == 2 * PER_CLASS
    assert labels_and_shades(data)[1] == EXPECTED
    for path in folder.glob("*/*.png"):  # a finished set does without
        path.unlink()
    assert run("train", config, tmp_path) == 0
    shutil.rmtree(folder)
    assert run("train", config, tmp_path) == 0
    config.data.images = ""
    assert run("train", config, tmp_path) == 0 and len(without_training) == 4


class Killed(Exception):
    pass


def killed_after(number):
    from piflow_jax.data.images import _cropped

    done = []

    def cropped(*arguments):
        if len(done) == number:
            raise Killed
        done.append(None)
        return _cropped(*arguments)

    return cropped


@pytest.mark.usefixtures("without_training")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 16}, "image_size is 8, not 16"),
        ({"channels": 1}, "channels is 3, not 1"),
        ({"images": "{folder}/dark"}, "class_names is ('dark', 'light'), not ('images',)"),
    ],
)
def test_a_finished_set_of_something_else_is_refused(folder, tmp_path, change, message, capfd):
    assert run("train", settings(folder), tmp_path) == 0
    change = {k: v.format(folder=folder) if k == "images" else v for k, v in change.items()}
    config = settings(folder)
    config.data.update(change)
    assert run("train", config, tmp_path) == 2
    said = capfd.readouterr().err
    assert message in said and "remove it, or name another config.data.data_dir" in said


@pytest.mark.parametrize(
    ("mode", "workdir", "images", "message"),
    [
        ("prepare", "{tmp}", "", "--mode=prepare of images needs config.data.images"),
        ("train", "{tmp}", "", "name what to prepare by config.data.images"),
        ("evaluate", "{tmp}", "", "data/images.json is missing"),
    ],
)
def test_what_is_missing_is_said(tmp_path, mode, workdir, images, message, capfd):
    assert run(mode, settings(images), workdir.format(tmp=tmp_path)) == 2
    assert message in capfd.readouterr().err


def test_nothing_is_prepared_of_data_that_the_package_has(tmp_path, capfd):
    assert run("prepare", tiny.get_config(), tmp_path) == 2
    said = capfd.readouterr().err
    assert "--mode=prepare is for config.data.name = 'images' or 'latents'" in said


def test_a_step_is_compiled_for_the_shape_of_the_set(folder, tmp_path):
    config = settings(folder, data_dir=str(tmp_path / "set"))
    assert run("prepare", config, tmp_path) == 0
    data = _data(parse(config))
    assert isinstance(data, DataShape)
    assert (data.shape, data.num_classes) == ((SIZE, SIZE, 3), 2)


@pytest.mark.slow
def test_one_command_from_a_folder_to_a_student_figures_and_a_grid(folder, tmp_path):
    for name in SHADES:  # figures need as many
        for index in range(PER_CLASS, 64):
            shutil.copy(folder / name / f"{index % PER_CLASS}.png", folder / name / f"{index}.png")
    config = settings(folder, mirror=True)
    assert run("train", config, tmp_path / "run") == 0
    for name in ("data/images.json", "student/checkpoints", "report.json", "samples.png"):
        assert (tmp_path / "run" / name).exists(), name
    shutil.rmtree(tmp_path / "run" / "data")
    assert run("sample", config, tmp_path / "run") == 0  # the student knows the shape
    assert (tmp_path / "run" / "student.png").exists()
    jax.clear_caches()
