"""One run in a work directory at a time."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import stat
import time
from typing import TextIO

import jax
from absl import logging
from etils import epath

from piflow_jax.buckets import is_remote
from piflow_jax.runs.lease import Lease, in_use, parsed_holder, this_process
from piflow_jax.runs.workdir import checkpoint_path

_NAME = "run.lock"


def _own_file(path: str, flags: int) -> int:
    """Opens a file without truncating it: until it is ours, it says whose it is.

    A link would lead to a file of somebody else, which the holder's name would replace; a pipe
    would block.
    """
    file = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, "it is not a regular file")
    return file


def _end(reason: str) -> None:
    """Ends the process, of which another thread holds what it must no longer write to."""
    os.write(2, f"error: {reason}\n".encode())
    os._exit(1)


class RunLock(contextlib.ExitStack):
    """Keeps other runs out of a work directory; use it as a context manager.

    The operating system holds the lock (`flock`) and lets it go with the process, however that
    ends. The file, `run.lock`, says who holds it, and stays. In a bucket it is an object that is
    kept alive, see `Lease`; a run that finds that another one took it over ends at once, with
    status 1. Process 0 locks for all.

    Args:
      workdir: the run's directory; made if need be.
      patience: seconds to wait for a holder on another machine: a network file system notices with
        delay that a machine went away. In a bucket a holder that gave no sign of life for half of
        them is gone.

    Raises:
      BlockingIOError: another run holds it; names its process, machine and start.
      ConfigError: checkpoints cannot lie in the directory, see `checkpoint_path`.
      OSError: the file cannot be written, or is no file of a run.
    """

    def __init__(self, workdir: str | os.PathLike, *, patience: float = 120.0):
        super().__init__()
        path = checkpoint_path(workdir) / _NAME
        if jax.process_index():
            return
        if is_remote(path):
            self.callback(Lease(path, silence=patience / 2, lost=_end).close)
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "a+", encoding="utf-8", opener=_own_file)  # noqa: SIM115
            self.enter_context(file)
        except OSError as error:
            reason = "it is a link" if os.path.islink(path) else error.strerror
            raise OSError(
                f"cannot write {path} ({reason}), which keeps other runs out; remove it, or pass "
                "another --workdir"
            ) from error
        try:
            _acquire(file, path, time.monotonic() + patience)
        except BaseException:
            self.close()
            raise
        file.truncate(0)
        file.write(json.dumps(this_process()) + "\n")
        file.flush()


def _acquire(file: TextIO, path: epath.Path, deadline: float) -> None:
    said = False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                logging.warning("%s cannot be locked (%s); start no second run", path, error)
                return
            file.seek(0)
            holder = parsed_holder(file.read())
            if holder.get("host") == socket.gethostname() or time.monotonic() >= deadline:
                raise in_use(path, holder) from None
        if not said:
            logging.info("waiting for %s, held on %s", path, holder.get("host", "?"))
            said = True
        time.sleep(1.0)
