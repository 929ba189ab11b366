"""Rows of a Parquet file, and the pictures that stand in them, read when they are asked for.

Source: data sets of the Hugging Face Hub, whose pictures are `{bytes, path}`.
"""

import bisect
import contextlib
import dataclasses
import itertools
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from piflow_jax.buckets import is_remote
from piflow_jax.data.pictures import PictureError, PictureFile

__all__ = ["EmbeddedPicture", "ParquetRows"]


@dataclasses.dataclass(frozen=True)
class EmbeddedPicture:
    """A picture in a row of a Parquet file.

    Attributes:
      rows: The file's rows.
      row: Its row, counted from 1.
      path: What the file calls it; empty if it has no name.
    """

    rows: "ParquetRows" = dataclasses.field(repr=False, compare=False)
    row: int
    path: str = ""

    def __str__(self) -> str:  # noqa: D105
        return f"{self.rows.path}, row {self.row}" + (f" ({self.path})" if self.path else "")

    def read(self, folder: str | os.PathLike) -> PictureFile:
        """The picture for `read_picture`.

        Args:
          folder: What its path is relative to, where the row has no bytes.

        Returns:
          The encoded bytes, or a path.

        Raises:
          PictureError: The row has neither.
          ValueError: The Parquet file is damaged.
        """
        content = self.rows.content(self.row)
        if content is None and not self.path:
            raise PictureError(f"{self}", "the row has neither bytes nor a path")
        return os.path.join(folder, self.path) if content is None else content


class ParquetRows:
    """The rows of a file with at most one column of pictures; safe to use in threads.

    Args:
      path: The file.
      columns: The columns that are wanted; those that the file has are read.
      picture: Which of them is of pictures. Of text it is read as it is; of bytes, or of
        `{bytes, path}`, its values are `EmbeddedPicture`.

    Raises:
      ImportError: pyarrow is not installed.
      ValueError: It is no Parquet file, or damaged.
    """

    def __init__(self, path: epath.Path, columns: Sequence[str], picture: str):
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as error:
            raise ImportError(
                f"{path}: reading Parquet needs pyarrow, pip install 'piflow_jax[text]'"
            ) from error
        self.path, self._picture = path, picture
        self._errors = (pyarrow.ArrowException, LookupError, OSError, ValueError)
        self._lock = threading.Lock()
        self._group: tuple[int, Any] = (-1, None)  # the row group that was read last
        with self._named(f"{path}"):
            self._file = parquet.ParquetFile(path.open("rb") if is_remote(path) else path)
            groups = [self._file.metadata.row_group(i) for i in range(self._file.num_row_groups)]
            self._ends = list(itertools.accumulate(group.num_rows for group in groups))
            schema = self._file.schema_arrow
            kinds = {name: schema.field(name).type for name in columns if name in schema.names}
        self._columns, self._contents = list(kinds), ""
        kind = kinds.get(picture)
        if kind is not None and pyarrow.types.is_struct(kind):
            fields = {kind.field(i).name for i in range(kind.num_fields)}
            self._columns.remove(picture)
            self._columns += [f"{picture}.path"] * ("path" in fields)
            self._contents = f"{picture}.bytes" * ("bytes" in fields)
        elif kind in (pyarrow.binary(), pyarrow.large_binary()):
            self._columns.remove(picture)
            self._contents = picture

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """What messages call each row, and its values by column, without bytes of pictures."""
        row = 0
        for group, end in enumerate(self._ends):
            for batch in self._batches(group, f"{self.path}, rows {row + 1} to {end}"):
                for index in range(batch.num_rows):
                    row += 1
                    where = f"{self.path}, row {row}"
                    with self._named(where):
                        values = [column[index].as_py() for column in batch.columns]
                    yield (
                        where,
                        self._entry(row, dict(zip(batch.schema.names, values, strict=True))),
                    )

    def _batches(self, group: int, where: str) -> Iterator[Any]:
        batches = self._file.iter_batches(row_groups=[group], columns=self._columns)
        while True:
            with self._named(where):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def _entry(self, row: int, values: dict[str, Any]) -> dict[str, Any]:
        value = values.get(self._picture, {})
        path = value.get("path") if isinstance(value, dict) else value
        if self._contents and value is not None:
            return values | {self._picture: EmbeddedPicture(self, row, path or "")}
        return values | {self._picture: path}

    def content(self, row: int) -> bytes | None:
        """The bytes of a row's picture.

        Pictures of a row group are read together and kept until one of another is asked for.

        Args:
          row: Counted from 1.

        Returns:
          The encoded picture; None where the row has none.

        Raises:
          ValueError: The file is damaged.
        """
        with self._lock, self._named(f"{self.path}, row {row}"):
            group = bisect.bisect_left(self._ends, row)
            if self._group[0] != group:
                table = self._file.read_row_group(group, columns=[self._contents])
                self._group = (group, table.column(0))
            start = self._ends[group - 1] if group else 0
            value = self._group[1][row - 1 - start].as_py()
        return value["bytes"] if isinstance(value, dict) else value

    @contextlib.contextmanager
    def _named(self, where: str) -> Iterator[None]:
        try:
            yield
        except self._errors as error:
            reason = " ".join(f"{error}".split())
            raise ValueError(f"{where} is damaged, or no Parquet file: {reason}") from error
