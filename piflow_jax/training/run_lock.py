"""One run in a work directory at a time."""

import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path

import jax
from absl import logging

__all__ = ["RunLock"]

_NAME = "run.lock"


class RunLock:
    """Keeps other runs out of a work directory; use it as a context manager.

    The operating system holds the lock (`flock`) and lets it go with the process, however that
    ends. The file, `run.lock`, says who holds it, and stays. Process 0 locks for all. Object stores
    (`gs://`) have no locks: there, nothing is checked.

    Args:
      workdir: the run's directory; made if need be.
      patience: seconds to wait for a holder on another machine: a network file system notices with
        delay that a machine went away.

    Raises:
      BlockingIOError: another run holds it; names its process, machine and start.
    """

    def __init__(self, workdir: str | os.PathLike, *, patience: float = 120.0):
        self._file = None
        text = os.fspath(workdir)
        if jax.process_index() or "://" in text:
            return
        path = Path(text).expanduser() / _NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not truncated: until it is ours, it says whose it is.
        self._file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
        try:
            self._acquire(path, time.monotonic() + patience)
        except BaseException:
            self._file.close()
            raise
        self._file.truncate(0)
        holder = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        self._file.write(json.dumps(holder) + "\n")
        self._file.flush()

    def __enter__(self) -> "RunLock":
        """Returns itself."""
        return self

    def __exit__(self, kind, value, traceback) -> None:
        """Lets the next one in."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _acquire(self, path: Path, deadline: float) -> None:
        said = False
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    logging.warning("%s cannot be locked (%s); start no second run", path, error)
                    return
                holder = self._holder()
                if holder.get("host") == socket.gethostname() or time.monotonic() >= deadline:
                    raise BlockingIOError(
                        f"{path.parent} is in use by process {holder.get('pid', '?')} on "
                        f"{holder.get('host', '?')}, since {holder.get('since', '?')}. Stop that "
                        "run or wait for its end, or pass another --workdir."
                    ) from None
            if not said:
                logging.info("waiting for %s, held on %s", path, holder.get("host", "?"))
                said = True
            time.sleep(1.0)

    def _holder(self) -> dict:
        self._file.seek(0)
        try:
            return json.loads(self._file.read())
        except ValueError:  # it is just being written
            return {}
