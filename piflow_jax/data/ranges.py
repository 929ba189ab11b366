"""Records of shards that stay in their bucket: each is read by its own range of bytes.

A shard has one uncompressed record in each chunk, see `piflow_jax.data.shards`, so the range of a
chunk is that of a record. Source: Riegeli's description of its files, where headers of blocks
interrupt the chunks, and ArrayRecord's index of chunks at the end of a file.
"""

import concurrent.futures
import functools
import itertools
import os
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath

from piflow_jax.buckets import fetcher

__all__ = ["Ranges", "record_of"]

# Requests that are under way together: each waits for far longer than it transfers.
_REQUESTS = 32
_BLOCK, _BLOCK_HEADER = 2**16, 24
# Of a chunk: its checksum, bytes of its data, their checksum, its type below its number of records,
# and bytes of the records.
_HEADER = struct.Struct("<5Q")
_MAGIC = 0x71930E704FDAE05E
# Fields of the last record of a file, and of an entry of the index.
_INDEX, _SIGN = 1, 2
_OFFSET, _RECORDS = 1, 3


class Ranges:
    """Chunks of shards, read when they are asked for; safe to use in threads.

    Args:
      directory: The set's directory, in a bucket.
      shards: Their entries of the manifest.
      error: What to raise of a shard that is missing or differs; the message has its path.
    """

    def __init__(
        self, directory: epath.Path, shards: Sequence[dict[str, Any]], error: type[ValueError]
    ):
        self._paths = [directory / shard["file"] for shard in shards]
        self._examples = [shard["examples"] for shard in shards]
        self._error = error
        self._locks = [threading.Lock() for _ in shards]
        self._opened: list[tuple[Callable[[int, int], bytes], list[int]] | None]
        self._opened = [None] * len(shards)

    def read(self, places: Sequence[tuple[int, int]]) -> list[tuple[bytes, int]]:
        """Chunks, read together.

        Args:
          places: Of each the shard, and the record's number in it.

        Returns:
          Arguments of `record_of`.

        Raises:
          error: A shard is missing, or differs from what was written.
          OSError: The bucket failed.
        """
        return list(self._pool.map(self._chunk, places))

    @functools.cached_property
    def _pool(self) -> concurrent.futures.Executor:
        return concurrent.futures.ThreadPoolExecutor(_REQUESTS, thread_name_prefix="ranges")

    def _chunk(self, place: tuple[int, int]) -> tuple[bytes, int]:
        shard, record = place
        path = self._paths[shard]
        try:
            with self._locks[shard]:
                if self._opened[shard] is None:
                    self._opened[shard] = _opened(path, self._examples[shard])
            fetch, offsets = self._opened[shard]
            return fetch(*offsets[record : record + 2]), offsets[record]
        except FileNotFoundError as error:
            raise self._error(f"{path} is missing") from error
        except ValueError as error:
            raise self._error(f"{path} differs from what was written: {error}") from error


def _opened(path: os.PathLike, examples: int) -> tuple[Callable[[int, int], bytes], list[int]]:
    """How a shard is read, and where its chunks begin and the last one ends."""
    size, fetch = fetcher(path)
    last = max(size - 1, 0) // _BLOCK * _BLOCK
    try:
        end = _fields(_records(fetch(last, size), last)[0])
        if end[_SIGN] != _MAGIC:
            raise ValueError("its end is none")
        index = end[_INDEX]
        _, *entries = map(_fields, _records(fetch(index, last), index))
        offsets = [entry[_OFFSET] for entry in entries] + [index]
        single = all(entry[_RECORDS] == 1 for entry in entries)
    except (IndexError, KeyError) as error:
        raise ValueError("its index is damaged") from error
    if len(entries) != examples or not single:
        raise ValueError(f"its index is not that of {examples} records")
    return fetch, offsets


def record_of(chunk: bytes, offset: int) -> bytes:
    """The record of a chunk.

    Args:
      chunk: Its bytes, with headers of blocks among them.
      offset: Where it begins in its file.

    Returns:
      The record.

    Raises:
      ValueError: The chunk is no such chunk, or its lengths contradict each other.
    """
    (record,) = _records(chunk, offset)
    return record


def _records(chunk: bytes, offset: int) -> list[bytes]:
    try:
        inside = _without_headers(chunk, offset)
        _, size, _, kind, total = _HEADER.unpack_from(inside)
        data = inside[_HEADER.size : _HEADER.size + size]
        if (kind & 0xFF, data[0]) != (ord("r"), 0):
            raise ValueError("it has a chunk of another type")
        length, at = _varint(data, 1)
        begin, ends = at + length, [at + length]
        while at < begin:
            one, at = _varint(data, at)
            ends.append(ends[-1] + one)
    except (IndexError, struct.error) as error:
        raise ValueError("a chunk is cut short") from error
    if (len(ends) - 1, ends[-1], total, size) != (kind >> 8, size, size - begin, len(data)):
        raise ValueError("lengths in a chunk contradict each other")
    return [data[first:last] for first, last in itertools.pairwise(ends)]


def _without_headers(data: bytes, offset: int) -> bytes:
    """Bytes of a file from an offset on, without those of the blocks' headers."""
    first = -offset % _BLOCK  # where a block begins
    parts = [data[:first]]
    parts += [data[at + _BLOCK_HEADER : at + _BLOCK] for at in range(first, len(data), _BLOCK)]
    return b"".join(parts)


def _fields(message: bytes) -> dict[int, int]:
    """Numbers of a protocol buffer by their fields; what else it has is passed over."""
    found, at = {}, 0
    while at < len(message):
        tag, at = _varint(message, at)
        value, at = _varint(message, at)
        if tag & 7 == 2:  # bytes, after their length
            at += value
        else:
            found[tag >> 3] = value
    return found


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, and where the next begins."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
