"""Decoding latents with Stable Diffusion's autoencoder, against `diffusers` in PyTorch.

    python -m benchmarks.decode --size=64 --batch-size=2
    python -m benchmarks.decode --dtype=bfloat16 --batch-size=64

Both have the same random weights and full-size widths, and their images are compared before they
are timed. The first is for a machine without a GPU, where an image of 256x256 takes many seconds;
the second is for one GPU. PyTorch is left out, with the reason, where it cannot be used. A batch
goes through the decoder a few latents at a time, as samples do in `--mode=sample` and
`--mode=evaluate`, and with `--chunk` as many as are given.
"""

import argparse
import importlib.util
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness
from piflow_jax.convert import load_torch_state
from piflow_jax.models.vae import AutoencoderKL, decode_in_chunks
from piflow_jax.modes.autoencoder import CHUNK
from piflow_jax.parallel.flops import flops


def decoders(device: str | None):
    """The decoder of `diffusers` on PyTorch's device, or None, and our module with its weights."""
    if device and importlib.util.find_spec("diffusers") is None:
        print('diffusers is left out: pip install -e ".[peers]"', file=sys.stderr)
        device = None
    if device is None:
        module = AutoencoderKL()
        image = jnp.zeros((1, 64, 64, 3))
        return None, module, jax.jit(module.init)(jax.random.key(0), image)
    import torch
    from diffusers import AutoencoderKL as Theirs

    torch.manual_seed(0)
    theirs = Theirs(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
    ).eval()
    state = {name: value.numpy() for name, value in theirs.state_dict().items()}
    module, params = load_torch_state(state, "vae", norm_groups=32)
    return theirs, module, jax.tree.map(jnp.asarray, params)


def diffusers_call(theirs, device: str, dtype: str, latents: jax.Array, ours: Callable) -> Callable:
    """Decoding with `diffusers`, when its images have been compared with ours."""
    import torch

    theirs = theirs.to(device, getattr(torch, dtype))
    first = torch.from_numpy(np.moveaxis(np.asarray(latents), -1, 1).copy())
    first = first.to(device, getattr(torch, dtype))

    @torch.inference_mode()
    def call():
        return theirs.decode(first).sample

    found = np.asarray(ours(), np.float32)
    expected = np.moveaxis(call().float().cpu().numpy(), 1, -1)
    tolerance = {"float32": 1e-3, "bfloat16": 0.1}[dtype]
    np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max())
    return call


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=256, help="side of an image, in pixels")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--chunk", type=int, default=CHUNK, help="latents decoded at once")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    harness.tune_allocator()
    device = harness.torch_device()
    theirs, module, params = decoders(device)
    side = options.size // module.downsampling
    latents = jax.random.normal(jax.random.key(1), (options.batch_size, side, side, 4))
    network = module.clone(dtype=jnp.dtype(options.dtype))
    decode = jax.jit(lambda p, z: decode_in_chunks(network, p, z, options.chunk))

    def ours():
        return decode(params, latents)

    builders = {"piflow_jax": lambda: ours}
    if theirs is not None:
        builders["diffusers"] = lambda: diffusers_call(theirs, device, options.dtype, latents, ours)
    counted = flops(lambda p, z: module.apply(p, z, method="decode"), params, latents)
    work = harness.Work(
        items=options.batch_size, unit="images", flops=counted.total, dtype=options.dtype
    )
    peaks = harness.measured_peaks((options.dtype,))
    harness.save(
        "decode",
        f"{options.size}x{options.size}, batch {options.batch_size}, {options.dtype}, "
        f"{options.chunk} at once",
        harness.compare(builders, work, peaks, rounds=options.rounds),
    )


if __name__ == "__main__":
    main()
