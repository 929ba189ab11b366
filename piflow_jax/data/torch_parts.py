"""Parts of PyTorch releases: tokenizers and networks as `transformers` loads them, from folders."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["files_digest", "load_network", "load_part", "read_kind"]


def read_kind(path: Path, key: str) -> str:
    """What a JSON file of a release says that it is of.

    Args:
      path: The file: `config.json` of a network, or `model_index.json` of a pipeline.
      key: `model_type` or `_class_name`.

    Returns:
      The value.

    Raises:
      ValueError: If the file does not say; the message names it.
    """
    try:
        kind = json.loads(path.read_text(encoding="utf-8"))[key]
    except (KeyError, OSError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not say what {key} it is of: {error!r}") from error
    return f"{kind}"


def files_digest(folder: Path, *parts: str) -> str:
    """Hash of files, names included.

    Args:
      folder: Their folder.
      *parts: Subfolders, of which all files count; without any the files of the folder itself.

    Returns:
      SHA-256, 64 hexadecimal digits.
    """
    found = [path for part in parts for path in (folder / part).rglob("*")] or folder.iterdir()
    digest = hashlib.sha256()
    for path in sorted(path for path in found if path.is_file()):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.relative_to(folder)} {content}\n".encode())
    return digest.hexdigest()


def load_part(kind: Any, folder: Path, **options: Any) -> Any:
    """Loads a tokenizer, or whatever else `transformers` has a class for.

    Args:
      kind: The class.
      folder: Its folder.
      **options: Further arguments of `from_pretrained`.

    Returns:
      What `from_pretrained` returns.

    Raises:
      ValueError: The folder is missing, or its files are missing or damaged.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder, which belongs to the release")
    try:
        return kind.from_pretrained(folder, local_files_only=True, **options)
    # Of files that are missing or damaged the libraries of all their formats raise what they like.
    except Exception as error:
        reason = " ".join(f"{error}".split()) or type(error).__name__
        raise ValueError(f"{folder} cannot be loaded as {kind.__name__}: {reason}") from error


def load_network(
    kind: Any, folder: Path, *, dtype: str, device: str, unused: Sequence[str] = ()
) -> Any:
    """Loads a network for evaluation.

    Args:
      kind: Its class.
      folder: Its folder.
      dtype: Of its weights, by PyTorch's name.
      device: PyTorch's name of the device.
      unused: Beginnings of names of weights that may be missing.

    Returns:
      The network.

    Raises:
      ValueError: The folder or files are missing or damaged, or do not have all weights.
    """
    import torch

    network, found = load_part(kind, folder, dtype=getattr(torch, dtype), output_loading_info=True)
    absent = sorted(name for name in found["missing_keys"] if not name.startswith(tuple(unused)))
    if absent:  # transformers draws them at random
        raise ValueError(f"{folder} lacks {len(absent)} weights, the first is {absent[0]}")
    return network.eval().to(device)
