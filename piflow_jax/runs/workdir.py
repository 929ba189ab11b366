"""Paths as users name them, and whether a run can use its work directory."""

import glob
import os
import reprlib
import tempfile
import uuid
from collections.abc import Iterator

from etils import epath

from piflow_jax import hub
from piflow_jax.buckets import SCHEME, is_remote, located
from piflow_jax.config import ConfigError, naming

# Bytes of a path and of a name in it, on most file systems; folders are made one inside the other.
_LONGEST, _LONGEST_NAME, _DEEPEST = 4095, 255, 500


def user_path(
    path: str | os.PathLike, what: str = "the path", *, of_weights: bool = False
) -> epath.Path:
    """The path that a user named, the same from every directory and for every reader.

    Args:
      path: a local path, in which `~` is the home directory, or one in a bucket, `gs://...`.
      what: what the path is, for messages.
      of_weights: weights are read there, which a name on the hub may stand for, see `hub.local`.

    Returns:
      The path, absolute. It may not exist.

    Raises:
      ConfigError: the path is empty, too long, of an unknown scheme or user, or relative to
        a directory that is gone; or it is in a bucket, and gcsfs is missing; or it is no name on
        the hub, or huggingface_hub is missing.
      FileNotFoundError: the hub's cache does not have what is named.
    """
    text = os.fsdecode(path)
    if of_weights and hub.is_name(text):
        with naming(what):
            return epath.Path(hub.local(text))
    if not text:
        raise ConfigError(f"{what} is empty; name a directory, or . for the current one")
    shown = reprlib.repr(text)
    if "\0" in text:
        raise ConfigError(f"{what} has a NUL character: {shown}")
    names = text.encode(errors="surrogatepass").split(b"/")
    longest = max(map(len, names))
    if len(text) > _LONGEST or longest > _LONGEST_NAME or len(names) > _DEEPEST:
        raise ConfigError(f"{what} is too long for a file system: {shown}")
    try:
        found = located(text)
        if is_remote(found):
            return found
        local = os.path.expanduser(text)
        if local.startswith("~"):
            raise ConfigError(f"{what} {text} is of no user here; ./{text} is a path of this name")
        return epath.Path(os.path.abspath(local))
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{what} {error}") from None
    except FileNotFoundError:
        raise ConfigError(
            f"{what} {text} is relative, and the current directory no longer exists"
        ) from None


class _LiteralPath(type(epath.Path("/"))):
    """A path whose own characters are no pattern: Orbax globs below it to merge what it wrote."""

    def glob(self, pattern: str) -> Iterator[epath.Path]:
        """Paths below this one that match."""
        for found in glob.iglob(os.path.join(glob.escape(os.fspath(self)), pattern)):
            yield self._new(found)


def checkpoint_path(path: str | os.PathLike) -> epath.Path:
    """A directory of checkpoints, or one above it, as Orbax and TensorStore can take it.

    Args:
      path: see `user_path`.

    Returns:
      The path, absolute.

    Raises:
      ConfigError: see `user_path`; or the path is not UTF-8; or TensorStore would read a backslash
        as a slash, and save to another directory than the one that is read.
    """
    path = user_path(path)
    if "\\" in str(path):
        raise ConfigError(f"{path} has a backslash, which checkpoints cannot have in their path")
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ConfigError(f"the path {str(path)!a} is not UTF-8, as checkpoints need it") from None
    return path if is_remote(path) else _LiteralPath(path)


def check_writable(
    *directories: str | os.PathLike, instead: str = "pass another --workdir"
) -> None:
    """Finds out before any work whether directories can be written.

    Args:
      directories: see `user_path`; of one that does not exist, the nearest one above it counts. In
        a bucket, which has no directories, the first one counts: an object is written and removed.
      instead: what else a user can do, for messages.

    Raises:
      OSError: one is a file or cannot be written; names it and the remedy.
    """
    paths = [user_path(path) for path in directories]
    for path in [path for path in paths if is_remote(path)][:1]:
        _probe(path, instead)
    for path in [path for path in paths if not is_remote(path)]:
        while not os.path.lexists(path):
            path = path.parent
        try:
            with tempfile.TemporaryFile(dir=path):
                pass
        except OSError as error:
            raise OSError(
                f"cannot write to {path} ({error.strerror}); make it a directory with free space "
                f"that this user may write, or {instead}"
            ) from error


def _probe(directory: epath.Path, instead: str) -> None:
    """Writes and removes an object; what may go wrong with a bucket goes wrong here."""
    probe = directory / f".probe-{uuid.uuid4().hex}"
    try:
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        why = getattr(error, "why", error)  # see `piflow_jax.gcs.BucketError`
        if isinstance(error, FileNotFoundError):
            bucket = os.fspath(directory).removeprefix(SCHEME).partition("/")[0]
            why = f"there is no bucket {SCHEME}{bucket}; create it"
        raise OSError(f"cannot write to {directory}: {why}, or {instead}") from None
