"""Shards of a set in a bucket, copied to this machine when they are wanted."""

import bisect
import concurrent.futures
import errno
import hashlib
import itertools
import math
import os
import shutil
import tempfile
import threading
from collections.abc import Sequence
from typing import IO, Any

from absl import logging
from etils import epath

from piflow_jax.data.manifests import check_digest

__all__ = ["Staging"]

_THREADS = 8
_PIECE = 2**24  # bytes of a shard that are copied at a time
_SHARE = 0.9  # of the disk that is free at first, which others use as well
_GIB = 2**30


class Staging:
    """Local copies of shards, the first ones, as many as there is room for; safe to use in threads.

    A copy is a temporary file without a name: whatever ends the process, the system frees its
    space. It takes all of its space before its first byte, since other processes of this machine
    may copy to the same disk; if there is too little by then, the shard has no copy. Copies are
    compared with the manifest's checksums.

    Args:
      directory: The set's directory.
      shards: Their entries of the manifest.
      error: What to raise of a shard that is missing or differs; the message has its path.
      cache_gib: Most GiB of copies.

    Attributes:
      paths: Paths of the copies, which may be opened when `wait` has returned.
    """

    def __init__(
        self,
        directory: epath.Path,
        shards: Sequence[dict[str, Any]],
        error: type[ValueError],
        cache_gib: float = math.inf,
    ):
        temporary = tempfile.gettempdir()
        free = shutil.disk_usage(temporary).free / _GIB
        ends = [0.0, *itertools.accumulate(shard["bytes"] / _GIB for shard in shards)]
        many = bisect.bisect_right(ends, min(cache_gib, _SHARE * free)) - 1
        if many < len(shards):
            logging.info(
                "%s: %.3g of %.3g GiB are copied to %s, which has %.3g free, with "
                "config.data.local_cache_gib = %.3g; the rest is read from the bucket",
                *(directory, ends[many], ends[-1], temporary, free, cache_gib),
            )
        shards = shards[:many]
        self._spare = int((1 - _SHARE) * free * _GIB)
        self._directory, self._shards, self._error = directory, shards, error
        # For as long as their records are read.
        self._files = [tempfile.TemporaryFile() for _ in shards]  # noqa: SIM115
        self._locks = [threading.Lock() for _ in shards]
        self._there = [False] * len(shards)
        self._without: set[int] = set()
        self.paths = [f"/dev/fd/{file.fileno()}" for file in self._files]

    def start(self) -> None:
        """Copies all shards in the background; one that is waited for comes first."""
        shards = iter(range(len(self._shards)))

        def copy() -> None:
            for shard in shards:
                try:
                    self.wait(shard)
                except Exception:  # raised again by whoever reads of it
                    return

        for _ in range(min(_THREADS, len(self._shards))):
            threading.Thread(target=copy, name="staging", daemon=True).start()

    def wait(self, *shards: int) -> set[int]:
        """Copies shards that are not here yet.

        Args:
          shards: Their places.

        Returns:
          Those for which there is no room any more.

        Raises:
          error: One is missing, or differs from what was written.
          OSError: The disk or the bucket failed.
        """
        missing = [s for s in shards if not (self._there[s] or s in self._without)]
        if len(missing) == 1:
            self._copy(missing[0])
        elif missing:
            with concurrent.futures.ThreadPoolExecutor(min(_THREADS, len(missing))) as pool:
                list(pool.map(self._copy, missing))
        return self._without.intersection(shards)

    def _copy(self, shard: int) -> None:
        with self._locks[shard]:
            if self._there[shard] or shard in self._without:
                return
            entry, file, digest = self._shards[shard], self._files[shard], hashlib.sha256()
            path = self._directory / entry["file"]
            if not self._takes(file, entry["bytes"]):
                self._without.add(shard)
                logging.log_first_n(
                    logging.INFO, "%s: no room for more copies; read from the bucket", 1, path
                )
                return
            file.seek(0)
            try:
                with path.open("rb") as source:
                    while piece := source.read(_PIECE):
                        file.write(piece)
                        digest.update(piece)
            except FileNotFoundError as error:
                raise self._error(f"{path} is missing") from error
            file.flush()
            check_digest(path, digest.hexdigest(), entry["sha256"], self._error)
            self._there[shard] = True

    def _takes(self, file: IO[bytes], size: int) -> bool:
        """Takes so many bytes of the disk for a file, if the disk has them to spare."""
        file.truncate(0)  # what a copy that failed has taken
        if shutil.disk_usage(tempfile.gettempdir()).free - size < self._spare:
            return False
        try:
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                file.truncate(0)
                return False
        return True
