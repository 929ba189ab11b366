"""What the text encoders of all releases share: their folders, and their identity."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from piflow_jax.data.torch_parts import files_digest

__all__ = ["Released", "compute", "floats"]

# Text that tokenizers of one release, but of other versions or with ftfy, take apart differently.
_PROBES = (
    *(
        "a red fox",
        "Caf\u00e9  CAFE\u0301",
        "\u4e00\u53ea\u72d0\u72f8",
        "a\u200bb",
        "a\ufeffb",
        "a\u2028b\x07",
    ),
    *("\ufb01", "\u0130", "caf\u00c3\u00a9", "&amp; don't", "\U0001f98a", "1234567"),
)


class Released:
    """The encoders of a release, loaded from its folder; see `TextEncoder`.

    Args:
      folder: The release's, or what it has of `parts`.
      max_length: Tokens of a prompt, at most; 0 is the most that there are.
      dtype: Of the weights, `bfloat16` or `float32`.
      device: PyTorch's name of the device.
    """

    name: str
    longest: int
    parts: tuple[str, ...]
    sees_references = False

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        max_length: int = 0,
        dtype: str = "bfloat16",
        device: str = "cpu",
    ):
        import torch
        import transformers

        folder = Path(folder)
        self._torch, self._device = torch, device
        self.max_length = max_length or self.longest
        tokenizers = self._load(transformers, folder, dtype=dtype, device=device)
        self.identity = f"{self.name} {self.max_length} {files_digest(folder, *self.parts)}"
        self.tokenizer = _tokenizer_identity(self, *tokenizers)
        self.compute = compute(dtype, device)


def _tokenizer_identity(encoder: Released, *tokenizers: Any) -> str:
    kinds = " and ".join(type(tokenizer).__name__ for tokenizer in tokenizers)
    made = json.dumps(encoder.tokens(_PROBES))
    return f"{kinds}, SHA-256 of probes {hashlib.sha256(made.encode()).hexdigest()}"


def floats(tensor: Any) -> np.ndarray:
    """A tensor as float32 on the host.

    Args:
      tensor: A tensor of PyTorch, `[...]`.

    Returns:
      `float32[...]`, of the same shape.
    """
    return tensor.float().cpu().numpy()


def compute(dtype: str, device: str) -> str:
    """How networks are evaluated, for the record.

    Args:
      dtype: Dtype of their weights.
      device: PyTorch's name of the device.

    Returns:
      Both, with the versions of the libraries.
    """
    import torch
    import transformers

    kind = device.split(":")[0]  # whichever GPU it is: each process has another one
    return f"{dtype} on {kind}, torch {torch.__version__}, transformers {transformers.__version__}"
