"""The autoencoder of latents: its file, its identity, and samplers that end in pixels."""

import hashlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from piflow_jax.config import Config, ConfigError, naming
from piflow_jax.convert import open_autoencoder
from piflow_jax.evaluation.evaluator import Sampler
from piflow_jax.models.vae import AutoencoderKL, decode_in_chunks
from piflow_jax.parallel import local_mesh, replicated
from piflow_jax.systems.shapes import DataShape

# Latents that a device decodes at once; 256x256 images of the full-size decoder take 1 GiB each.
CHUNK = 8


class Autoencoder(NamedTuple):
    """An autoencoder with its weights; `identity` is the hash of these."""

    module: AutoencoderKL
    params: Any
    identity: str


def tree_digest(params: Any) -> str:
    """Hash of a network's weights: their names, types, shapes and values.

    Args:
      params: Its variables.

    Returns:
      SHA-256 in hexadecimal digits.
    """
    digest = hashlib.sha256()
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for name, leaf in sorted((jax.tree_util.keystr(path), leaf) for path, leaf in leaves):
        value = np.ascontiguousarray(leaf)
        digest.update(f"{name} {value.dtype} {value.shape}\n".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()


def load_autoencoder(config: Config, data: DataShape | None = None) -> Autoencoder:
    """The autoencoder of `config.data.vae`.

    Args:
      config: the run's settings.
      data: the latents that it is for, if there are any yet.

    Returns:
      The autoencoder.

    Raises:
      ConfigError: none is given, the file is not one, or the latents were made by another one, as
        far as that is known.
      FileNotFoundError: the file is not there.
    """
    path = config.data.vae
    if not path:
        raise ConfigError(
            "config.data.vae must name the autoencoder's weights, such as "
            "sd-vae-ft-ema.safetensors or its folder"
        )
    with naming(f"config.data.vae = {path!r}"):
        module, params = open_autoencoder(path)
    identity = tree_digest(_weights(module, params))
    autoencoder = Autoencoder(module, jax.device_put(params, replicated(local_mesh())), identity)
    if data is not None:
        _check(autoencoder, data)
    return autoencoder


def _weights(module: AutoencoderKL, params: Any) -> Any:
    """All numbers of a file of weights: those of FLUX.2 contain statistics of latents, too."""
    if np.ndim(module.latent_scale) < 3:
        return params
    statistics = {"scale": module.latent_scale, "shift": module.latent_shift}
    return params | {key: np.asarray(value) for key, value in statistics.items()}


def _check(autoencoder: Autoencoder, data: DataShape) -> None:
    if data.vae and data.vae != autoencoder.identity:
        raise ConfigError(
            f"config.data.vae has the weights {autoencoder.identity[:16]}, but these latents were "
            f"made by {data.vae[:16]}; give the autoencoder that --mode=prepare had"
        )
    channels = autoencoder.module.latent_channels
    if channels != data.channels:
        raise ConfigError(
            f"config.data.vae makes latents with {channels} channels, these have {data.channels}"
        )
    if data.by_channel and np.ndim(autoencoder.module.latent_scale) != 1:
        raise ConfigError(
            "config.data.vae has no latents_mean and latents_std, with which these latents are "
            "scaled: put the config.json of its release next to its weights"
        )


def pixel_sampler(sampler: Sampler, module: AutoencoderKL, data: DataShape) -> Sampler:
    """Decodes what a sampler makes; its parameters are a pair, the sampler's and the decoder's.

    Args:
      sampler: makes latents as networks see them.
      module: the autoencoder.
      data: has the scale and shift of prepared latents.

    Returns:
      `((params, vae_params), noise[B, h, w, C], condition) -> images[B, H, W, 3]`, about [-1, 1].
    """
    module = data.decoder(module)

    def sample(params, noise, condition):
        params, vae_params = params
        latents = module.raw(sampler(params, noise, condition).astype(jnp.float32))
        return decode_in_chunks(module, vae_params, latents, CHUNK * jax.local_device_count())

    return sample
