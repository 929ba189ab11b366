"""Files of a run that grow: on a disk in place, for a bucket in a folder that is uploaded."""

import contextlib
import fnmatch
import os
import tempfile
import time

from etils import epath

from piflow_jax.buckets import is_remote
from piflow_jax.whole_files import copy_file


class Spool:
    """A directory of files to append to, in folders or not.

    Objects in a bucket cannot be appended to: they are replaced as a whole by what has been
    collected on this machine. One thread at a time may call the methods.

    Args:
      directory: where the files belong; made if need be.

    Attributes:
      here: the local directory to append in: the same one, or a temporary one.
      remote: whether it is a temporary one.
    """

    def __init__(self, directory: epath.Path):
        self.remote = is_remote(directory)
        self.here = directory
        self._directory, self._temporary = directory, None
        self._sent: dict[str, tuple[int, int]] = {}
        self._sent_at = time.monotonic()
        if self.remote:
            self._temporary = tempfile.TemporaryDirectory(prefix="piflow_jax_")
            self.here = epath.Path(self._temporary.name)
        else:
            directory.mkdir(parents=True, exist_ok=True)

    def fetch(self, pattern: str) -> None:
        """Brings the files of a pattern here, as an earlier run left them.

        Args:
          pattern: a name, or one with `*`.
        """
        if not self.remote or not self._directory.exists():
            return
        for path in self._directory.iterdir():
            if fnmatch.fnmatchcase(path.name, pattern):
                copy_file(path, self.here / path.name)
                self._sent[path.name] = _state(self.here / path.name)

    def upload(self) -> None:
        """Brings what changed since the last time to where it belongs, and removes what is gone."""
        if not self.remote:
            return
        self._sent_at = time.monotonic()
        paths = [os.path.join(at, name) for at, _, files in os.walk(self.here) for name in files]
        names = sorted(os.path.relpath(path, self.here) for path in paths)
        for name in names:
            # Before the copy: what is appended meanwhile is a change.
            state = _state(self.here / name)
            if self._sent.get(name) != state:
                copy_file(self.here / name, self._directory / name)
                self._sent[name] = state
        for name in self._sent.keys() - set(names):
            (self._directory / name).unlink(missing_ok=True)
            del self._sent[name]

    def due(self, seconds: float) -> bool:
        """Whether the last upload began so many seconds ago; never on a disk."""
        return self.remote and time.monotonic() - self._sent_at >= seconds

    def close(self) -> None:
        """Removes the temporary directory; what was not uploaded is lost."""
        if self._temporary is not None:
            with contextlib.suppress(OSError):
                self._temporary.cleanup()


def _state(path: os.PathLike) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns
