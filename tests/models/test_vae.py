"""The autoencoder against the reference's run of `diffusers`, and in chunks."""

import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax.convert import load_torch_state, to_torch_state
from piflow_jax.models.vae import decode_in_chunks, sample_posterior

NAME = "autoencoder_kl.npz"
SCALE = 0.18215


def state_of(arrays, dtype):
    return {
        k.removeprefix("sd/"): v.astype(dtype) for k, v in arrays.items() if k.startswith("sd/")
    }


@pytest.fixture(scope="module")
def golden():
    params, arrays = golden_files.load(NAME)
    arrays |= {
        name: golden_files.sites_last(value)
        for name, value in arrays.items()
        if value.ndim == 4 and not name.startswith("sd/")
    }
    return params, arrays


def test_autoencoder_matches_the_reference_in_float64(golden, x64):
    params, a = golden
    module, variables = load_torch_state(
        state_of(a, np.float64), "vae", norm_groups=params["norm_num_groups"]
    )
    mean, logvar = jax.jit(lambda v, x: module.apply(v, x, method="encode"))(
        variables, a["image"].astype(np.float64)
    )
    np.testing.assert_allclose(mean, a["mean"], rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(logvar, a["logvar"], rtol=1e-9, atol=1e-11)
    decode = jax.jit(lambda v, z: module.apply(v, z, method="decode"))
    decoded = decode(variables, a["z"].astype(np.float64))
    np.testing.assert_allclose(decoded, a["decoded"], rtol=1e-9, atol=1e-11)
    # Scaled latents and back, as the reference's wrapper does.
    latents = SCALE * (mean + np.exp(logvar / 2) * a["posterior_noise"])
    np.testing.assert_allclose(latents, a["latents"], rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(
        decode(variables, latents / SCALE), a["wrapper_decoded"], rtol=1e-9, atol=1e-11
    )


def test_autoencoder_matches_the_reference_in_float32_and_in_chunks(golden):
    params, a = golden
    module, variables = load_torch_state(
        state_of(a, np.float32), "vae", norm_groups=params["norm_num_groups"]
    )
    mean, _ = jax.jit(lambda v, x: module.apply(v, x, method="encode"))(variables, a["image"])
    np.testing.assert_allclose(mean, a["mean"], rtol=2e-4, atol=2e-5)
    three = jnp.concatenate([a["z"], a["z"][:1]])
    chunks = jax.jit(lambda v, z: decode_in_chunks(module, v, z, 2))(variables, three)
    expected = np.concatenate([a["decoded"], a["decoded"][:1]])
    np.testing.assert_allclose(chunks, expected, rtol=2e-4, atol=2e-5)


def test_weights_come_back_bit_for_bit_and_old_names_are_understood(golden):
    params, a = golden
    state = state_of(a, np.float32)
    module, variables = load_torch_state(state, "vae", norm_groups=params["norm_num_groups"])
    back = to_torch_state(module, variables)
    assert set(back) == set(state)
    for name, array in state.items():
        np.testing.assert_array_equal(back[name], array)
    assert (module.channels, module.layers_per_block) == ((16, 32, 32), 2)

    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, array in state.items():
        for new, before in old.items():
            if f"attentions.0.{new}." in name:
                name = name.replace(f".{new}.", f".{before}.")
                array = array[:, :, None, None] if array.ndim == 2 else array
        renamed[name] = array
    assert set(renamed) != set(state)
    _, again = load_torch_state(renamed, "vae", norm_groups=params["norm_num_groups"])
    jax.tree.map(np.testing.assert_array_equal, again, variables)


def test_what_does_not_fit_is_listed(golden):
    _, a = golden
    state = state_of(a, np.float32)
    del state["decoder.conv_in.bias"]
    state["decoder.extra"] = np.zeros(3)
    state["quant_conv.bias"] = np.zeros(3)
    with pytest.raises(ValueError) as error:
        load_torch_state(state, "vae", norm_groups=8)
    for part in ("missing decoder.conv_in.bias", "unexpected decoder.extra", "quant_conv.bias"):
        assert part in str(error.value)
    with pytest.raises(ValueError, match="does not fit an autoencoder"):
        load_torch_state({"a": np.zeros(2)}, "vae")


def test_images_that_do_not_divide_are_refused(golden):
    _, a = golden
    module, variables = load_torch_state(state_of(a, np.float32), "vae", norm_groups=8)
    with pytest.raises(ValueError, match="divisible by 4, got 30x24"):
        module.apply(variables, jnp.zeros((1, 30, 24, 3)), method="encode")


def test_posterior_samples_have_its_moments():
    mean, std = jnp.full((4096, 1, 1, 1), 2.0), jnp.full((4096, 1, 1, 1), 0.5)
    draws = sample_posterior(jax.random.key(0), mean, std)
    # Four standard errors.
    np.testing.assert_allclose(draws.mean(), 2.0, atol=4 * 0.5 / 64)
    np.testing.assert_allclose(draws.std(), 0.5, atol=4 * 0.5 / 64 / np.sqrt(2))


def test_autoencoder_matches_that_of_diffusers():
    """With sizes that the golden file does not have: three levels, more channels, odd batch."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    peer = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 16, 48),
        layers_per_block=1,
        norm_num_groups=8,
    ).double()
    state = {name: tensor.numpy() for name, tensor in peer.state_dict().items()}
    with jax.enable_x64(True):
        module, variables = load_torch_state(state, "vae", norm_groups=8)
        image = np.random.default_rng(0).uniform(-1, 1, (3, 16, 24, 3))
        mean, logvar = module.apply(variables, jnp.asarray(image), method="encode")
        decoded = module.apply(variables, mean, method="decode")
    with torch.no_grad():
        posterior = peer.encode(torch.from_numpy(np.moveaxis(image, -1, 1))).latent_dist
        theirs = peer.decode(posterior.mean).sample
    for ours, other in ((mean, posterior.mean), (logvar, posterior.logvar), (decoded, theirs)):
        other = np.moveaxis(other.numpy(), 1, -1)
        np.testing.assert_allclose(ours, other, rtol=1e-9, atol=1e-10)
