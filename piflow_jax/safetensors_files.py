"""Files in the `.safetensors` format: names, types and shapes first, tensors one by one.

Tensors are ranges of bytes, of files on a disk and of objects in a bucket alike.

Source: the format's own description: eight bytes of length, a header in JSON, the tensors' bytes.
Its Python library reads into types of numpy alone, which has no float8, and keeps the last of two
tensors of one name.
"""

import json
import math
import os
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from piflow_jax.buckets import fetcher, is_remote
from piflow_jax.whole_files import replacing

# Types by their names in a header.
_DTYPES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "U32": np.uint32,
    "I32": np.int32,
    "U64": np.uint64,
    "I64": np.int64,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F32": np.float32,
    "F64": np.float64,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}
_METADATA = "__metadata__"
# What stands for a large file in a clone without Git LFS.
_POINTER = b"version https://git-lfs"
# Requests to a bucket that are under way together: each waits for far longer than it transfers.
_REQUESTS = 16


class LazyArray:
    """An array that is read when numpy asks for it, and only then; nothing is kept.

    `array[index]` reads a part, where `index` is a tuple of slices (with step 1) of leading axes.

    Attributes:
        shape: Shape.
        dtype: Dtype.
        ndim: Number of axes.
        at_once: How many such arrays are better read at once than one by one.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: Any,
        read: Callable[..., np.ndarray],
        *,
        in_parts: bool = False,
        at_once: int = 1,
    ):
        """An array that `read()` reads; if `in_parts`, `read(index)` reads a part and no more."""
        self.shape = tuple(shape)
        self.dtype = np.dtype(dtype)
        self.ndim = len(self.shape)
        self.at_once = at_once
        self._read, self._in_parts = read, in_parts

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """Reads a part; every call reads anew."""
        return self._read(index) if self._in_parts else self._read()[index]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Reads the array; every call reads anew."""
        if copy is False:
            raise ValueError("a lazy array is always read into new memory")
        array = self._read()
        return array if dtype is None else array.astype(dtype, copy=False)

    def __repr__(self) -> str:
        """Shape and dtype; reads nothing."""
        return f"LazyArray(shape={self.shape}, dtype={self.dtype})"


def open_safetensors(path: epath.Path) -> tuple[dict[str, LazyArray], dict[str, str]]:
    """Opens a file without reading its tensors.

    Args:
        path: The file, on a disk or in a bucket.

    Returns:
        Its arrays by name, in the order of the file, and its metadata. Of a part of an array those
        rows of its first axis are read in which the part lies, which is one range of bytes.

    Raises:
        ValueError: The file is damaged, has two tensors of one name, or a type that neither numpy
            nor `ml_dtypes` has.
    """
    check_here(path)
    try:
        size, read = _bytes_of(path)
        start = 8 + int.from_bytes(read(0, min(8, size)).tobytes(), "little")
        if not 8 < start <= size:
            raise ValueError(f"it has {size} bytes, its header would end at {start}")
        header = json.loads(read(8, start).tobytes(), object_pairs_hook=_distinct)
        metadata = header.pop(_METADATA, None) or {}
        if not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("its metadata is not text")
        entries = [_entry(name, entry) for name, entry in header.items()]
        entries.sort(key=lambda entry: entry[3:])
        _check_layout(entries, size - start)
    except _TwiceError as error:
        raise ValueError(f"{path} has {error} twice; write it anew") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or cut short, fetch it again: {error!r}") from error

    def lazy(kind, shape, first, last):
        dtype, whole = np.dtype(_DTYPES[kind]), shape or (1,)
        row = math.prod(whole[1:]) * dtype.itemsize

        def part(index=()):
            rows, *others = *index, *(slice(None),) * (len(whole) - len(index))
            begin, end, _ = rows.indices(whole[0])
            data = read(start + first + begin * row, start + first + end * row)
            array = data.view(dtype).reshape(end - begin, *whole[1:])
            return np.ascontiguousarray(array[:, *others]) if index else array.reshape(shape)

        at_once = _REQUESTS if is_remote(path) else 1
        return LazyArray(shape, dtype, part, in_parts=True, at_once=at_once)

    unknown = sorted({kind for _, kind, *_ in entries} - set(_DTYPES))
    if unknown:
        raise ValueError(f"{path} has tensors of types that are not read: {', '.join(unknown)}")
    return {name: lazy(*entry) for name, *entry in entries}, metadata


def _bytes_of(path: epath.Path) -> tuple[int, Callable[[int, int], np.ndarray]]:
    """The size of a file, and what reads the bytes between two places."""
    if is_remote(path):
        size, fetch = fetcher(path)
        # A copy, since bytes cannot be written to and need not lie where numbers may begin.
        return size, lambda first, last: np.array(np.frombuffer(fetch(first, last), np.uint8))
    file = os.open(path, os.O_RDONLY)

    def read(first: int, last: int) -> np.ndarray:
        # Not mapped: pages of a map count as the process's memory for as long as it stands.
        data = np.empty(last - first, np.uint8)
        left = memoryview(data)
        while len(left):
            count = os.preadv(file, [left], last - len(left))
            if not count:
                raise OSError(f"{path} was cut short while it was read")
            left = left[count:]
        return data

    weakref.finalize(read, os.close, file)
    return os.fstat(file).st_size, read


def check_here(path: epath.Path) -> None:
    """Raises OSError for a file that cannot be read, ValueError if Git LFS has not brought it."""
    if is_remote(path):
        size, fetch = fetcher(path)
        head = fetch(0, min(len(_POINTER), size))
    else:
        with path.open("rb") as file:
            head = file.read(len(_POINTER))
    if head == _POINTER:
        raise ValueError(f"{path} stands for weights that are not here yet: run git lfs pull")


class _TwiceError(Exception):
    """A name that stands twice in a header."""


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise _TwiceError(name)
        found[name] = value
    return found


def _entry(name: str, entry: Mapping[str, Any]) -> tuple[str, str, tuple[int, ...], int, int]:
    """Name, type, shape, first byte and the byte behind the last."""
    first, last = entry["data_offsets"]
    numbers = (*entry["shape"], first, last)
    if any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError(f"{name} has the shape {entry['shape']} at {first} to {last}")
    return name, str(entry["dtype"]), tuple(entry["shape"]), first, last


def _check_layout(entries: list[tuple], size: int) -> None:
    """Raises ValueError unless tensors follow each other and fill `size` bytes."""
    end = 0
    for name, kind, shape, first, last in entries:
        needed = math.prod(shape) * np.dtype(_DTYPES[kind]).itemsize if kind in _DTYPES else None
        if first != end or (needed is not None and last - first != needed):
            raise ValueError(f"{name} lies at {first} to {last} behind {end}, it has {needed}")
        end = last
    if end != size:
        raise ValueError(f"it holds {size} bytes of tensors, its header says {end}")


def write_safetensors(
    path: str | os.PathLike, state: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes arrays to a `.safetensors` file, wholly or not at all.

    Args:
        path: The file; one that exists is replaced.
        state: Arrays (numpy, JAX or lazy) by name; they are read and written one by one.
        metadata: Text by text, stored in the file's header.

    Raises:
        OSError: The folder is not there or cannot be written to; an old file stays as it was.
        ValueError: An array has a dtype that the format lacks; nothing is written.
    """
    path = epath.Path(path)
    known = {np.dtype(dtype): kind for kind, dtype in _DTYPES.items()}
    typed = {name: _typed(array) for name, array in state.items()}
    for name, array in typed.items():
        if array.dtype not in known:
            raise ValueError(f"{path}: {name} is of {array.dtype}, a type that the format lacks")
    # The widest types first, so that every tensor is aligned, as the format's library has it.
    names = sorted(typed, key=lambda name: (-typed[name].dtype.itemsize, name))
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        shape, dtype = typed[name].shape, typed[name].dtype
        first, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": known[dtype], "shape": list(shape), "data_offsets": [first, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as under_way, under_way.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            array = np.asarray(typed[name], order="C")
            file.write(array.reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def _typed(array: Any) -> Any:
    """Anything with a shape and a type of numpy in the machine's byte order."""
    if not isinstance(getattr(array, "dtype", None), np.dtype):
        array = np.asarray(array)
    return array.astype(array.dtype.newbyteorder("=")) if not array.dtype.isnative else array
