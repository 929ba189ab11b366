"""Records of a finished set by index."""

import bisect
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

__all__ = ["Records"]


class Records(Sequence[Any]):
    """The records of a set's shards, each read when it is asked for; safe to use in threads.

    Args:
      directory: The set's directory.
      shards: Their entries of the manifest.
      parse: What a record means.
      error: What to raise of a damaged record; the message has the path of its shard.

    Raises:
      error: If a shard cannot be opened.
    """

    def __init__(
        self,
        directory: Path,
        shards: Sequence[dict[str, Any]],
        parse: Callable[[bytes], Any],
        error: type[ValueError],
    ):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self._paths = [os.fspath(directory / shard["file"]) for shard in shards]
        self._ends = list(itertools.accumulate(shard["examples"] for shard in shards))
        self._parse, self._error = parse, error
        try:
            self._records = ArrayRecordDataSource(self._paths)
        except Exception as reason:  # the library's errors have no common class
            raise error(f"{directory} has a damaged shard: {reason}") from reason

    def __len__(self) -> int:
        """Returns the number of records."""
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: SupportsIndex) -> Any:
        """Returns what one record means; raises `error` if it is damaged."""
        index = range(len(self))[index]
        try:
            return self._parse(self._records[index])
        except Exception as reason:  # of the library, or of a parser that meets other bytes
            path = self._paths[bisect.bisect_right(self._ends, index)]
            raise self._error(
                f"{path} has a damaged record, the {index}th of the set: {reason}; remove the file "
                "and prepare again"
            ) from reason

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """What several records mean, read at once."""
        try:
            return [self._parse(record) for record in self._records.__getitems__(list(indices))]
        except Exception:  # one by one, the damaged record is named
            return [self[index] for index in indices]
