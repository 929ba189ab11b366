"""The autoencoder against the reference's run of `diffusers`, and in chunks."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax.convert import load_torch_state, open_autoencoder, to_torch_state
from piflow_jax.convert.files import LazyArray
from piflow_jax.convert.qwen_vae import flattened, qwen_vae_rules
from piflow_jax.convert.vae import vae_rules
from piflow_jax.models.vae import AutoencoderKL, decode_in_chunks, sample_posterior
from tests import golden_files
from tests.compiled import on_devices

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


DECODE = """
import sys
import jax, numpy as np
from piflow_jax.models.vae import picture_decoder
from tests.models.test_vae import NAME, load_module
from tests import golden_files

params, a = golden_files.load(NAME)
module, variables = load_module(params, a)
z = golden_files.sites_last(a["z"])
latents = module.scaled(z[[0, 1, 0]])
decode = picture_decoder(module, variables, jax.devices())
decoded = decode(latents)
assert len(decoded.sharding.device_set) == 2, decoded.sharding
np.save(sys.argv[1], decoded)
"""


def load_module(params, arrays):
    return load_torch_state(
        state_of(arrays, np.float32), "vae", norm_groups=params["norm_num_groups"]
    )


@pytest.mark.slow
def test_devices_decode_an_image_each(golden, tmp_path):
    """Three of them on two devices, against the reference's."""
    root = Path(__file__).parents[2]
    environment = os.environ | on_devices(2) | {"PYTHONPATH": str(root)}
    command = [sys.executable, "-c", DECODE, str(tmp_path / "decoded.npy")]
    subprocess.run(command, env=environment, check=True, timeout=300)
    decoded, expected = np.load(tmp_path / "decoded.npy"), golden[1]["decoded"][[0, 1, 0]]
    np.testing.assert_allclose(decoded, expected, rtol=2e-4, atol=2e-5)


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

        @jax.jit
        def run(variables, image):
            mean, logvar = module.apply(variables, image, method="encode")
            return mean, logvar, module.apply(variables, mean, method="decode")

        mean, logvar, decoded = run(variables, jnp.asarray(image))
    with torch.no_grad():
        posterior = peer.encode(torch.from_numpy(np.moveaxis(image, -1, 1))).latent_dist
        theirs = peer.decode(posterior.mean).sample
    for ours, other in ((mean, posterior.mean), (logvar, posterior.logvar), (decoded, theirs)):
        other = np.moveaxis(other.numpy(), 1, -1)
        np.testing.assert_allclose(ours, other, rtol=1e-9, atol=1e-10)


def va_peer(widths=(8, 8, 16, 16, 32), **sizes):
    """VA-VAE in diffusers: stride 16, and attention at the level of the latents."""
    diffusers = pytest.importorskip("diffusers")
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4 + ("AttnDownEncoderBlock2D",),
        up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 4,
        block_out_channels=widths,
        latent_channels=32,
        **sizes,
    )


def test_va_autoencoder_matches_that_of_diffusers():
    torch = pytest.importorskip("torch")
    torch.manual_seed(3)
    peer = va_peer(layers_per_block=1, norm_num_groups=4)
    state = {name: tensor.numpy() for name, tensor in peer.state_dict().items()}
    module, variables = load_torch_state(state, "vae", norm_groups=4)
    assert (module.downsampling, module.attention_levels) == (16, (4,))
    compare_in_float32(torch, module, variables, peer, frames=False, size=(32, 48))
    back = to_torch_state(module, variables)
    assert set(back) == set(state)
    for name, array in state.items():
        np.testing.assert_array_equal(back[name], array)


def test_flux_autoencoder_matches_that_of_diffusers():
    """No convolutions around the latents, other scale and shift, odd numbers of sites."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(1)
    peer = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.1159,
        scaling_factor=0.3611,
    )
    state = {name: tensor.numpy() for name, tensor in peer.state_dict().items()}
    module, variables = load_torch_state(state, "vae", norm_groups=8)
    assert module.latent_channels == 16 and not module.quant_convs
    assert (module.latent_scale, module.latent_shift) == (0.3611, 0.1159)
    compare_in_float32(torch, module, variables, peer, frames=False)
    back = to_torch_state(module, variables)
    assert set(back) == set(state)
    for name, array in state.items():
        np.testing.assert_array_equal(back[name], array)


def qwen_peer():
    diffusers = pytest.importorskip("diffusers")
    rng = np.random.default_rng(2)
    return diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=rng.normal(size=4).tolist(),
        latents_std=rng.uniform(1, 3, 4).tolist(),
    )


def test_qwen_autoencoder_matches_that_of_diffusers():
    torch = pytest.importorskip("torch")
    torch.manual_seed(2)
    peer = qwen_peer()
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            if name.endswith("gamma"):
                parameter.uniform_(0.5, 1.5)
    state = {name: tensor.numpy() for name, tensor in peer.state_dict().items()}
    module, variables = load_torch_state(
        state,
        "qwen_vae",
        latents_mean=peer.config.latents_mean,
        latents_std=peer.config.latents_std,
    )
    assert (module.channels, module.layers_per_block) == ((8, 16), 1)
    assert module.latent_channels == 4 and module.norm_groups is None
    compare_in_float32(torch, module, variables, peer, frames=True)
    with pytest.raises(ValueError, match="one frame"):
        to_torch_state(module, variables)


def test_qwen_latents_have_the_published_statistics():
    diffusers = pytest.importorskip("diffusers")
    import inspect

    from piflow_jax.convert.qwen_vae import LATENTS_MEAN, LATENTS_STD

    published = inspect.signature(diffusers.AutoencoderKLQwenImage.__init__).parameters
    assert tuple(published["latents_mean"].default) == LATENTS_MEAN
    assert tuple(published["latents_std"].default) == LATENTS_STD


def test_what_does_not_fit_a_qwen_autoencoder_is_listed():
    pytest.importorskip("torch")
    state = {name: tensor.numpy() for name, tensor in qwen_peer().state_dict().items()}
    statistics = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    with pytest.raises(ValueError, match="latents_mean has 16 numbers, the latents 4 channels"):
        load_torch_state(state, "qwen_vae")
    del state["decoder.norm_out.gamma"]
    state["encoder.extra"] = np.zeros(3)
    with pytest.raises(ValueError, match=r"missing decoder\.norm_out\.gamma") as error:
        load_torch_state(state, "qwen_vae", **statistics)
    assert "unexpected encoder.extra" in str(error.value)
    with pytest.raises(ValueError, match="does not fit Qwen-Image's autoencoder"):
        load_torch_state({"a": np.zeros(2)}, "qwen_vae")


@pytest.mark.parametrize("kind", ["flux", "flux2", "qwen", "va"])
def test_the_published_sizes_have_the_names_and_shapes_of_diffusers(kind):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        if kind == "qwen":
            peer = diffusers.AutoencoderKLQwenImage()
            module = AutoencoderKL(
                channels=(96, 192, 384, 384),
                latent_channels=16,
                norm_groups=None,
                halving_upsample=True,
            )
            rules = qwen_vae_rules(module)
        elif kind == "va":
            widths = (128, 128, 256, 256, 512)  # of the sizes "f16d32" in the code of REPA-E
            peer = va_peer(widths, layers_per_block=2)
            module = AutoencoderKL(channels=widths, latent_channels=32, attention_levels=(4,))
            rules = vae_rules(module)
        elif kind == "flux2":
            peer = diffusers.AutoencoderKLFlux2()
            module = AutoencoderKL(latent_channels=32)
            rules = vae_rules(module)
        else:
            peer = diffusers.AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                block_out_channels=(128, 256, 512, 512),
                layers_per_block=2,
                latent_channels=16,
                use_quant_conv=False,
                use_post_quant_conv=False,
            )
            module = AutoencoderKL(latent_channels=16, quant_convs=False)
            rules = vae_rules(module)
    state = {k: LazyArray(v.shape, np.float32, None) for k, v in peer.state_dict().items()}
    state = flattened(state) if kind == "qwen" else state
    expected = {name: rule.torch_shape for rule in rules for name in rule.torch_names}
    if kind == "flux2":  # statistics of latents
        assert state.pop("bn.running_mean").shape == state.pop("bn.running_var").shape == (128,)
        del state["bn.num_batches_tracked"]
    assert {name: array.shape for name, array in state.items()} == expected
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    found = {tuple(k.key for k in path) for path, _ in jax.tree.leaves_with_path(shapes)}
    assert found == {rule.path for rule in rules}


@pytest.mark.parametrize("kind", ["flux", "qwen", "va"])
def test_a_published_folder_tells_scale_and_shift(tmp_path, kind):
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    if kind == "qwen":
        peer = qwen_peer()
    else:
        by_channel = {"latents_mean": (1.5, -2.0), "latents_std": (0.5, 4.0)}
        peer = diffusers.AutoencoderKL(
            block_out_channels=(8,),
            norm_num_groups=4,
            latent_channels=2,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=0.5,
            shift_factor=0.25,
            **(by_channel if kind == "va" else {}),
        )
    peer.save_pretrained(tmp_path)
    module, _ = open_autoencoder(tmp_path)
    raw = np.random.default_rng(0).normal(size=(2, 3, module.latent_channels))
    settings = peer.config
    if kind in ("qwen", "va"):  # not by the single scale
        expected = (raw - settings.latents_mean) / settings.latents_std
    else:
        expected = (raw - 0.25) * 0.5
        assert module.norm_groups == 4
    np.testing.assert_allclose(module.scaled(raw), expected, rtol=1e-12)
    np.testing.assert_allclose(module.raw(module.scaled(raw)), raw, rtol=1e-12)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        open_autoencoder(tmp_path)


def compare_in_float32(torch, module, variables, peer, frames, size=(10, 14)):
    image = np.random.default_rng(0).uniform(-1, 1, (2, *size, 3)).astype(np.float32)

    @jax.jit
    def run(variables, image):
        mean, logvar = module.apply(variables, image, method="encode")
        latents = module.scaled(mean)
        decoded = module.apply(variables, module.raw(latents), method="decode")
        return mean, logvar, latents, decoded

    mean, logvar, latents, decoded = run(variables, image)
    peer = peer.double()  # so that only our rounding is compared
    with torch.no_grad():
        x = torch.from_numpy(np.moveaxis(image, -1, 1).astype(np.float64))
        posterior = peer.encode(x[:, :, None] if frames else x).latent_dist
        theirs = peer.decode(posterior.mean).sample
    settings = peer.config
    if frames:
        shift, scale = np.array(settings.latents_mean), 1 / np.array(settings.latents_std)
    else:
        shift, scale = settings.shift_factor or 0.0, settings.scaling_factor
    for ours, other in ((mean, posterior.mean), (logvar, posterior.logvar), (decoded, theirs)):
        other = np.moveaxis(other.numpy(), 1, -1)
        other = other[:, 0] if frames else other
        assert np.std(other) > 1e-2
        if frames and ours is decoded:  # which the release clips
            ours = np.clip(ours, -1, 1)
        np.testing.assert_allclose(ours, other, rtol=1e-4, atol=1e-5)
    expected = (np.asarray(mean, np.float64) - shift) * scale
    np.testing.assert_allclose(latents, expected, rtol=1e-5, atol=1e-6)
