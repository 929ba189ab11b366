"""Crops against an independent resampling in NumPy; three ways to the same images."""

import io
import tarfile
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from piflow_jax.data.picture_sets import (
    PictureFolder,
    PictureTar,
    TfdsPictures,
    center_crop,
    open_pictures,
)
from piflow_jax.data.pictures import PicturesError

NAMES = ("n01440764", "n01443537", "n02085620")
COUNTS = (2, 1, 3)


def jpeg(seed, size=(20, 24), mode="RGB"):
    rng = np.random.default_rng(seed)
    channels = {"RGB": 3, "L": 1, "CMYK": 4}[mode]
    pixels = rng.integers(0, 256, (*size, channels), np.uint8).squeeze()
    buffer = io.BytesIO()
    Image.fromarray(pixels, mode).save(buffer, "JPEG")
    return buffer.getvalue()


def files():
    """Encoded images by class and name; one is grey, one CMYK, as a few of ImageNet's are."""
    modes = ["RGB", "L", "CMYK", "RGB", "RGB", "RGB"]
    result, seed = {}, 0
    for name, count in zip(NAMES, COUNTS, strict=True):
        for index in reversed(range(count)):  # not the order in which they are to be read
            result[f"{name}/{name}_{index}.JPEG"] = jpeg(seed, mode=modes[seed])
            seed += 1
    return result


def decoded(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "train"
    for key, data in reversed(files().items()):
        path = root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (root / "readme.txt").write_text("not a class")
    (root / NAMES[0] / "notes.txt").write_text("not an image")
    # What Jupyter and macOS leave in folders.
    (root / ".ipynb_checkpoints").mkdir()
    for hidden in (".ipynb_checkpoints/a-checkpoint.png", f"{NAMES[0]}/._a.JPEG", "._a.JPEG"):
        (root / hidden).write_text("not a picture of the user's")
    return root


def make_tar(path):
    with tarfile.open(path, "w") as outer:
        for name in reversed(NAMES):
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as inner:
                for key, data in files().items():
                    if key.startswith(name):
                        entry = tarfile.TarInfo(key.split("/")[1])
                        entry.size = len(data)
                        inner.addfile(entry, io.BytesIO(data))
            entry = tarfile.TarInfo(f"{name}.tar")
            entry.size = buffer.tell()
            outer.addfile(entry, io.BytesIO(buffer.getvalue()))
            outer.addfile(tarfile.TarInfo(f"._{name}.tar"))
    return path


def make_tfds(root, file_format="array_record"):
    """A small `imagenet2012` in a data directory."""
    import tensorflow_datasets as tfds

    with tfds.core.registered.skip_registration():

        class Imagenet2012(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("5.1.0")
            url_infos: ClassVar = {}  # nothing to download

            def _info(self):
                features = {
                    "image": tfds.features.Image(encoding_format="jpeg"),
                    "label": tfds.features.ClassLabel(names=list(NAMES)),
                    "file_name": tfds.features.Text(),
                }
                return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

            def _split_generators(self, dl_manager):
                return {"train": self._generate_examples()}

            def _generate_examples(self):
                for key, data in files().items():
                    label, name = key.split("/")
                    yield key, {"image": io.BytesIO(data), "label": label, "file_name": name}

    Imagenet2012(data_dir=root, file_format=file_format).download_and_prepare()
    return root


def check_source(source):
    expected = files()
    assert len(source) == len(expected) and source.class_names == NAMES
    found = [source[index] for index in range(len(source))]
    assert {raw.key for raw in found} == set(expected)
    for raw in found:
        assert raw.image.dtype == np.uint8 and raw.image.shape == (20, 24, 3)
        np.testing.assert_array_equal(raw.image, decoded(expected[raw.key]))
        assert raw.label == NAMES.index(raw.key.split("/")[0])
    return [raw.key for raw in found]


def test_a_folder_is_read_in_the_order_of_its_names(folder):
    assert check_source(open_pictures(str(folder))) == sorted(files())


def test_the_tar_file_is_the_folder(folder, tmp_path):
    source = open_pictures(str(make_tar(tmp_path / "train.tar")))
    assert isinstance(source, PictureTar)
    assert check_source(source) == sorted(files())
    assert source.description == PictureFolder(folder).description
    assert sorted(tmp_path.iterdir()) == [folder, tmp_path / "train.tar"]  # nothing extracted


@pytest.mark.parametrize("root", ["", "train/", "./data/train/"])
def test_a_tar_file_of_the_folder_is_the_folder(folder, tmp_path, root):
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        tar.add(folder, arcname=root or ".")
    source = open_pictures(str(tmp_path / "train.tar"))
    assert check_source(source) == sorted(files())
    assert source.description == PictureFolder(folder).description


def test_links_in_a_tar_file_are_followed_and_the_last_of_a_name_counts(folder, tmp_path):
    first, second = (folder / NAMES[0] / f"{NAMES[0]}_{index}.JPEG" for index in range(2))
    (folder / NAMES[1] / "soft.JPEG").symlink_to(f"../{NAMES[0]}/{first.name}")
    (folder / NAMES[2] / "hard.JPEG").hardlink_to(first)
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        tar.add(folder, arcname=".")
    second.write_bytes(jpeg(9))
    with tarfile.open(tmp_path / "train.tar", "a") as tar:
        tar.add(second, arcname=f"{NAMES[0]}/{second.name}")
    here, there = open_pictures(str(folder)), open_pictures(str(tmp_path / "train.tar"))
    assert len(there) == len(files()) + 2 and there.description == here.description
    for index in range(len(here)):
        np.testing.assert_array_equal(there[index].image, here[index].image)
    with tarfile.open(tmp_path / "train.tar", "a") as tar:
        link = tarfile.TarInfo("n01440764/out.JPEG")
        link.type, link.linkname = tarfile.SYMTYPE, "/elsewhere.JPEG"
        tar.addfile(link)
    with pytest.raises(
        PicturesError, match=r"links .*1 in all, such as n01440764/out\.JPEG; .*--deref"
    ):
        open_pictures(str(tmp_path / "train.tar"))


@pytest.mark.parametrize("tarred", [False, True])
@pytest.mark.parametrize("name", ["", NAMES[0]])
def test_pictures_of_one_folder_are_one_class(folder, tmp_path, name, tarred):
    """A folder of pictures, and a folder with one class folder."""
    where = tmp_path / "one" / name
    where.parent.mkdir(exist_ok=True)
    (folder / NAMES[0]).rename(where)
    location = str(tmp_path / "one")
    if tarred:
        with tarfile.open(tmp_path / "one.tar", "w") as tar:
            tar.add(location, arcname=".")
        location += ".tar"
    source = open_pictures(location)
    assert source.class_names == (name or "images",)
    found = [source[index] for index in range(len(source))]
    assert [(raw.label, raw.key.split("/")[-1]) for raw in found] == [
        (0, f"{NAMES[0]}_{index}.JPEG") for index in range(COUNTS[0])
    ]


@pytest.mark.parametrize("tarred", [False, True])
def test_pictures_outside_of_the_class_folders_are_left_out_with_a_warning(
    folder, tmp_path, tarred, caplog
):
    (folder / "all.png").write_bytes(jpeg(0))
    location = str(folder)
    if tarred:
        with tarfile.open(tmp_path / "train.tar", "w") as tar:
            tar.add(folder, arcname=".")
        location = str(tmp_path / "train.tar")
    with caplog.at_level("WARNING", "absl"):
        source = open_pictures(location)
    assert check_source(source) == sorted(files())
    assert "1 images are left out" in caplog.text and "all.png" in caplog.text


def test_what_has_no_name_of_a_picture_is_left_out_with_a_warning(folder, caplog):
    (folder / NAMES[1] / "more").mkdir()
    (folder / NAMES[1] / "more" / "a.png").write_bytes(jpeg(0))
    with caplog.at_level("WARNING", "absl"):
        assert check_source(open_pictures(str(folder))) == sorted(files())
        open_pictures(str(folder / NAMES[0]))
    assert "2 files or folders are left out since their names" in caplog.text
    assert f"the first is {NAMES[0]}/notes.txt" in caplog.text
    assert f"{NAMES[0]}: 1 files or folders are left out" in caplog.text


@pytest.mark.parametrize(
    "location",
    ["{root}", "{root}/imagenet2012", "{root}/imagenet2012/5.1.0", "imagenet2012", ""],
)
def test_tfds_has_the_same_images(tmp_path, location, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(make_tfds(tmp_path)))
    source = open_pictures(f"tfds:{location.format(root=tmp_path)}")
    assert isinstance(source, TfdsPictures)
    check_source(source)
    assert source.description == "TFDS imagenet2012/5.1.0 train: 6 images"


def test_one_of_several_sets_of_tfds_is_to_be_named(tmp_path):
    make_tfds(tmp_path)
    (tmp_path / "other" / "1.0.0").mkdir(parents=True)
    (tmp_path / "other" / "1.0.0" / "dataset_info.json").write_text("{}")
    with pytest.raises(PicturesError, match=r"several TFDS sets; name one of .*imagenet2012, .*er"):
        open_pictures(f"tfds:{tmp_path}")


def test_a_set_of_tfds_without_classes_has_one(tmp_path):
    import tensorflow_datasets as tfds

    with tfds.core.registered.skip_registration():

        class Drawings(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                grey = tfds.features.Image(shape=(None, None, 1))
                features = tfds.features.FeaturesDict({"drawing": grey})
                return self.dataset_info_from_configs(features=features)

            def _split_generators(self, dl_manager):
                return {"train": self._generate_examples()}

            def _generate_examples(self):
                for index in range(3):
                    yield index, {"drawing": np.full((5, 4, 1), 80 * index, np.uint8)}

    Drawings(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    source = open_pictures(f"tfds:{tmp_path}/drawings")
    assert source.class_names == ("images",) and len({source[i].key for i in range(3)}) == 3
    assert sorted(int(source[i].image.max()) for i in range(3)) == [0, 80, 160]
    assert source[0].image.shape == (5, 4, 3)


def test_tfds_without_random_access_says_how_to_convert(tmp_path):
    make_tfds(tmp_path, "tfrecord")
    with pytest.raises(ValueError, match=r"convert_format --dataset_dir=.*5\.1\.0"):
        TfdsPictures(tmp_path)


def test_other_images_have_another_description(folder):
    before = PictureFolder(folder).description
    (folder / NAMES[1] / f"{NAMES[1]}_0.JPEG").rename(folder / NAMES[1] / "other.JPEG")
    assert PictureFolder(folder).description != before


def test_nothing_or_nothing_of_the_kind_is_refused(tmp_path, folder):
    with pytest.raises(FileNotFoundError):
        open_pictures(str(tmp_path / "elsewhere"))
    with pytest.raises(FileNotFoundError):
        open_pictures(str(tmp_path / "elsewhere.tar"))
    with pytest.raises(FileNotFoundError, match="not prepared in"):
        open_pictures(f"tfds:{tmp_path}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has neither images nor folders"):
        open_pictures(str(tmp_path / "empty"))
    (folder / "n09999999").mkdir()
    with pytest.raises(ValueError, match=r"no images in .*n09999999"):
        open_pictures(str(folder))


def test_a_damaged_tar_file_and_a_damaged_image_are_named(tmp_path, folder):
    path = make_tar(tmp_path / "train.tar")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 3])
    with pytest.raises(ValueError, match=r"train\.tar is damaged"):
        PictureTar(path)
    (folder / NAMES[0] / "bad.JPEG").write_bytes(jpeg(0)[:300])
    source = PictureFolder(folder)
    (index,) = (i for i in range(len(source)) if source._entries[i].name == "bad.JPEG")
    with pytest.raises(ValueError, match=r"n01440764/bad\.JPEG is not a readable image"):
        source[index]


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("inner", [False, True])
def test_a_tar_file_that_ends_at_a_damaged_header_is_refused(folder, tmp_path, inner, cut):
    path = tmp_path / "train.tar"
    with tarfile.open(path, "w") as tar:
        for name in NAMES:
            tar.add(folder / name, arcname=name)
    with tarfile.open(path) as tar:
        header = tar.getmembers()[-2].offset
    content = bytearray(path.read_bytes())
    content[header] ^= 0xFF  # of its checksum
    content = content[:header] if cut else content
    path.write_bytes(content)
    if inner:
        path.rename(tmp_path / "n1.tar")
        with tarfile.open(path, "w") as tar:
            tar.add(tmp_path / "n1.tar", arcname="n1.tar")
    with pytest.raises(PicturesError, match="cut short behind 9 members; fetch it again"):
        open_pictures(str(path))


@pytest.mark.parametrize("tarred", [False, True])
def test_a_folder_around_the_class_folders_and_others_is_refused(folder, tmp_path, tarred):
    """As ImageNet comes from Kaggle: classes in one folder, pictures of others beside it."""
    around = tmp_path / "CLS-LOC"
    around.mkdir()
    folder.rename(around / "train")
    (around / "val").mkdir()
    (around / "val" / "1.png").write_bytes(jpeg(0))
    location = str(around)
    if tarred:
        location += ".tar"
        with tarfile.open(location, "w") as tar:
            tar.add(around, arcname="CLS-LOC")
    with pytest.raises(PicturesError, match=r"no images in .*CLS-LOC/train"):
        open_pictures(location)


def test_a_tar_file_of_tar_files_and_of_folders_is_refused(folder, tmp_path):
    path = make_tar(tmp_path / "train.tar")
    with tarfile.open(path, "a") as tar:
        tar.add(folder, arcname="more")
    with pytest.raises(
        PicturesError, match=f"tar files, .*, and images in folders, .* more/{NAMES[0]}"
    ):
        open_pictures(str(path))


@pytest.mark.parametrize("inner", [False, True])
def test_a_tar_file_that_ends_in_zeros_is_refused(folder, tmp_path, inner):
    """Downloads that take the room of a whole file first have zeros where the rest is to come."""
    path = tmp_path / "n1.tar"
    with tarfile.open(path, "w") as tar:
        for name in NAMES:
            tar.add(folder / name, arcname=name)
    with path.open("ab") as file:
        file.write(bytes(2**20))
    if inner:
        with tarfile.open(tmp_path / "train.tar", "w") as tar:
            tar.add(path, arcname="n1.tar")
        path = tmp_path / "train.tar"
    with pytest.raises(PicturesError, match=r"ends behind \d+ members, with 1,\d+,\d+ bytes left"):
        open_pictures(str(path))


# The crop, restated without PIL: separable filters, rounded to bytes after each of the two passes.


def box(x):
    return ((x > -0.5) & (x <= 0.5)).astype(float)


def cubic(x, a=-0.5):
    x = np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def resample(pixels, axis, size, kernel, support):
    old = pixels.shape[axis]
    ratio = old / size
    stretch = max(ratio, 1.0)
    weights = np.zeros((size, old))
    for i in range(size):
        center = (i + 0.5) * ratio
        low = max(int(center - support * stretch + 0.5), 0)
        high = min(int(center + support * stretch + 0.5), old)
        places = np.arange(low, high)
        weights[i, places] = kernel((places + 0.5 - center) / stretch)
    weights /= weights.sum(1, keepdims=True)
    mixed = np.moveaxis(np.tensordot(weights, pixels, axes=(1, axis)), 0, axis)
    return np.clip(np.floor(mixed + 0.5), 0, 255)


def resize(pixels, height, width, kernel, support):
    pixels = resample(pixels, 1, width, kernel, support)
    return resample(pixels, 0, height, kernel, support)


def crop_by_definition(pixels, size):
    pixels = pixels.astype(float)
    while min(pixels.shape[:2]) >= 2 * size:
        pixels = resize(pixels, pixels.shape[0] // 2, pixels.shape[1] // 2, box, 0.5)
    height, width = pixels.shape[:2]
    scale = size / min(height, width)
    pixels = resize(pixels, round(height * scale), round(width * scale), cubic, 2.0)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize(
    "shape",
    [
        (16, 16),
        (13, 11),
        (16, 21),
        (20, 28),
        (28, 20),
        (40, 23),
        (32, 47),
        (31, 64),
        (70, 65),
        (150, 133),
    ],
)
def test_crop_is_its_definition(shape):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    cropped = center_crop(pixels, 16)
    assert cropped.dtype == np.uint8 and cropped.shape == (16, 16, 3)
    # PIL's weights are integers of 22 bits, so that a rare tie may fall to the other side.
    difference = np.abs(cropped - crop_by_definition(pixels, 16))
    assert difference.max() <= 1 and np.mean(difference > 0) < 0.01


def test_crop_of_doubled_pixels_gives_the_pixels_back():
    pixels = np.random.default_rng(1).integers(0, 256, (16, 25, 3), np.uint8)
    doubled = pixels.repeat(4, axis=0).repeat(4, axis=1)
    np.testing.assert_array_equal(center_crop(doubled, 16), pixels[:, 4:20])
