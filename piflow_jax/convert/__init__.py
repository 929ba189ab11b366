"""Import and export of the weights of released PyTorch networks.

Names follow the releases of pi-Flow (arXiv 2510.14974) and of the networks that it builds on.
"""

import dataclasses
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
from piflow_jax.convert.files import holds_weights, open_weights
from piflow_jax.convert.heads import check_exportable
from piflow_jax.convert.loras import with_loras
from piflow_jax.convert.rules import export_state
from piflow_jax.convert.table import kind_of, named, network_of
from piflow_jax.models.heads import DXHead
from piflow_jax.models.initial import FREE
from piflow_jax.safetensors_files import write_safetensors

# Fields of a network that its weights do not decide.
_NO_SIZES = {*FREE, "time_dtype", "name", "parent"}


def load_torch_state(
    state: Mapping[str, np.ndarray], model: str, **sizes: Any
) -> tuple[nn.Module, dict]:
    """Turns weights with official names into a Flax module and its parameters.

    Args:
        state: Arrays by official name, in PyTorch layout (linear weights `[out, in]`), for example
            from `open_weights`.
        model: A name in `KINDS`, or the name of a student such as "gm_dit".
        sizes: Sizes that shapes do not show, see the loader of `model` (`load_dit`: `num_heads`,
            `sample_size`, `time_scale`, `constant_logstd`; `load_vae`: `norm_groups`,
            `latent_scale`, `latent_shift`; `load_qwen_vae`: `latents_mean`, `latents_std`;
            `load_text_network`: `axes_dims_rope`, `constant_logstd`).
            Sizes of a transformer that shapes do show are optional and are checked. `place` (not
            for Inception) puts each leaf on its devices as soon as it is built, see
            `rules.import_state`.

    Returns:
        The module, and its parameters for `module.apply`. Dtypes are those of `state` (float64 only
        with `jax_enable_x64`).

    Raises:
        ValueError: The model is unknown; the weights belong to another network, which the message
            names; names, shapes or dtypes do not match (the message lists the faults); or numbers
            are not finite.
        TypeError: A size that shapes do not show is missing.
    """
    kind, head = named(model)
    state = network_of(state, model)
    return kind.load(kind, state, head, **sizes) if kind.output else kind.load(state, **sizes)


def load_params(
    module: nn.Module,
    state: Mapping[str, np.ndarray],
    model: str,
    place: Callable[[tuple[str, ...], np.ndarray], Any] | None = None,
) -> dict:
    """Reads weights for an existing network.

    Args:
        module: A `DiT`, `Flux`, `QwenImage` or `Flux2`.
        state: Arrays by official name, see `load_torch_state`.
        model: A name in `KINDS`, or the name of a student such as "gm_dit".
        place: Puts each leaf on its devices, see `rules.import_state`.

    Returns:
        The module's parameters.

    Raises:
        ValueError: The model is unknown, or the weights belong to a network with other sizes or
            another head.
    """
    fields = {field.name for field in dataclasses.fields(module)} - _NO_SIZES
    sizes = {name: getattr(module, name) for name in fields}
    if isinstance(module.head, DXHead):
        sizes["num_grid"] = module.head.num_grid
    if place is not None:
        sizes["place"] = place
    loaded, params = load_torch_state(state, model, **sizes)
    if loaded.head != module.head:
        raise ValueError(f"the head is {loaded.head}, the settings are those of {module.head}")
    return params


def to_torch_state(module: nn.Module, params: Mapping) -> dict[str, np.ndarray]:
    """Turns parameters (or gradients) of a module into arrays with official names.

    Args:
        module: A module of a kind that can be exported, see `KINDS`.
        params: Its variables, `{"params": ...}`.

    Returns:
        Arrays by official name, in PyTorch layout, bit for bit.

    Raises:
        ValueError: The module has no official counterpart, or the parameters do not belong to it.
    """
    rules = kind_of(module).rules(module)
    check_exportable(module)
    return export_state(params["params"], rules)


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
    "with_loras",
    "write_safetensors",
]
