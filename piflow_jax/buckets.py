"""Buckets: which paths lie in one, and the client by which they are read and written.

`etils.epath` reads and writes `gs://` paths by gcsfs, Orbax and TensorStore by a client of their
own. Both find the credentials of the machine or of the user by themselves, and both repeat what the
service refuses for the moment.
"""

import importlib.util
import logging
import os
import re
from collections.abc import Callable
from typing import Any

from etils import epath

SCHEME = "gs://"

_ANY_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_THERE = importlib.util.find_spec("gcsfs") is not None
# Before the first path, even a local one, makes epath choose for good: it would prefer TensorFlow's
# client, which has neither emulators nor all kinds of credentials.
if _THERE:
    os.environ.setdefault("EPATH_USE_TF", "0")


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path lies in a bucket: what is written there is an object, whole or not there."""
    return os.fspath(path).startswith(SCHEME)


def is_file(path: epath.Path) -> bool:
    """Whether there is a file to read: no folder, and no pipe, which a reader might wait for."""
    return path.is_file() if is_remote(path) else os.path.isfile(path)


def located(path: str | os.PathLike) -> epath.Path:
    """A path as it is opened, on a disk or in a bucket.

    Args:
      path: a local path, or `gs://bucket/...`.

    Returns:
      The same path.

    Raises:
      ValueError: it has another scheme or names no bucket, or gcsfs is missing; names the remedy.
    """
    text = os.fsdecode(path)
    scheme = _ANY_SCHEME.match(text)
    if scheme is None:
        return epath.Path(text)
    if scheme[0] != SCHEME:
        raise ValueError(
            f"{text} has the unknown scheme {scheme[0]}; name a local path, or {SCHEME}..."
        )
    if not text.removeprefix(SCHEME).partition("/")[0]:
        raise ValueError(f"{text} names no bucket; name one, as in {SCHEME}bucket/run")
    if not _THERE:
        raise ValueError(f'{text}: paths in a bucket need gcsfs: pip install -e ".[gcs]"')
    _connect()
    return epath.Path(text)


def _connect() -> None:
    """Prepares this process to read and write `gs://` paths."""
    import fsspec

    from piflow_jax.gcs import register

    register()
    # A listing is out of date as soon as TensorStore or another process writes.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    logger = logging.getLogger("gcsfs")
    if _REPEATED not in logger.handlers:
        logger.addHandler(_REPEATED)
        if "GCSFS_DEBUG" not in os.environ:  # what it logs as an error it raises as well
            logger.propagate = False
            logging.getLogger("fsspec").setLevel(logging.WARNING)
        logger.setLevel(logging.DEBUG)


def fetcher(path: str | os.PathLike) -> tuple[int, Callable[[int, int], bytes]]:
    """How an object is read by ranges of bytes.

    Args:
      path: the object, `gs://...`.

    Returns:
      Its size in bytes, and a function of the first byte and the one behind the last, of which each
      call is one request. Threads may call it at the same time.

    Raises:
      FileNotFoundError: there is no such object.
      ValueError: see `located`.
      OSError: the bucket cannot be read; says why, and the remedy.
    """
    path = os.fspath(located(path))
    import fsspec

    from piflow_jax.gcs import BucketError

    system = fsspec.filesystem("gs")

    def asked(request: Callable[..., Any], *words: int) -> Any:
        try:
            return request(path, *words)
        except BucketError as error:
            raise OSError(f"cannot read {path}: {error.why}") from None

    def fetch(first: int, last: int) -> bytes:
        # The service has no word for a range without bytes.
        data = asked(system.cat_file, first, last) if first < last else b""
        if len(data) != last - first:
            raise OSError(f"{path} was written anew or cut short while it was read")
        return data

    return asked(system.info)["size"], fetch


def repeated_requests() -> int:
    """Requests that this process has sent again so far, since they were refused or lost."""
    import tensorstore

    found = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/gcs/retries")
    return _REPEATED.count + sum(int(one["value"]) for metric in found for one in metric["values"])


class _Repeated(logging.Handler):
    """Counts what gcsfs repeats, of which it tells nobody else."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += " retrying after exception" in record.getMessage()


_REPEATED = _Repeated()
