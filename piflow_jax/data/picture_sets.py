"""Pictures with classes by index, from a folder, a tar file or TFDS, where they lie; ADM's crop.

Each set gives `LabelledPicture(image, label, key)`: the image as `read_picture` reads it, the
position of its class among the sorted names of classes, and `<class>/<file name>`. Folder and tar
file sort by that key, so both give the same pictures in the same order. All are safe to read in
threads.
"""

import concurrent.futures
import hashlib
import os
import posixpath
import tarfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol

import numpy as np
from absl import logging
from etils import epath

from piflow_jax.arguments import prefixed
from piflow_jax.buckets import fetcher, is_remote, located
from piflow_jax.data.pictures import (
    NoPicturesError,
    PicturesError,
    is_hidden,
    is_picture,
    read_picture,
)

__all__ = [
    "LabelledPicture",
    "PictureFolder",
    "PictureSet",
    "PictureTar",
    "TfdsPictures",
    "center_crop",
    "open_pictures",
]

_THREADS = 16
_PADDING = 2**20  # bytes: more zeros than archives end with, in records of any usual size
_TFDS = "tfds"
# Between what is named and a version of a TFDS set may be the set and its configuration.
_TFDS_INFO = tuple(f"{'*/' * depth}dataset_info.json" for depth in range(4))
_TFDS_SPLIT = "train"
_ONE_CLASS = "images"  # of pictures without classes
_LONGEST = 1000  # times the short side


class LabelledPicture(NamedTuple):
    """One picture before any crop.

    Attributes:
      image: uint8[H, W, 3].
      label: Class in [0, num_classes).
      key: Name that is unique within the set.
    """

    image: np.ndarray
    label: int
    key: str


class PictureSet(Protocol):
    """Labelled pictures of any size by index.

    Attributes:
      class_names: Names of the classes, in the order of their labels.
      description: What the pictures are, the same wherever they lie; recorded with what is made of
        them.
    """

    class_names: tuple[str, ...]
    description: str

    def __len__(self) -> int:
        """Returns the number of pictures."""
        ...

    def __getitem__(self, index: int) -> LabelledPicture:
        """Returns one picture, `0 <= index < len(self)`; of a broken one raises `PictureError`."""
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


class _Entry(NamedTuple):
    """A picture of a folder or a tar file; they are sorted by class and name.

    Attributes:
      group: Name of its class; empty of pictures that lie in no class folder.
      name: Name of its file.
      offset: Where a tar file has it.
      size: Its bytes there.
    """

    group: str
    name: str
    offset: int = 0
    size: int = 0

    @property
    def key(self) -> str:
        return f"{self.group}/{self.name}" if self.group else self.name


class _Listed:
    """Classes, order and description of the pictures of a folder or a tar file."""

    def __init__(self, entries: Iterable[_Entry]):
        self._entries = sorted(entries)
        groups = sorted({entry.group for entry in self._entries})
        self.class_names = tuple(group or _ONE_CLASS for group in groups)
        self._labels = {group: label for label, group in enumerate(groups)}
        names = "\n".join(entry.key for entry in self._entries)
        digest = hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()
        # The same for a folder and a tar file of the same pictures.
        self.description = f"{len(self)} images, sha256 of their names {digest}"

    def __len__(self) -> int:
        """Returns the number of pictures."""
        return len(self._entries)


class PictureFolder(_Listed):
    """A folder with one folder of pictures for each class, such as `train/n01440764/*.JPEG`.

    A folder that has no folders is one class. Hidden files and folders do not count. Of the rest,
    what has no name of a picture is left out with a warning, folders in class folders too.

    Args:
      directory: The folder; its folders, sorted by name, are the classes.

    Raises:
      FileNotFoundError: If it does not exist.
      NoPicturesError: If it has no pictures, and its folders have none either.
      PicturesError: If it is no folder, or one of its folders has no pictures.
    """

    def __init__(self, directory: str | os.PathLike):
        self._root = located(directory)
        if not self._root.exists():
            raise FileNotFoundError(f"{directory}: there is no such folder of images")
        if not self._root.is_dir():
            raise PicturesError(
                f"{directory} is neither a folder of images or class folders nor a .tar file"
            )
        groups, loose, others = [], [], []
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            names = _names(self._root)
            for name, folder in zip(names, pool.map(self._is_folder, names), strict=True):
                if folder:
                    groups.append(name)
                elif is_picture(name):
                    loose.append(name)
                elif not (self._root / name).exists():  # without it, others had other labels
                    raise PicturesError(f"{self._root / name} is a link to nothing")
                else:
                    others.append(name)
            listed = list(pool.map(lambda group: _names(self._root / group), groups))
        if not loose and not any(is_picture(file) for files in listed for file in files):
            raise NoPicturesError(f"{directory} has neither images nor folders of them")
        entries = [_Entry("", name) for name in loose if not groups]
        for group, files in zip(groups, listed, strict=True):
            of_group = [_Entry(group, file) for file in filter(is_picture, files)]
            if not of_group:
                raise PicturesError(f"no images in {self._root / group}")
            entries += of_group
        if groups:
            pairs = zip(groups, listed, strict=True)
            others = [f"{group}/{file}" for group, files in pairs for file in files]
            others = [name for name in others if not is_picture(name)]
            _warn_of_loose(directory, loose)
        _warn_of_loose(directory, others, "files or folders", "their names do not end like images'")
        super().__init__(entries)

    def _is_folder(self, name: str) -> bool:
        # In a bucket each question is a request, of which a set of pictures would take as many.
        return not (is_remote(self._root) and is_picture(name)) and (self._root / name).is_dir()

    def __getitem__(self, index: int) -> LabelledPicture:
        """Reads and decodes one picture."""
        entry = self._entries[index]
        image = read_picture(self._root / entry.group / entry.name)
        return LabelledPicture(image, self._labels[entry.group], entry.key)


class PictureTar(_Listed):
    """A tar file of a folder, or of one tar for each class, read where it lies.

    The latter is how ImageNet comes, `ILSVRC2012_img_train.tar`. Opening walks over all headers,
    1.3 million for that set. Links are followed inside the file, and of a name that was appended
    again the last file counts.

    Args:
      path: The tar file; its tars, or the folders in it, sorted by name, are the classes.

    Raises:
      FileNotFoundError: If it does not exist.
      PicturesError: If it is damaged, cut short or compressed, has links that lead out of it, or
        has no pictures in it or in one of its tars.
    """

    def __init__(self, path: str | os.PathLike):
        self._path = located(path)
        if not self._path.exists():
            raise FileNotFoundError(f"{path}: there is no such file of images")
        self._file = self._path.open("rb")  # for as long as the set lives
        self._fetch = self._read
        if is_remote(self._path):
            _, self._fetch = fetcher(self._path)
        damaged = prefixed(f"{path} is damaged or compressed", tarfile.TarError, PicturesError)
        with damaged, tarfile.open(fileobj=self._file, mode="r:") as outer:
            files = _files(outer, f"{path}")
            tars = [name for name in files if name.endswith(".tar")]
            loose = [name for name in files if is_picture(name)]
            entries = [one for tar in tars for one in self._inner(outer, tar, files[tar])]
        if not tars:
            with prefixed(path, PicturesError, PicturesError):
                entries, loose = _grouped({name: files[name] for name in loose})
        elif folders := {*map(posixpath.dirname, loose)} - {*map(posixpath.dirname, tars)}:
            raise PicturesError(
                f"{path} has tar files, such as {_printable(tars[0])}, and images in folders, such "
                f"as {_printable(min(folders))}: pack either alone, and the classes have one form"
            )
        if not entries:
            raise PicturesError(f"{path} has no images in it, and no tar files of them")
        _warn_of_loose(path, loose)
        super().__init__(entries)

    def _read(self, first: int, last: int) -> bytes:
        return os.pread(self._file.fileno(), last - first, first)

    def _inner(self, outer: tarfile.TarFile, name: str, tar: tarfile.TarInfo) -> list[_Entry]:
        """The pictures of a tar of one class."""
        group = PurePosixPath(name).stem
        with tarfile.open(fileobj=outer.extractfile(tar), mode="r:") as inner:
            entries = [
                _Entry(group, PurePosixPath(file).name, tar.offset_data + one.offset_data, one.size)
                for file, one in _files(inner, f"{name} in {self._path}").items()
                if is_picture(file)
            ]
        if not entries:
            raise PicturesError(f"no images in {name} in {self._path}")
        return entries

    def __getitem__(self, index: int) -> LabelledPicture:
        """Reads and decodes one picture."""
        entry = self._entries[index]
        data = self._fetch(entry.offset, entry.offset + entry.size)
        image = read_picture(data, f"{self._path}: {entry.key}")
        return LabelledPicture(image, self._labels[entry.group], entry.key)


def _names(folder: epath.Path) -> list[str]:
    """Names of what lies in a folder and is not hidden; a bucket has its own marker there, too."""
    if is_remote(folder):
        names = [path.name for path in folder.iterdir() if path != folder]
    else:
        names = os.listdir(folder)
    return [name for name in names if not is_hidden(name)]


def _files(tar: tarfile.TarFile, where: str) -> dict[str, tarfile.TarInfo]:
    """Files of a tar by name that are not hidden; a link is the file to which it leads."""
    members: dict[str, tarfile.TarInfo] = {}
    for member in tar:
        name, found = _plain(member.name), member
        if member.islnk():  # to what had the name so far
            found = members.get(_plain(member.linkname), member)
        if not member.isdir():
            members[name] = found  # what is appended replaces what had the name
    # tarfile takes a damaged header, or none, for the end of the archive, which is zeros.
    tar.fileobj.seek(tar.offset)
    count = len(tar.getmembers())
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise PicturesError(
            f"{where} is damaged or cut short behind {count} members; fetch it again"
        )
    left = tar.fileobj.seek(0, os.SEEK_END) - tar.offset
    if left > _PADDING:
        raise PicturesError(
            f"{where} ends behind {count} members, with {left:,} bytes left in the "
            "file: its download has not ended, or other archives are appended to it. Fetch it "
            "again, or pack one archive of all"
        )
    files = {name: _followed(name, members) for name in members if not is_hidden(name)}
    links = sorted(name for name, found in files.items() if found.issym() or found.islnk())
    if links:
        raise PicturesError(
            f"{where} has links to what is no file in it, {len(links)} in all, such as "
            f"{_printable(links[0])}; pack it again with tar --dereference"
        )
    return {name: found for name, found in files.items() if found.isfile()}


def _plain(name: str) -> str:
    return posixpath.normpath(name).lstrip("/")


def _followed(name: str, members: Mapping[str, tarfile.TarInfo]) -> tarfile.TarInfo:
    """The member to which symbolic links lead; a link if they leave the archive or lead nowhere."""
    found, passed = members[name], set()
    while found.issym() and name not in passed:
        passed.add(name)
        name = posixpath.normpath(posixpath.join(posixpath.dirname(name), found.linkname))
        found = members.get(name, found)
    return found


def _grouped(members: Mapping[str, tarfile.TarInfo]) -> tuple[list[_Entry], list[str]]:
    """The pictures of class folders, which lie side by side, and names of those elsewhere."""
    paths = {name: PurePosixPath(name) for name in members}
    folders = {path.parent for path in paths.values()}
    # Where the class folders lie: in a tar of one class, around it.
    root = PurePosixPath(os.path.commonpath(folders)) if len(folders) > 1 else None
    entries, loose = [], []
    for name, path in paths.items():
        if root is None or (path.parent != root and path.parent.parent == root):
            member = members[name]
            entries.append(_Entry(path.parent.name, path.name, member.offset_data, member.size))
        else:
            loose.append(name)
    # As in a folder: without its images a class would have no label, and others another one.
    below = {
        posixpath.relpath(name, root).split("/")[0] for name in loose if paths[name].parent != root
    }
    if empty := below - {entry.group for entry in entries}:
        where = _printable(f"{root / min(empty)}")
        raise PicturesError(
            f"no images in {where}, only in its folders; pack the folder of the classes"
        )
    return entries, loose


def _warn_of_loose(
    where: str | os.PathLike,
    names: Collection[str],
    what: str = "images",
    why: str = "they are in no class folder",
) -> None:
    if names:
        logging.warning(
            "%s: %d %s are left out since %s; the first is %s",
            *(where, len(names), what, why, _printable(min(names))),
        )


def _printable(name: str) -> str:
    """A name for messages, also one that is not UTF-8."""
    return name.encode(errors="backslashreplace").decode()


class TfdsPictures:
    """A data set that TFDS has prepared as ArrayRecord: its images, by its class labels.

    A set without class labels is one class. Of `imagenet2012`, TFDS has encoded anew the few images
    that were CMYK or PNG; all others are the official bytes.

    Args:
      location: Name of the set in the TFDS data directory, or a path to the set, to one of its
        versions, or to a data directory that has one set. The TFDS data directory is the
        `TFDS_DATA_DIR` environment variable, else `~/tensorflow_datasets`.

    Raises:
      FileNotFoundError: If it is not prepared there.
      PicturesError: If there are several sets, or the set is damaged, has no images or no split
        `train`, or is prepared in a format without random access.
    """

    def __init__(self, location: str | os.PathLike = ""):
        import tensorflow_datasets as tfds

        home, versions = _tfds_versions(location)
        try:
            directory = max(versions, key=lambda path: tfds.core.Version(path.name))
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
        features, splits = builder.info.features, builder.info.splits
        self._image = _feature(features, "image", tfds.features.Image)
        self._label = _feature(features, "label", tfds.features.ClassLabel)
        self._name = "file_name" if "file_name" in features else None
        if self._image is None:
            raise PicturesError(f"{directory} has no images among {', '.join(features)}")
        if not {_TFDS_SPLIT}.issubset(splits):
            raise PicturesError(f"{directory} has no {_TFDS_SPLIT!r} among {', '.join(splits)}")
        decoders = {self._image: tfds.decode.SkipDecoding()}
        self._directory = directory
        self._examples = builder.as_data_source(split=_TFDS_SPLIT, decoders=decoders)
        names = [_ONE_CLASS] if self._label is None else features[self._label].names
        self.class_names = tuple(names)
        self.description = (
            f"TFDS {builder.info.full_name} {_TFDS_SPLIT}: {len(self._examples)} images"
        )

    def __len__(self) -> int:
        """Returns the number of pictures."""
        return len(self._examples)

    def __getitem__(self, index: int) -> LabelledPicture:
        """Reads and decodes one picture."""
        example = self._examples[index]
        label = 0 if self._label is None else int(example[self._label])
        name = f"{index}" if self._name is None else _text(example[self._name])
        key = f"{self.class_names[label]}/{name}"
        image = read_picture(example[self._image], f"{self._directory}: {key}")
        return LabelledPicture(image, label, key)


def _tfds_versions(location: str | os.PathLike) -> tuple[Path, list[Path]]:
    """The folder of the set that is meant, and those of its versions."""
    shared = Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    places = [shared / location]
    if os.fspath(location):
        places.insert(0, Path(location).expanduser())
    for place in places:
        versions = [path.parent for info in _TFDS_INFO for path in place.glob(info)]
        homes = sorted({version.parent for version in versions})
        if len(homes) > 1:
            names = ", ".join(map(str, homes))
            raise PicturesError(f"{place} has several TFDS sets; name one of {names}")
        if homes:
            return homes[0], versions
    what = f"TFDS {os.fspath(location)!r}" if os.fspath(location) else "TFDS: a set"
    raise FileNotFoundError(
        f"{what} is not prepared in {shared}; name a set that is, or the path of its folder"
    )


def _feature(features: Any, usual: str, kind: type) -> str | None:
    """The feature of a kind that has its usual name, or comes first; None if there is none."""
    names = [name for name, feature in features.items() if isinstance(feature, kind)]
    return usual if usual in names else next(iter(names), None)


def open_pictures(location: str) -> PictureSet:
    """Opens pictures wherever they are.

    Args:
      location: A folder of class folders, or of pictures, or a file ending in `.tar`, on a disk or
        in a bucket; or `tfds:NAME`, see `TfdsPictures`.

    Returns:
      The pictures by index.

    Raises:
      FileNotFoundError: If there is nothing.
      PicturesError: If what is there is none of the three.
    """
    kind, _, name = location.partition(":")
    if kind == _TFDS:
        return TfdsPictures(name)
    if location.endswith(".tar") and not located(location).is_dir():
        return PictureTar(location)
    return PictureFolder(location)


def _text(value: bytes | str) -> str:
    return value.decode(errors="surrogateescape") if isinstance(value, bytes) else value
