"""ImageNet's training images by index, from a folder, the official tar file or TFDS; ADM's crop.

Each source gives `RawImage(image, label, key)`: the image as `read_picture` reads it, the position
of its class among the sorted WordNet ids, and `<wnid>/<file name>`. Folder and tar file sort by
that key, so both give the same images in the same order. All are safe to read in threads.
"""

import hashlib
import os
import tarfile
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from piflow_jax.data.pictures import PicturesError, is_picture, read_picture

__all__ = [
    "FolderImages",
    "ImageSource",
    "RawImage",
    "TarImages",
    "TfdsImages",
    "center_crop",
    "open_imagenet",
]

_TFDS_NAME = "imagenet2012"
_LONGEST = 1000  # times the short side


class RawImage(NamedTuple):
    """One image before any crop.

    Attributes:
      image: uint8[H, W, 3].
      label: Class in [0, num_classes).
      key: Name that is unique within the data set.
    """

    image: np.ndarray
    label: int
    key: str


class ImageSource(Protocol):
    """Labelled images of any size by index.

    Attributes:
      num_classes: Number of classes.
      description: What the images are, the same wherever they lie; recorded with the latents.
    """

    num_classes: int
    description: str

    def __len__(self) -> int:
        """Returns the number of images."""
        ...

    def __getitem__(self, index: int) -> RawImage:
        """Returns one image, `0 <= index < len(self)`."""
        ...


def center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """The crop of ADM (2105.05233) and DiT, to the bit.

    Halves by box filter while the short side is at least `2 size`, resizes the short side to `size`
    by bicubic filter, cuts out the centre.

    Args:
      image: uint8[H, W, 3].
      size: Side of the square.

    Returns:
      uint8[size, size, 3].
    """
    from PIL import Image

    # Of a narrow strip the ends, which are cut off in any case, would take gigabytes on the way.
    longest = _LONGEST * min(image.shape[:2])
    top, left = (max(side - longest, 0) // 2 for side in image.shape[:2])
    picture = Image.fromarray(image[top : top + longest, left : left + longest])
    while min(picture.size) >= 2 * size:
        half = (picture.width // 2, picture.height // 2)
        picture = picture.resize(half, resample=Image.Resampling.BOX)
    scale = size / min(picture.size)
    scaled = (round(picture.width * scale), round(picture.height * scale))
    pixels = np.asarray(picture.resize(scaled, resample=Image.Resampling.BICUBIC))
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


class FolderImages:
    """A folder with one folder of images for each class, such as `train/n01440764/*.JPEG`.

    Args:
      directory: The folder; its folders, sorted by name, are the classes.

    Raises:
      FileNotFoundError: If it does not exist.
      PicturesError: If it is no folder, has no folders, or one without images.
    """

    def __init__(self, directory: str | os.PathLike):
        self._root = Path(directory)
        if not self._root.exists():
            raise FileNotFoundError(f"{directory}: there is no such folder of images")
        if not self._root.is_dir():
            raise PicturesError(f"{directory} is neither a folder of class folders nor a .tar file")
        entries = sorted(os.scandir(self._root), key=lambda entry: entry.name)
        for entry in entries:  # a class that is left out would change the labels of others
            if entry.is_symlink() and not os.path.exists(entry.path):
                raise PicturesError(f"{entry.path} is a link to nothing")
        classes = [entry.name for entry in entries if entry.is_dir()]
        if not classes:
            raise PicturesError(f"{directory} has no folders, one for each class")
        self.num_classes = len(classes)
        self._keys, self._labels = [], []
        for label, name in enumerate(classes):
            files = sorted(filter(is_picture, os.listdir(self._root / name)))
            if not files:
                raise PicturesError(f"no images in {self._root / name}")
            self._keys += [f"{name}/{file}" for file in files]
            self._labels += [label] * len(files)
        self.description = _describe(self._keys)

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self._keys)

    def __getitem__(self, index: int) -> RawImage:
        """Reads and decodes one image."""
        key = self._keys[index]
        return RawImage(read_picture(self._root / key), self._labels[index], key)


class TarImages:
    """`ILSVRC2012_img_train.tar`, a tar of one tar for each class, read where it lies.

    Opening it walks over all headers, 1.3 million for the whole set.

    Args:
      path: The tar file; its tars, sorted by name, are the classes.

    Raises:
      FileNotFoundError: If it does not exist.
      PicturesError: If it is damaged, has no tars in it, or one without images.
    """

    def __init__(self, path: str | os.PathLike):
        self._path = os.fspath(path)
        if not os.path.exists(path):
            raise FileNotFoundError(f"{path}: there is no such file of images")
        self._file = open(path, "rb")  # noqa: SIM115  # for as long as the source lives
        entries = []
        try:
            with tarfile.open(fileobj=self._file, mode="r:") as outer:
                tars = {
                    Path(m.name).stem: m for m in outer if m.isfile() and m.name.endswith(".tar")
                }
                for label, name in enumerate(sorted(tars)):
                    images = _images_within(outer, tars[name])
                    if not images:
                        raise PicturesError(f"no images in {tars[name].name} in {path}")
                    entries += [(f"{name}/{file}", label, *place) for file, *place in images]
        except tarfile.TarError as error:
            raise PicturesError(f"{path} is damaged: {error}") from error
        if not tars:
            raise PicturesError(f"{path} has no tar files in it, one for each class")
        self._entries = entries
        self.num_classes = len(tars)
        self.description = _describe([key for key, *_ in entries])

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self._entries)

    def __getitem__(self, index: int) -> RawImage:
        """Reads and decodes one image."""
        key, label, offset, size = self._entries[index]
        data = os.pread(self._file.fileno(), size, offset)
        return RawImage(read_picture(data, f"{self._path}: {key}"), label, key)


def _images_within(outer: tarfile.TarFile, member: tarfile.TarInfo) -> list[tuple[str, int, int]]:
    """Name, offset in the outer file and size of the images in an inner tar, sorted by name."""
    with tarfile.open(fileobj=outer.extractfile(member), mode="r:") as inner:
        return sorted(
            (Path(entry.name).name, member.offset_data + entry.offset_data, entry.size)
            for entry in inner
            if entry.isfile() and is_picture(entry.name)
        )


class TfdsImages:
    """TFDS `imagenet2012`, prepared as ArrayRecord.

    TFDS has encoded anew the few images that were CMYK or PNG; all others are the official bytes.

    Args:
      data_dir: TFDS data directory, the parent of `imagenet2012/`. The default is the
        `TFDS_DATA_DIR` environment variable, else `~/tensorflow_datasets`.
      split: Which split.

    Raises:
      FileNotFoundError: If it is not prepared there.
      PicturesError: If it is damaged, or prepared in a format without random access.
    """

    def __init__(self, data_dir: str | os.PathLike | None = None, split: str = "train"):
        import tensorflow_datasets as tfds

        root = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
        home = Path(root).expanduser() / _TFDS_NAME
        found = [path.parent for path in home.glob("*/dataset_info.json")]
        if not found:
            raise FileNotFoundError(f"TFDS `{_TFDS_NAME}` is not prepared in {home.parent}")
        try:
            directory = max(found, key=lambda path: tfds.core.Version(path.name))
            builder = tfds.builder_from_directory(directory)
        except Exception as error:  # of two parsers, TFDS's and that of protocol buffers
            reason = " ".join(f"{error}".split())
            raise PicturesError(f"{home} cannot be read by TFDS: {reason}") from error
        if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
            raise PicturesError(
                f"{directory} is not in ArrayRecord; convert it with `python -m "
                f"tensorflow_datasets.scripts.convert_format --dataset_dir={directory} "
                "--out_file_format=array_record --out_dir=<new directory>`"
            )
        decoders = {"image": tfds.decode.SkipDecoding()}
        self._directory = directory
        self._examples = builder.as_data_source(split=split, decoders=decoders)
        label = builder.info.features["label"]
        self._names = label.names
        self.num_classes = label.num_classes
        self.description = (
            f"TFDS {_TFDS_NAME}/{directory.name} {split}: {len(self._examples)} images"
        )

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self._examples)

    def __getitem__(self, index: int) -> RawImage:
        """Reads and decodes one image."""
        example = self._examples[index]
        label = int(example["label"])
        key = f"{self._names[label]}/{_text(example['file_name'])}"
        return RawImage(read_picture(example["image"], f"{self._directory}: {key}"), label, key)


def open_imagenet(location: str) -> ImageSource:
    """Opens ImageNet's training images wherever they are.

    Args:
      location: A folder of class folders; a file ending in `.tar`; or `tfds`, or `tfds:DATA_DIR`.

    Returns:
      The images by index.

    Raises:
      FileNotFoundError: If there is nothing.
      PicturesError: If what is there is none of the three.
    """
    kind, _, data_dir = location.partition(":")
    if kind == "tfds":
        return TfdsImages(data_dir or None)
    if location.endswith(".tar") and not os.path.isdir(location):
        return TarImages(location)
    return FolderImages(location)


def _describe(keys: list[str]) -> str:
    """The same for a folder and a tar file of the same images."""
    names = "\n".join(keys).encode(errors="surrogateescape")  # as the file system has them
    digest = hashlib.sha256(names).hexdigest()
    return f"{len(keys)} images, sha256 of their names {digest}"


def _text(value: bytes | str) -> str:
    return value.decode(errors="surrogateescape") if isinstance(value, bytes) else value
