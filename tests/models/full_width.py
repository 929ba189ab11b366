"""Evaluates FLUX.2 at full width with one block of each kind, ours or that of `diffusers`.

    python -m tests.models.full_width ours|theirs OUTPUT.npy

The weights are 9 GB in float32, so each implementation has a process of its own, and draws them
itself: the same numbers for the same name.
"""

import sys
import zlib

import numpy as np

HIDDEN, TEXT, LENGTH, IMAGE, REFERENCE = 6144, 15360, 7, (6, 10), (4, 6)
SIZES = {"num_layers": 1, "num_single_layers": 1}  # all others are those of FLUX.2 [dev]


def drawn(name, shape):
    """Random numbers of a name; weights keep the size of what passes them."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    spread = 0.7 / np.sqrt(shape[-1]) if len(shape) == 2 and "." in name else 1.0
    numbers = rng.standard_normal(shape, np.float32)
    numbers *= np.float32(0.1 if ".norm_" in name else spread)
    numbers += np.float32(".norm_" in name)
    return numbers


def inputs():
    """Image, reference, text, time and guidance."""
    images = [drawn("image", (1, *IMAGE, 32)), drawn("reference", (1, *REFERENCE, 32))]
    return images, drawn("text", (1, LENGTH, TEXT)), np.float32([0.6]), np.float32([4.0])


def official():
    """The network of `diffusers`, without numbers."""
    import diffusers
    import torch

    with torch.device("meta"):
        return diffusers.Flux2Transformer2DModel(**SIZES)


def theirs():
    """The velocity `[1, H, W, 32]` of `diffusers`."""
    import torch

    from tests.models.test_flux2 import ids
    from tests.models.test_references import packed, unpacked

    peer = official()
    for name, value in list(peer.named_parameters()):
        state = {name: torch.from_numpy(drawn(name, tuple(value.shape)))}
        peer.load_state_dict(state, strict=False, assign=True)
    images, text, t, scale = inputs()
    where = [ids(*image.shape[1:3], 10 * i) for i, image in enumerate(images)]
    words = np.pad(np.arange(LENGTH)[:, None], [(0, 0), (3, 0)])
    with torch.no_grad():
        given = {
            "hidden_states": np.concatenate([packed(image) for image in images], axis=1),
            "encoder_hidden_states": text,
            "timestep": t,
            "guidance": scale,
            "img_ids": np.concatenate(where).astype(np.float32),
            "txt_ids": words.astype(np.float32),
        }
        given = {name: torch.from_numpy(array) for name, array in given.items()}
        (out,) = peer(**given, return_dict=False)
    return unpacked(out[:, : IMAGE[0] * IMAGE[1] // 4], *IMAGE)


def ours():
    """The velocity `[1, H, W, 32]` of this package."""
    from piflow_jax.convert import load_torch_state
    from piflow_jax.safetensors_files import LazyArray

    def lazy(name, shape):
        return LazyArray(shape, np.float32, lambda: drawn(name, shape))

    shapes = {name: tuple(value.shape) for name, value in official().named_parameters()}
    state = {name: lazy(name, shape) for name, shape in shapes.items()}
    module, variables = load_torch_state(state, "flux2", hidden=HIDDEN, text_features=TEXT)
    images, text, t, scale = inputs()
    return np.asarray(module.apply(variables, images[0], t, text, scale, images[1:]))


if __name__ == "__main__":
    np.save(sys.argv[2], {"ours": ours, "theirs": theirs}[sys.argv[1]]())
