"""Google Cloud Storage as a file system: gcsfs, whose errors say what to do, with fewer requests.

Import it only where gcsfs is installed, as `piflow_jax.buckets` does.
"""

import contextvars
import re
from typing import Any

import fsspec
import gcsfs
import google.auth.exceptions
from gcsfs.core import GCSFile

_BUCKET = re.compile(r"(?:^|/)b/([^/?]+)")
_NO_RANGE = "416"
# Of the task that looks for a folder: another one asks for an object of the same name.
_FOLDER = contextvars.ContextVar("folder", default="")


class BucketError(OSError):
    """The service refused a request, or cannot be asked.

    Args:
      bucket: `gs://` and its name.
      deed: `read` or `write to`.
      why: what is wrong, and the remedy, a sentence without an end; an attribute too.
    """

    def __init__(self, bucket: str, deed: str, why: str):
        super().__init__(f"cannot {deed} {bucket}: {why}")
        self.why = why


class _File(GCSFile):
    """Sends what fits into its buffer by one request, not by one for the place and one for it."""

    def _initiate_upload(self) -> None:
        if not (self.forced and self.autocommit):  # more is to come
            super()._initiate_upload()

    def _upload_chunk(self, final: bool = False) -> bool:
        if self.location is not None:
            return super()._upload_chunk(final)
        self._simple_upload()
        return True


class _Buckets(gcsfs.GCSFileSystem):
    """The file system of `gs://` paths."""

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        file = super()._open(path, mode, **options)
        if type(file) is GCSFile and mode == "wb":  # buckets of a zone have files of their own
            file.__class__ = _File
        return file

    async def _get_directory_info(self, path: str, *words: Any) -> Any:
        token = _FOLDER.set(path)
        try:
            return await super()._get_directory_info(path, *words)
        finally:
            _FOLDER.reset(token)

    async def _get_object(self, path: str) -> Any:
        # gcsfs would ask for it once more where there is no folder.
        if path == _FOLDER.get():
            raise FileNotFoundError(path)
        return await super()._get_object(path)

    async def _call(self, method: str, path: str, *words: str, **options: Any) -> Any:
        try:
            return await super()._call(method, path, *words, **options)
        except (FileNotFoundError, FileExistsError):
            raise
        except Exception as error:  # gcsfs, aiohttp and google.auth have errors of their own
            if str(getattr(error, "code", "")) == _NO_RANGE:  # to gcsfs it is an end of file
                raise
            name = words[0] if words else (_BUCKET.findall(path) or [""])[0]
            bucket = f"gs://{name}"
            reads = method.upper() == "GET"
            why = _why(bucket, error, reads=reads)
            raise BucketError(bucket, "read" if reads else "write to", why) from None


def register() -> None:
    """Makes fsspec, and so epath, use it."""
    for name in ("gs", "gcs"):
        fsspec.register_implementation(name, _Buckets, clobber=True)


def _why(bucket: str, error: Exception, *, reads: bool) -> str:
    unknown = str(getattr(error, "code", "")) == "401"
    if unknown or isinstance(error, google.auth.exceptions.GoogleAuthError):
        return (
            "there are no valid credentials; run `gcloud auth application-default login`, or set "
            "GOOGLE_APPLICATION_CREDENTIALS to the key of a service account"
        )
    if "Forbidden" in str(error):
        deed, role = ("read", "objectViewer") if reads else ("write and remove", "objectUser")
        return (
            f"these credentials may not {deed} objects in {bucket}; grant their account the role "
            f"roles/storage.{role} there"
        )
    text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return f"{text}; check the network and the name of the bucket"
