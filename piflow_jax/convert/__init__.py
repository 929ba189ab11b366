"""Weights of released PyTorch networks in and out.

The names are those of the releases of pi-Flow (arXiv 2510.14974) and of the networks it builds on.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax import linen as nn

from piflow_jax.convert.adapters import (
    adapter_config,
    export_adapter,
    is_adapter,
    load_adapter,
)
from piflow_jax.convert.autoencoders import open_autoencoder
from piflow_jax.convert.dit import export_dit, load_dit
from piflow_jax.convert.files import holds_weights, open_weights
from piflow_jax.convert.flux import export_flux, load_flux
from piflow_jax.convert.inception import export_inception, load_inception
from piflow_jax.convert.kinds import network_of
from piflow_jax.convert.original_dit import load_original_dit
from piflow_jax.convert.qwen_image import export_qwen_image, load_qwen_image
from piflow_jax.convert.qwen_vae import load_qwen_vae
from piflow_jax.convert.vae import export_vae, load_vae
from piflow_jax.models.dit import DiT
from piflow_jax.models.flux import Flux
from piflow_jax.models.heads import DXHead
from piflow_jax.models.inception import InceptionV3
from piflow_jax.models.qwen_image import QwenImage
from piflow_jax.models.vae import AutoencoderKL
from piflow_jax.safetensors_files import write_safetensors

LOADERS = {
    "dit": load_dit,
    "gm_dit": load_dit,
    "dx_dit": load_dit,
    "original_dit": load_original_dit,
    "original_sit": load_original_dit,
    "vae": load_vae,
    "qwen_vae": load_qwen_vae,
    "inception": load_inception,
    "flux": load_flux,
    "gm_flux": load_flux,
    "dx_flux": load_flux,
    "qwen_image": load_qwen_image,
    "gm_qwen_image": load_qwen_image,
    "dx_qwen_image": load_qwen_image,
}
# Sizes that a loader takes, shown by the weights or not.
SIZES = {
    DiT: (
        *("patch_size", "in_channels", "hidden", "depth", "mlp_ratio", "num_classes"),
        *("num_heads", "sample_size", "time_scale"),
    ),
    Flux: (
        *("patch_size", "in_channels", "hidden", "num_heads", "double_depth", "single_depth"),
        *("text_features", "pooled_features", "guidance_embed", "axes_dims_rope"),
    ),
    QwenImage: (
        *("patch_size", "in_channels", "hidden", "num_heads", "depth", "text_features"),
        "axes_dims_rope",
    ),
}
EXPORTERS = {
    DiT: export_dit,
    Flux: export_flux,
    QwenImage: export_qwen_image,
    AutoencoderKL: export_vae,
    InceptionV3: export_inception,
}


def load_torch_state(
    state: Mapping[str, np.ndarray], model: str, **sizes: Any
) -> tuple[nn.Module, dict]:
    """Turns weights under official names into a Flax module and its parameters.

    Args:
        state: Arrays by official name, in PyTorch layout (linear weights `[out, in]`), such as
            `open_weights` gives.
        model: A name in `LOADERS`.
        sizes: What shapes do not show, see the loader of `model` (`load_dit`: `num_heads`,
            `sample_size`, `time_scale`, `constant_logstd`; `load_vae`: `norm_groups`,
            `latent_scale`, `latent_shift`; `load_qwen_vae`: `latents_mean`, `latents_std`;
            `load_flux` and `load_qwen_image`: `axes_dims_rope`, `constant_logstd`). Sizes of a
            transformer that they do show may be given and are then checked. `place` (not of
            Inception) puts every leaf where it belongs as soon as it is built, see
            `rules.import_state`.

    Returns:
        The module, and its parameters for `module.apply`. Dtypes are those of `state` (float64
        only under `jax_enable_x64`).

    Raises:
        ValueError: Unknown model; weights of something else, which is named; names, shapes or
            types that do not fit (faults are listed); or numbers that are not finite.
        TypeError: A size that the loader cannot read off the shapes is not given.
    """
    if model not in LOADERS:
        raise ValueError(f"unknown model {model!r}, known are {sorted(LOADERS)}")
    return LOADERS[model](network_of(state, model), model, **sizes)


def load_params(
    module: nn.Module,
    state: Mapping[str, np.ndarray],
    model: str,
    place: Callable[[tuple[str, ...], np.ndarray], Any] | None = None,
) -> dict:
    """Reads weights that are to be those of a network which is there already.

    Args:
        module: A `DiT`, `Flux` or `QwenImage`.
        state: Arrays by official name, see `load_torch_state`.
        model: A name in `LOADERS`.
        place: Puts every leaf where it belongs, see `rules.import_state`.

    Returns:
        The module's parameters.

    Raises:
        ValueError: Unknown model; or the weights are those of a network of other sizes or with
            another head.
    """
    sizes = {name: getattr(module, name) for name in SIZES[type(module)]}
    if isinstance(module.head, DXHead):
        sizes["num_grid"] = module.head.num_grid
    if place is not None:
        sizes["place"] = place
    loaded, params = load_torch_state(state, model, **sizes)
    if loaded.head != module.head:
        raise ValueError(f"the head is {loaded.head}, the settings are those of {module.head}")
    return params


def to_torch_state(module: nn.Module, params: Mapping) -> dict[str, np.ndarray]:
    """Turns parameters (or gradients) of a module into arrays under official names.

    Args:
        module: A module of a type in `EXPORTERS`.
        params: Its variables, `{"params": ...}`.

    Returns:
        Arrays by official name, in PyTorch layout, bit for bit.

    Raises:
        ValueError: The module has no official counterpart, or the parameters are not its own.
    """
    if type(module) not in EXPORTERS:
        known = sorted(cls.__name__ for cls in EXPORTERS)
        raise ValueError(f"cannot export a {type(module).__name__}, known are {known}")
    return EXPORTERS[type(module)](module, params)


__all__ = [
    "adapter_config",
    "export_adapter",
    "holds_weights",
    "is_adapter",
    "load_adapter",
    "load_params",
    "load_torch_state",
    "open_autoencoder",
    "open_weights",
    "to_torch_state",
    "write_safetensors",
]
