"""Records of a finished set by index."""

import bisect
import itertools
import math
import os
import re
import resource
from collections.abc import Callable, Sequence
from typing import Any, SupportsIndex

from etils import epath

from piflow_jax.buckets import is_remote
from piflow_jax.data.ranges import Ranges, record_of
from piflow_jax.data.staging import Staging

__all__ = ["Records", "num_records"]

# What ArrayRecord says of files that it cannot open or read, whatever is in them.
_OF_THE_SYSTEM = re.compile(r"(?:open|read|pread)\(\) failed")


class Records(Sequence[Any]):
    """The records of a set's shards, each read when it is asked for; safe to use in threads.

    Shards of a set in a bucket are copied here when the first of their records is, as many as there
    is room for. Records of the others are read where they lie, see `piflow_jax.data.ranges`.

    Args:
      directory: The set's directory.
      shards: Their entries of the manifest.
      parse: What a record means.
      error: What to raise of a damaged record; the message has the path of its shard.
      cache_gib: Most GiB of copies.

    Raises:
      error: If a shard cannot be opened.
      OSError: If the system refuses to open or read one, as many files are open.
    """

    def __init__(
        self,
        directory: epath.Path,
        shards: Sequence[dict[str, Any]],
        parse: Callable[[bytes], Any],
        error: type[ValueError],
        cache_gib: float = math.inf,
    ):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self._paths = [os.fspath(directory / shard["file"]) for shard in shards]
        self._starts = [0, *itertools.accumulate(shard["examples"] for shard in shards)]
        self._parse, self._error = parse, error
        self._staging = self._ranges = None
        opened, self._copied = self._paths, len(self)
        if is_remote(directory):
            self._staging = Staging(directory, shards, error, cache_gib)
            many = len(self._staging.paths)
            # With their numbers of records, copies are opened when the first one is read.
            pairs = zip(self._staging.paths, shards[:many], strict=True)
            opened = [f"{path}[0:{shard['examples']}]" for path, shard in pairs]
            self._copied = self._starts[many]
            self._ranges = Ranges(directory, shards, error)
        # A reader stays open for each shard, and for each copy also its file.
        _may_open(len(opened) * (2 if self._staging else 1))
        try:
            self._records = ArrayRecordDataSource(opened) if opened else None
        except Exception as reason:  # the library's errors have no common class
            raise error(f"{directory} has a damaged shard: {reason}") from reason

    def __len__(self) -> int:
        """Returns the number of records."""
        return self._starts[-1]

    def __getitem__(self, index: SupportsIndex) -> Any:
        """Returns what one record means; raises `error` if it is damaged."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[SupportsIndex]) -> list[Any]:
        """Returns what several records mean, read at once; raises `error` if one is damaged."""
        indices = [range(len(self))[index] for index in indices]
        chunks = self._brought(indices)
        try:
            return [self._parse(record) for record in self._read(indices, chunks)]
        except Exception as reason:  # of the library, or of a parser that meets other bytes
            if len(indices) > 1:  # one by one, the damaged record is named
                return [self[index] for index in indices]
            path = self._paths[self._shard(indices[0])]
            if _OF_THE_SYSTEM.match(str(reason)):
                remedy = "; raise the limit, ulimit -n" if "Too many" in str(reason) else ""
                raise OSError(f"{path} cannot be read: {reason}{remedy}") from reason
            raise self._error(
                f"{path} has a damaged record, the {indices[0]}th of the set: {reason}; remove the "
                "file and prepare again"
            ) from reason

    def stage(self) -> None:
        """All records will be read: copies of shards in a bucket are made in the background."""
        if self._staging is not None:
            self._staging.start()

    def _shard(self, index: int) -> int:
        return bisect.bisect_right(self._starts, index) - 1

    def _brought(self, indices: Sequence[int]) -> dict[int, tuple[bytes, int]]:
        """Waits for copies of these records; returns the chunks of those that have none."""
        if self._staging is None:
            return {}
        copied = sorted({self._shard(i) for i in indices if i < self._copied})
        without = self._staging.wait(*copied)
        far = sorted({i for i in indices if i >= self._copied or self._shard(i) in without})
        places = [(s := self._shard(index), index - self._starts[s]) for index in far]
        return dict(zip(far, self._ranges.read(places), strict=True))

    def _read(self, indices: Sequence[int], chunks: dict[int, tuple[bytes, int]]) -> list[bytes]:
        here = [index for index in indices if index not in chunks]
        if len(here) > 1:
            copies = iter(self._records.__getitems__(here))
        else:  # without the threads that the library starts for a list
            copies = (self._records[index] for index in here)
        return [record_of(*chunks[i]) if i in chunks else next(copies) for i in indices]


def _may_open(files: int) -> None:
    """Lets this process open that many more files, as far as its user may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        wanted = soft + files
        wanted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def num_records(path: str | os.PathLike) -> int:
    """Number of records of the ArrayRecord file at `path`."""
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(os.fspath(path))
    try:
        return reader.num_records()
    finally:
        reader.close()
