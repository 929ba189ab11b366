"""Weights by their names on the Hugging Face hub, `hf:owner/name`.

A name stands for files in the hub's own cache (`HF_HOME`, `HF_HUB_CACHE`). Only `fetch` uses the
network. `huggingface_hub` comes with the extra `hub` and is loaded when a name is looked up.
"""

import contextlib
import dataclasses
import glob
import importlib.util
import os
import re
from collections.abc import Collection, Iterator, Sequence

from absl import logging

NETWORK = ("transformer",)
"""Folders of a pipeline: of its network here, then of its autoencoder, then of its encoders."""
AUTOENCODER = ("vae",)
ENCODERS = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2", "processor")

_SCHEME = "hf:"
_NAME = re.compile(
    r"hf:(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>refs/[^/]+/[^/]+|[^/]+))?(?:/(?P<inside>.+))?",
    re.ASCII,
)
_CACHED = re.compile(r".*/models--([^/]+)--([^/]+)/snapshots/([0-9a-f]{40})(?:/(.*))?")
_WEIGHTS = ".safetensors"
# What networks and tokenizers read, with weights in one of the formats that a repository may have.
_KEPT = (_WEIGHTS, ".json", ".txt", ".model", ".jinja")
_VARIANT = re.compile(r"\.(?:fp8|fp16|bf16|fp32|ema_only|non_ema)[-.]")


@dataclasses.dataclass(frozen=True)
class _Name:
    """The parts of a name; `inside` is a folder or a file of the repository, or empty."""

    repo: str
    revision: str = "main"
    inside: str = ""

    def __str__(self) -> str:
        at = "" if self.revision == "main" else f"@{self.revision}"
        return f"{_SCHEME}{self.repo}{at}" + (f"/{self.inside}" if self.inside else "")

    @property
    def remedy(self) -> str:
        """How a user gets what the cache lacks."""
        command = f"hf download {self.repo}"
        command += "" if self.revision == "main" else f" --revision {self.revision}"
        command += f" --include '{self.inside}*'" if self.inside else ""
        return (
            "fetch it with --config.download=True, with download=True of piflow_jax.load, or by "
            f"`{command}`"
        )


def is_name(path: str | os.PathLike) -> bool:
    """Whether a path is a name on the hub; a local path that begins so is `./hf:...`."""
    return os.fsdecode(path).startswith(_SCHEME)


def check(name: str | os.PathLike) -> None:
    """Checks the form of a name; does not look for the repository.

    Args:
      name: `hf:owner/name`, perhaps with `@` and a revision, and then a folder or file:
        `hf:owner/name@main/transformer`.

    Raises:
      ValueError: the name has another form, or huggingface_hub is not installed; the message has
        the remedy.
    """
    _parsed(name)


def _parsed(name: str | os.PathLike) -> _Name:
    text = os.fsdecode(name)
    match = _NAME.fullmatch(text.rstrip("/"))
    inside = ((match and match["inside"]) or "").split("/")
    if match is None or not {"", ".", ".."}.isdisjoint(inside if match["inside"] else ()):
        raise ValueError(
            f"{text!r} is no name on the Hugging Face hub; names are hf:owner/name, "
            "hf:owner/name/folder or hf:owner/name@revision/folder"
        )
    if importlib.util.find_spec("huggingface_hub") is None:
        raise ValueError(
            f'{text}: names on the Hugging Face hub need huggingface_hub: pip install -e ".[hub]"'
        )
    return _Name(**{key: value for key, value in match.groupdict().items() if value})


def local(name: str | os.PathLike) -> str:
    """The folder or file in the hub's cache that a name stands for.

    Args:
      name: see `check`.

    Returns:
      An absolute path that exists. Of a folder, files may be missing, see `remedied`.

    Raises:
      FileNotFoundError: the cache does not have it; names repository, file and remedy.
      ValueError: see `check`.
    """
    name = _parsed(name)
    from huggingface_hub import constants

    snapshot = _snapshot(name)
    if snapshot is None:
        raise FileNotFoundError(
            f"{name} is not in the hub's cache, {constants.HF_HUB_CACHE}: {name.remedy}"
        )
    found = os.path.join(snapshot, name.inside) if name.inside else snapshot
    if not os.path.exists(found):
        raise FileNotFoundError(
            f"{name}: {name.inside} is not in the hub's cache, {snapshot}: {name.remedy}"
        )
    return found


def _snapshot(name: _Name) -> str | None:
    """The cached folder of a name's revision, without a request to the hub."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        # Without patterns, a folder in which any file of the repository is missing is none.
        return snapshot_download(
            name.repo, revision=name.revision, local_files_only=True, allow_patterns=[]
        )
    except LocalEntryNotFoundError:
        return None


def pinned(name: str) -> str:
    """A name with the commit that it stands for now.

    Args:
      name: see `check`.

    Returns:
      The name, `hf:owner/name@commit/...`; unchanged if the cache does not have it.

    Raises:
      ValueError: see `check`.
    """
    parsed = _parsed(name)
    snapshot = _snapshot(parsed)
    if snapshot is None:
        return name
    return str(dataclasses.replace(parsed, revision=os.path.basename(snapshot)))


@contextlib.contextmanager
def remedied(path: str | os.PathLike, *errors: type[Exception]) -> Iterator[None]:
    """Adds the remedy to errors about missing files in the hub's cache.

    Args:
      path: what is opened. Errors about paths outside the cache stay as they are.
      *errors: further errors than `FileNotFoundError`.
    """
    try:
        yield
    except (FileNotFoundError, *errors) as error:
        cached = _CACHED.fullmatch(os.path.abspath(os.fsdecode(path)))
        if cached is None:
            raise
        owner, repo, commit, inside = cached.groups()
        name = _Name(f"{owner}/{repo}", commit, inside or "")
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"{error}; files of {name} may be missing: {name.remedy}") from error


def fetch(name: str | os.PathLike, parts: Collection[str] = ()) -> None:
    """Downloads the files of a name that the cache lacks and that are read, see `needed`.

    Args:
      name: see `check`.
      parts: see `needed`.

    Raises:
      FileNotFoundError: there is no such repository or revision, it has no weights, or the user may
        not read it; the message has the remedy.
      OSError: the hub cannot be reached, and the cache does not have it.
      ValueError: see `check`.
    """
    name = _parsed(name)
    from huggingface_hub import HfApi, errors, snapshot_download

    try:
        info = HfApi().model_info(name.repo, revision=name.revision)
        files = [file.rfilename for file in info.siblings or ()]
        chosen = needed(files, name.inside, parts)
        if not any(file.endswith(_WEIGHTS) or file == name.inside for file in chosen):
            folders = sorted({f.rpartition("/")[0] or "." for f in files if f.endswith(_WEIGHTS)})
            raise FileNotFoundError(
                f"{name} has no {_WEIGHTS} files; folders of this repository that have some: "
                f"{', '.join(folders) or 'none'}"
            )
        logging.info("%s: %d files come from the hub, or its cache", name, len(chosen))
        patterns = [glob.escape(file) for file in chosen]
        snapshot_download(name.repo, revision=name.revision, allow_patterns=patterns)
    except errors.GatedRepoError:
        raise FileNotFoundError(
            f"{name} is gated: accept its terms at https://huggingface.co/{name.repo} and log in "
            "with `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise FileNotFoundError(
            f"{name}: there is no such repository, or it is private: correct the name, or log in "
            "with `hf auth login` as a user who may read it"
        ) from None
    except errors.RevisionNotFoundError:
        raise FileNotFoundError(
            f"{name}: {name.repo} has no branch, tag or commit {name.revision}"
        ) from None
    except FileNotFoundError:
        raise
    except Exception as error:  # of the network, in several libraries
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        if _snapshot(name) is None:
            raise OSError(f"{name} cannot be fetched from the hub: {reason}") from error
        logging.warning("%s: the cache is read, as the hub cannot be reached: %s", name, reason)


def needed(files: Sequence[str], inside: str = "", parts: Collection[str] = ()) -> list[str]:
    """The files of a repository that are read.

    They are weights in `.safetensors`, settings, and files of tokenizers. Weights of another
    precision next to the network's own, such as `model.fp16.safetensors`, are left out.

    Args:
      files: names of all its files.
      inside: the folder or file that is asked for, or empty.
      parts: folders that are read if a pipeline is asked for, which has a `model_index.json`.

    Returns:
      Names of files; for one file its own, and those of the settings in its folder.
    """
    if inside in files:
        folder = inside.rpartition("/")[0]
        return [inside, *(f for f in files if f.endswith(".json") and _in(f, folder))]
    folders = [f"{inside}/{part}".strip("/") for part in parts]
    index = f"{inside}/model_index.json".strip("/")
    chosen = [f for f in files if any(f.startswith(f"{folder}/") for folder in folders)]
    if index in files and chosen:
        chosen = [index, *chosen]
    else:
        chosen = [f for f in files if _in(f, inside)]
    weights = [f for f in chosen if f.endswith(_WEIGHTS)]
    own = {f.rpartition("/")[0] for f in weights if not _VARIANT.search(f)}
    variants = {f for f in weights if _VARIANT.search(f) and f.rpartition("/")[0] in own}
    return [f for f in chosen if f.endswith(_KEPT) and f not in variants]


def _in(file: str, folder: str) -> bool:
    """Whether a file lies directly in a folder."""
    return file.rpartition("/")[0] == folder
