"""Autoencoders from their published folders: weights, and the settings in `config.json`.

Source: the `vae` folders of Stable Diffusion, FLUX.1, FLUX.2 and Qwen-Image, and the release of
VA-VAE (`REPA-E/e2e-vavae-hf`), in the form of `diffusers`.
"""

import json
import os
import re
import reprlib
from pathlib import Path
from typing import Any

import numpy as np

from piflow_jax import hub
from piflow_jax.arguments import prefixed
from piflow_jax.convert.files import open_weights
from piflow_jax.convert.qwen_vae import QWEN_VAE
from piflow_jax.convert.rules import Place
from piflow_jax.convert.table import network_of
from piflow_jax.convert.vae import VAE
from piflow_jax.models.vae import AutoencoderKL

__all__ = ["open_autoencoder"]

# Arguments of a loader, by key of `config.json`.
_BY_CHANNEL = {"latents_mean": "latents_mean", "latents_std": "latents_std"}
_VAE = _BY_CHANNEL | {
    "norm_num_groups": "norm_groups",
    "scaling_factor": "latent_scale",
    "shift_factor": "latent_shift",
    "batch_norm_eps": "batch_norm_eps",
}
_SIGNED = ("shift_factor", "latents_mean")
_WHOLE = ("norm_num_groups",)
# Bounds of float32, in which latents are scaled. As Python numbers they compare with any integer.
_TINIEST, _HIGHEST = (float(getattr(np.finfo(np.float32), name)) for name in ("tiny", "max"))


def open_autoencoder(
    path: str | os.PathLike, place: Place | None = None
) -> tuple[AutoencoderKL, dict]:
    """Loads an autoencoder of either kind; the names of its weights show which.

    Args:
        path: A weight file, its folder or that of its pipeline, see `open_weights`. Scale and shift
            of latents come from the `config.json` next to the weights; without one they are those
            of Stable Diffusion, FLUX.1 or Qwen-Image. Those of FLUX.2 are among its weights.
        place: See `import_state`.

    Returns:
        The module and its variables, `{"params": ...}`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not an autoencoder, or `config.json` is damaged.
    """
    weights = open_weights(path, part=hub.AUTOENCODER[0])
    qwen = any(re.search(r"\.time_conv\.|\.gamma$", name) for name in weights)
    kind, keys = (QWEN_VAE, _BY_CHANNEL) if qwen else (VAE, _VAE)
    beside = weights.path.parent / "config.json"
    settings: dict[str, Any] = {}
    # A dangling link does not count as missing settings.
    if beside.exists() or os.path.islink(beside):
        faults = (AttributeError, OSError, RecursionError, ValueError)
        with prefixed(f"{beside} is damaged", faults):
            written = json.loads(beside.read_text(encoding="utf-8"))
            settings = {keys[key]: written[key] for key in keys if written.get(key) is not None}
        for key, argument in keys.items():
            _check(settings.get(argument, 1), key, beside)
    return kind.load(network_of(weights, kind.name), **settings, place=place)


def _check(setting: Any, key: str, path: Path) -> None:
    """Raises ValueError if a setting, or an entry for a channel, is not a valid number."""
    by_channel = key in _BY_CHANNEL and isinstance(setting, list)
    for value in setting if by_channel else [setting]:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        fits = number and (-_HIGHEST if key in _SIGNED else _TINIEST) <= value <= _HIGHEST
        fits = fits and (isinstance(value, int) or key not in _WHOLE)
        if not fits:
            kind = "a number" if key in _SIGNED else "a positive number"
            kind = "a positive whole number" if key in _WHOLE else kind
            raise ValueError(f"{path}: {key} must be {kind}, got {reprlib.repr(setting)}")
