"""FLUX.2's autoencoder, whose latents are scaled by statistics of patches, against `diffusers`."""

import jax
import numpy as np
import pytest

from piflow_jax.config import base_config, parse
from piflow_jax.convert import load_torch_state, open_autoencoder, to_torch_state
from piflow_jax.modes.autoencoder import load_autoencoder


def flux2_peer():
    diffusers = pytest.importorskip("diffusers")
    import torch

    torch.manual_seed(3)
    peer = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        layers_per_block=1,
        latent_channels=5,
        norm_num_groups=8,
        batch_norm_eps=0.01,
    )
    peer.bn.running_mean.normal_()
    peer.bn.running_var.uniform_(0, 3)
    return peer.eval()


def flux2_latents(peer, raw):
    """Latents as the pipeline of FLUX.2 makes them, put back in place; `raw` has channels first."""
    from diffusers import Flux2Pipeline

    mean, var = (one[:, None, None] for one in (peer.bn.running_mean, peer.bn.running_var))
    patches = Flux2Pipeline._patchify_latents(raw)
    patches = (patches - mean) / (var + peer.config.batch_norm_eps).sqrt()
    return np.moveaxis(Flux2Pipeline._unpatchify_latents(patches).numpy(), 1, -1)


def test_flux2_autoencoder_matches_that_of_diffusers(tmp_path):
    torch = pytest.importorskip("torch")
    peer = flux2_peer()
    peer.save_pretrained(tmp_path)
    module, variables = open_autoencoder(tmp_path)
    assert module.quant_convs and (module.latent_channels, module.norm_groups) == (5, 8)
    assert np.shape(module.latent_scale) == np.shape(module.latent_shift) == (2, 2, 5)
    image = np.random.default_rng(0).uniform(-1, 1, (2, 12, 20, 3)).astype(np.float32)

    @jax.jit
    def run(variables, image):
        mean, _ = module.apply(variables, image, method="encode")
        latents = module.scaled(mean)
        return latents, module.apply(variables, module.raw(latents), method="decode")

    latents, decoded = run(variables, image)
    with torch.no_grad():
        raw = peer.encode(torch.from_numpy(np.moveaxis(image, -1, 1).copy())).latent_dist.mean
        theirs = np.moveaxis(peer.decode(raw).sample.numpy(), 1, -1)
    expected = flux2_latents(peer, raw)
    np.testing.assert_allclose(latents, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(decoded, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
    with pytest.raises(ValueError, match="its weights include statistics"):
        to_torch_state(module, variables)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("bn.running_var", np.ones(19), r"shapes \(20,\) and \(19,\), not those of square"),
        ("bn.running_mean", np.full(20, np.nan), "numbers that are no statistics"),
        ("bn.running_var", np.full(20, -1.0), "numbers that are no statistics"),
    ],
)
def test_statistics_of_patches_that_do_not_fit_are_named(name, array, message):
    pytest.importorskip("torch")
    state = {key: tensor.numpy() for key, tensor in flux2_peer().state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_torch_state(state | {name: array}, "vae", norm_groups=8)


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_statistics_of_patches_belong_to_the_identity(tmp_path, name):
    peer, found = flux2_peer(), []
    for factor in (1, 2, 0.5):  # there and back
        getattr(peer.bn, name).mul_(factor)
        peer.save_pretrained(tmp_path)
        config = base_config()
        config.data.vae = str(tmp_path)
        found.append(load_autoencoder(parse(config)).identity)
    assert found[0] == found[2] != found[1]
