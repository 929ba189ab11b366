"""Records of a finished set by index."""

import bisect
import itertools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, SupportsIndex

from etils import epath

from piflow_jax.buckets import is_remote
from piflow_jax.data.staging import Staging

__all__ = ["Records", "num_records"]


class Records(Sequence[Any]):
    """The records of a set's shards, each read when it is asked for; safe to use in threads.

    Shards of a set in a bucket are copied here when the first of their records is.

    Args:
      directory: The set's directory.
      shards: Their entries of the manifest.
      parse: What a record means.
      error: What to raise of a damaged record; the message has the path of its shard.
      cache_gib: Most GiB of copies.

    Raises:
      error: If a shard cannot be opened, or there is no room for copies.
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
        self._ends = list(itertools.accumulate(shard["examples"] for shard in shards))
        self._parse, self._error = parse, error
        self._staging, opened = None, self._paths
        if is_remote(directory):
            self._staging = Staging(directory, shards, error, cache_gib)
            # With their numbers of records, copies are opened when the first one is read.
            pairs = zip(self._staging.paths, shards, strict=True)
            opened = [f"{path}[0:{shard['examples']}]" for path, shard in pairs]
        try:
            self._records = ArrayRecordDataSource(opened)
        except Exception as reason:  # the library's errors have no common class
            raise error(f"{directory} has a damaged shard: {reason}") from reason

    def __len__(self) -> int:
        """Returns the number of records."""
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: SupportsIndex) -> Any:
        """Returns what one record means; raises `error` if it is damaged."""
        index = range(len(self))[index]
        self._wait(index)
        try:
            return self._parse(self._records[index])
        except Exception as reason:  # of the library, or of a parser that meets other bytes
            path = self._paths[self._shard(index)]
            raise self._error(
                f"{path} has a damaged record, the {index}th of the set: {reason}; remove the file "
                "and prepare again"
            ) from reason

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """What several records mean, read at once."""
        self._wait(*indices)
        try:
            return [self._parse(record) for record in self._records.__getitems__(list(indices))]
        except Exception:  # one by one, the damaged record is named
            return [self[index] for index in indices]

    def stage(self) -> None:
        """All records will be read: copies of shards in a bucket are made in the background."""
        if self._staging is not None:
            self._staging.start()

    def _shard(self, index: int) -> int:
        return bisect.bisect_right(self._ends, index)

    def _wait(self, *indices: int) -> None:
        if self._staging is not None:
            self._staging.wait(*sorted(set(map(self._shard, indices))))


def num_records(path: str | os.PathLike) -> int:
    """Number of records of the ArrayRecord file at `path`."""
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(os.fspath(path))
    try:
        return reader.num_records()
    finally:
        reader.close()
