"""FLUX.2 against `diffusers`, block by block and whole, with references, and against itself."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax.convert import load_torch_state
from piflow_jax.models import flux
from piflow_jax.models.flux2 import Flux2, flux2_angles
from tests.models.recorded import random_state
from tests.models.test_flux import exact_rotation
from tests.models.test_references import drawn, packed, unpacked

AXES = (4, 2, 6, 4)
SIZES = dict(
    in_channels=16,
    num_layers=2,
    num_single_layers=3,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=12,
    axes_dims_rope=AXES,
)
SMALL = dict(
    in_channels=4,
    hidden=32,
    num_heads=2,
    double_depth=2,
    single_depth=3,
    text_features=12,
    axes_dims_rope=AXES,
)
# Odd numbers of rows and of columns, none of them alike.
IMAGE, REFERENCES = (6, 10), [(14, 6), (2, 8), (10, 2)]
LENGTH = 5
apply = jax.jit(
    lambda module, *inputs: module.apply(*inputs),
    static_argnums=0,
    compiler_options={"xla_backend_optimization_level": 0},
)


def ids(height, width, time):
    """Positions of an image's tokens, as the pipelines of FLUX.2 make them."""
    rows, columns = np.meshgrid(np.arange(height // 2), np.arange(width // 2), indexing="ij")
    return np.stack([0 * rows + time, rows, columns, 0 * rows], axis=-1).reshape(-1, 4)


def inputs(count, guidance):
    x, references = drawn(2, *IMAGE, 4), [drawn(2, *size, 4) for size in REFERENCES[:count]]
    text, t = drawn(2, LENGTH, 12), np.float32([0.3, 0.9])
    return x, t, text, np.float32([4.0, 1.25]) if guidance else None, references


def theirs(peer, x, t, text, scales, references):
    """What the transformer of `diffusers` makes of it, called as its pipelines do."""
    import torch

    images = [x, *references]
    where = [ids(*image.shape[1:3], 10 * i) for i, image in enumerate(images)]
    words = np.pad(np.arange(LENGTH)[:, None], [(0, 0), (3, 0)])
    given = {
        "hidden_states": np.concatenate([packed(image) for image in images], axis=1),
        "encoder_hidden_states": text,
        "timestep": t,
        "img_ids": np.concatenate(where).astype(np.float32),
        "txt_ids": words.astype(np.float32),
    } | ({} if scales is None else {"guidance": scales})
    with torch.no_grad():
        given = {name: torch.from_numpy(array) for name, array in given.items()}
        (out,) = peer(**given, return_dict=False)
    return unpacked(out[:, : IMAGE[0] * IMAGE[1] // 4], *IMAGE)


def of_diffusers(guidance):
    diffusers = pytest.importorskip("diffusers")
    return diffusers.Flux2Transformer2DModel(**SIZES, guidance_embeds=guidance)


@pytest.mark.parametrize(("count", "guidance"), [(0, True), (1, False), (3, True)])
def test_whole_network_is_that_of_diffusers(count, guidance):
    peer = of_diffusers(guidance)
    state, given = random_state(peer), inputs(count, guidance)
    expected = theirs(peer, *given)
    module, variables = load_torch_state(state, "flux2", axes_dims_rope=AXES)
    assert module == Flux2(**SMALL, guidance_embed=guidance)
    ours = apply(module, variables, *given)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    # Times and guidance count.
    assert np.abs(apply(module, variables, given[0], given[1] / 2, *given[2:]) - ours).max() > 0.05


@pytest.mark.parametrize("count", [0, 2])
def test_every_block_is_that_of_diffusers(monkeypatch, count):
    torch = pytest.importorskip("torch")
    peer = of_diffusers(True).double()
    from diffusers.models import embeddings
    from diffusers.models.transformers import transformer_flux2

    state = random_state(peer)
    monkeypatch.setattr(transformer_flux2, "apply_rotary_emb", exact_rotation)

    def their_features(t):
        features = embeddings.get_timestep_embedding(
            torch.from_numpy(np.array(t)), 256, flip_sin_to_cos=True, downscale_freq_shift=0
        )
        return jnp.asarray(features.numpy())

    # Frequencies are float32 on both sides, but an exponential differs in its last bit.
    monkeypatch.setattr(flux, "time_features", their_features)
    seen = {"double_blocks": [], "single_blocks": []}

    def joined(out):  # double blocks return text and image
        return torch.cat(out, dim=1) if isinstance(out, tuple) else out

    for blocks, into in (("transformer_blocks", "double"), ("single_transformer_blocks", "single")):
        for block in getattr(peer, blocks):
            block.register_forward_hook(
                lambda _, __, out, into=into: seen[f"{into}_blocks"].append(joined(out).numpy())
            )
    x, t, text, scales, references = inputs(count, True)
    wide = [a.astype(np.float64) for a in (x, t, text, scales)]
    references = [a.astype(np.float64) for a in references]
    expected = theirs(peer, *wide, references)
    with jax.enable_x64(True):
        module, variables = load_torch_state(state, "flux2", axes_dims_rope=AXES)
        given = jax.tree.map(jnp.asarray, [*wide, references])
        ours, found = module.apply(variables, *given, mutable=["intermediates"])
    double, single = (found["intermediates"][f"{one}_blocks"] for one in ("double", "single"))
    assert len(seen["double_blocks"]) == 2 and len(seen["single_blocks"]) == 3
    for i, tokens in enumerate(seen["double_blocks"]):
        stream = np.concatenate([double["text"][0][i], double["image"][0][i]], axis=1)
        np.testing.assert_allclose(stream, tokens, rtol=1e-9, atol=1e-9)
    for i, tokens in enumerate(seen["single_blocks"]):
        np.testing.assert_allclose(single["tokens"][0][i], tokens, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-9)


def test_positions():
    # Each axis starts with the frequency 1: time, row, column, place in the text.
    first = np.cumsum([0, *AXES[:-1]]) // 2
    angles = flux2_angles(AXES, 2, 1, 2, [(2, 1), (1, 1)])[:, first]
    text, image = [[0, 0, 0, 0], [0, 0, 0, 1]], [[0, 0, 0, 0], [0, 0, 1, 0]]
    references = [[10, 0, 0, 0], [10, 1, 0, 0], [20, 0, 0, 0]]
    np.testing.assert_array_equal(angles, [*text, *image, *references])
    np.testing.assert_allclose(flux2_angles((4, 2, 2, 2), 1, 2, 1, [])[2, 1:3], [0, 1])
    # The second frequency of an axis of four is the root of the base.
    at = flux2_angles((4, 2, 2, 2), 0, 1, 1, [(1, 1)])[1]
    np.testing.assert_allclose(at, [10, 10 / np.sqrt(2000), 0, 0, 0], rtol=1e-12)


def test_number_of_parameters():
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    module = Flux2()
    shapes = jax.eval_shape(module.init, jax.random.key(0), *module.example())
    with torch.device("meta"):
        peer = diffusers.Flux2Transformer2DModel()  # its defaults are FLUX.2 [dev]
    official = sum(math.prod(p.shape) for p in peer.parameters())
    assert sum(math.prod(a.shape) for a in jax.tree.leaves(shapes)) == official == 32_223_281_152


def test_bfloat16_is_close_and_leaves_in_float32():
    module, given = Flux2(**SMALL), inputs(1, True)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *module.example())
    params = jax.tree.map(lambda a: 0.3 * drawn(*a.shape), shapes)
    exact = apply(module, params, *given)
    half = apply(module.clone(dtype=jnp.bfloat16), params, *given)
    assert half.dtype == jnp.float32
    error = np.abs(half - exact).max() / np.abs(exact).max()
    assert 1e-4 < error < 0.1


@pytest.mark.parametrize(
    ("change", "inputs", "message"),
    [
        ({"axes_dims_rope": (4, 6, 6)}, {}, "must have four entries"),
        ({"axes_dims_rope": (4, 4, 4, 2)}, {}, "add up to the size of a head"),
        ({"guidance_embed": False}, {}, "guidance_embed is False"),
        ({}, {"guidance": jnp.zeros(3)}, r"must be \[B\] with B = 2"),
        ({}, {"references": [jnp.zeros((2, 3, 4, 4))]}, r"references\[0\] .* is not divisible"),
        ({}, {"text": jnp.zeros((2, 3, 11))}, r"text must be \[2, L, 12\]"),
    ],
)
def test_what_does_not_fit_is_named(change, inputs, message):
    given = {"x": jnp.zeros((2, 4, 6, 4)), "t": jnp.zeros(2), "text": jnp.zeros((2, 3, 12))}
    given |= {"guidance": jnp.zeros(2)} | inputs
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(Flux2(**SMALL | change).init, jax.random.key(0), **given)
