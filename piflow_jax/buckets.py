"""Buckets: which paths lie in one, and the client by which they are read and written.

`etils.epath` reads and writes `gs://` paths by gcsfs, Orbax and TensorStore by a client of their
own. Both find the credentials of the machine or of the user by themselves, and both repeat what the
service refuses for the moment.
"""

import importlib.util
import logging
import os

__all__ = ["SCHEME", "connect", "is_remote", "repeated_requests"]

SCHEME = "gs://"

_THERE = importlib.util.find_spec("gcsfs") is not None
# Before the first path, even a local one, makes epath choose for good: it would prefer TensorFlow's
# client, which has neither emulators nor all kinds of credentials.
if _THERE:
    os.environ.setdefault("EPATH_USE_TF", "0")


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path lies in a bucket: what is written there is an object, whole or not there."""
    return os.fspath(path).startswith(SCHEME)


def connect() -> None:
    """Prepares this process to read and write `gs://` paths.

    Raises:
      ImportError: gcsfs is missing; the message names the remedy.
    """
    if not _THERE:
        raise ImportError('paths in a bucket need gcsfs: pip install -e ".[gcs]"')
    import fsspec

    # A listing is out of date as soon as TensorStore or another process writes.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    logger = logging.getLogger("gcsfs")
    if _REPEATED not in logger.handlers:
        logger.addHandler(_REPEATED)
        if "GCSFS_DEBUG" not in os.environ:  # what it logs as an error it raises as well
            logger.propagate = False
            logging.getLogger("fsspec").setLevel(logging.WARNING)
        logger.setLevel(logging.DEBUG)


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
