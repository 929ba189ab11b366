"""LoRA files under the names of four programs, added to the weights of a network."""

import logging

import jax
import ml_dtypes
import numpy as np
import pytest

from piflow_jax.convert import load_params, open_weights, with_loras, write_safetensors
from piflow_jax.convert.flux import FIRST_NAMES
from piflow_jax.convert.flux2 import FIRST_NAMES as FLUX2_FIRST_NAMES
from tests.weights import network, state

RANK, ALPHA = 2, 3.0
LAYERS = {
    "flux": (
        *("transformer_blocks.0.attn.to_q", "transformer_blocks.0.ff_context.net.0.proj"),
        *("single_transformer_blocks.1.proj_out", "x_embedder"),
        "time_text_embed.timestep_embedder.linear_1",
    ),
    "qwen_image": (
        *("transformer_blocks.1.attn.add_k_proj", "transformer_blocks.0.img_mod.1"),
        *("transformer_blocks.1.txt_mlp.net.2", "txt_in"),
    ),
    "flux2": (
        *("transformer_blocks.0.attn.add_v_proj", "transformer_blocks.0.ff.linear_in"),
        *("single_transformer_blocks.1.attn.to_qkv_mlp_proj", "context_embedder"),
        *("single_transformer_blocks.0.attn.to_out", "double_stream_modulation_img.linear"),
    ),
}


def drawn(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def matrices(kind, seed=0):
    """`(A, B)` of each layer."""
    arrays = state(kind)
    shapes = {layer: arrays[f"{layer}.weight"].shape for layer in LAYERS[kind]}
    return {
        layer: (drawn((RANK, ins), seed), drawn((outs, RANK), seed + 1))
        for layer, (outs, ins) in shapes.items()
    }


def peft(layer):
    return f"base_model.model.{layer}.lora_A.weight", f"base_model.model.{layer}.lora_B.weight"


def diffusers(layer):
    return f"transformer.{layer}.lora_A.weight", f"transformer.{layer}.lora_B.weight"


def diffusers_with_an_adapter(layer):
    return f"{layer}.lora_A.default.weight", f"{layer}.lora_B.default.weight"


def old_diffusers(layer):
    return f"transformer.{layer}.lora.down.weight", f"transformer.{layer}.lora.up.weight"


def kohya(layer):
    flat = layer.replace(".", "_")
    return tuple(f"lora_unet_{flat}.lora_{which}.weight" for which in ("down", "up"))


def one_trainer(layer):
    return tuple(name.replace("unet", "transformer", 1) for name in kohya(layer))


def comfy(layer):
    return f"diffusion_model.{layer}.lora_A.weight", f"diffusion_model.{layer}.lora_B.weight"


NAMINGS = (peft, diffusers, diffusers_with_an_adapter, old_diffusers, kohya, one_trainer, comfy)


def lora(kind, naming, alpha=None, seed=0):
    found = {}
    for layer, pair in matrices(kind, seed).items():
        found |= dict(zip(naming(layer), pair, strict=True))
        if alpha is not None:
            name = naming(layer)[0].rpartition(".lora")[0]
            found[f"{name}.alpha"] = np.float32(alpha)
    return found


def added(kind, factor, seed=0):
    """Official weights with the matrices added to them, in float64."""
    arrays = {name: np.asarray(a, np.float64) for name, a in state(kind).items()}
    for layer, (down, up) in matrices(kind, seed).items():
        arrays[f"{layer}.weight"] += factor * (up.astype(np.float64) @ down.astype(np.float64))
    return arrays


@pytest.mark.parametrize("naming", NAMINGS, ids=lambda naming: naming.__name__)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("alpha", [None, ALPHA])
def test_matrices_are_found_under_the_names_of_every_program(kind, naming, alpha):
    found = with_loras(state(kind), kind, [(lora(kind, naming, alpha), 0.5)])
    expected = added(kind, 0.5 * (1 if alpha is None else alpha / RANK))
    assert set(found) == set(expected)
    for name, array in expected.items():
        np.testing.assert_allclose(np.asarray(found[name]), array, rtol=1e-5, atol=1e-5)
    # The leaves of the network are read from it, layer by layer, as from any file.
    params = load_params(network(kind), found, kind)
    plain = load_params(network(kind), expected, kind)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), params, plain)


D = 3072
WIDTHS = {  # rows and columns by the end of a layer's name, the first that fits
    **{"norm1.linear": (6 * D, D), "norm1_context.linear": (6 * D, D), "norm.linear": (3 * D, D)},
    **{"norm_out.linear": (2 * D, D), "proj_mlp": (4 * D, D), "net.0.proj": (4 * D, D)},
    **{"net.2": (D, 4 * D), "}.proj_out": (D, 5 * D), "proj_out": (64, D)},
    **{"x_embedder": (D, 64), "context_embedder": (D, 4096), "text_embedder.linear_1": (D, 768)},
    **{"embedder.linear_1": (D, 256), "": (D, D)},
}


def test_first_names_of_flux_are_converted_as_diffusers_does():
    """At the release's width, where its converter has the sizes; a few rows of each weight."""
    torch = pytest.importorskip("torch")
    convert = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
    file, base, expected = {}, {}, {}
    for seed, (first, pieces) in enumerate(FIRST_NAMES.items()):
        outs = 0
        for name, _, number in pieces:
            rows, ins = next(size for end, size in WIDTHS.items() if name.endswith(end))
            name = name.format(layer=0)
            base[f"{name}.weight"] = np.broadcast_to(np.float32(0), (rows, ins))
            outs += rows // number
        flat = "lora_unet_" + first.format(layer=0).replace(".", "_")
        file[f"{flat}.lora_down.weight"] = drawn((4, ins), seed)
        file[f"{flat}.lora_up.weight"] = drawn((outs, 4), 100 + seed)
        if not flat.startswith("lora_unet_final_layer"):  # whose alpha the converter loses
            file[f"{flat}.alpha"] = np.float32(2.0)
    theirs = convert._convert_kohya_flux_lora_to_diffusers(
        {name: torch.from_numpy(np.array(array)) for name, array in file.items()}
    )
    theirs = {name.removeprefix("transformer."): a.numpy() for name, a in theirs.items()}
    for name in base:
        layer = name.removesuffix(".weight")
        up, down = theirs.pop(f"{layer}.lora_B.weight"), theirs.pop(f"{layer}.lora_A.weight")
        expected[name] = up, down
    assert not theirs
    ours = with_loras(base, "flux", [(file, 1.0)])
    for name, (up, down) in expected.items():
        for rows in (slice(0, 2), slice(len(up) // 2, len(up) // 2 + 1), slice(len(up) - 1, None)):
            np.testing.assert_allclose(ours[name][(rows,)], up[rows] @ down, rtol=1e-4, atol=1e-5)


def test_first_names_of_flux2_are_converted_as_diffusers_does():
    torch = pytest.importorskip("torch")
    convert = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
    base, file = state("flux2"), {}
    # Of this layer the converter leaves the halves as they are; for checkpoints it exchanges them.
    skipped = "final_layer.adaLN_modulation.1"
    for seed, (first, pieces) in enumerate(FLUX2_FIRST_NAMES.items()):
        shapes = [base[f"{name.format(layer=0)}.weight"].shape for name, *_ in pieces]
        outs, ins = sum(rows for rows, _ in shapes), shapes[0][1]
        layer = f"diffusion_model.{first.format(layer=0)}"
        if first != skipped:
            file[f"{layer}.lora_A.weight"] = drawn((RANK, ins), seed)
            file[f"{layer}.lora_B.weight"] = drawn((outs, RANK), 100 + seed)
    theirs = convert._convert_non_diffusers_flux2_lora_to_diffusers(
        {name: torch.from_numpy(array) for name, array in file.items()}
    )
    theirs = {name.removeprefix("transformer."): a.numpy() for name, a in theirs.items()}
    ours, changed = with_loras(base, "flux2", [(file, 1.0)]), 0
    for name, array in base.items():
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_A.weight" in theirs:
            up, down = (theirs.pop(f"{layer}.lora_{which}.weight") for which in "BA")
            array, changed = array + up @ down, changed + 1
        np.testing.assert_allclose(np.asarray(ours[name]), array, rtol=1e-4, atol=1e-5)
    assert not theirs and changed > 20
    # The shift comes before the scale there: the official layer's halves are exchanged.
    up, down = drawn((64, RANK)), drawn((RANK, 32))
    pair = {f"{skipped}.lora_B.weight": up, f"{skipped}.lora_A.weight": down}
    found = np.asarray(with_loras(base, "flux2", [(pair, 1.0)])["norm_out.linear.weight"])
    exchanged = np.roll(up @ down, 32, axis=0)
    np.testing.assert_allclose(found - base["norm_out.linear.weight"], exchanged, atol=1e-5)


def test_several_files_are_rounded_once_with_the_weight():
    base = {name: a.astype(ml_dtypes.bfloat16) for name, a in state("flux").items()}
    files = [(lora("flux", peft), 0.3), (lora("flux", kohya, seed=5), -1)]
    found = with_loras(base, "flux", files)
    exact = {name: np.asarray(a, np.float64) for name, a in base.items()}
    for (_, strength), seed in zip(files, (0, 5), strict=True):
        for layer, (down, up) in matrices("flux", seed).items():
            exact[f"{layer}.weight"] += strength * (up @ down).astype(np.float64)
    for name, array in exact.items():
        once = array.astype(np.float32).astype(ml_dtypes.bfloat16)
        read = np.asarray(found[name])
        assert read.dtype == ml_dtypes.bfloat16 == found[name].dtype
        # Float32 sums may round otherwise at a tie.
        assert np.mean(read != once) < 1e-2 and np.allclose(
            read.astype(np.float32), once.astype(np.float32), rtol=2**-7
        )


def test_scales_in_the_settings_of_a_file_are_followed(tmp_path):
    settings = '{"transformer.r": 2, "transformer.lora_alpha": 8, "transformer.use_rslora": true}'
    path = tmp_path / "x.safetensors"
    write_safetensors(path, lora("flux", diffusers), {"lora_adapter_metadata": settings})
    found = with_loras(state("flux"), "flux", [(open_weights(path), 1.0)])
    expected, layer = added("flux", 8 / 2**0.5), f"{LAYERS['flux'][0]}.weight"
    np.testing.assert_allclose(np.asarray(found[layer]), expected[layer], rtol=1e-5, atol=1e-5)


def renamed(old, new):
    return lambda file: {name.replace(old, new): array for name, array in file.items()}


REFUSED = [
    (renamed("to_q", "to_x"), ["transformer.transformer_blocks.0.attn.to_x, which is no layer"]),
    (
        lambda f: {n: a for n, a in f.items() if "to_q.lora_B" not in n},
        ["to_q, without its second"],
    ),
    (lambda f: {n: a for n, a in f.items() if "to_q.lora_A" not in n}, ["to_q, without its first"]),
    (
        lambda f: f | {"transformer.x_embedder.lora_A.weight": drawn((RANK, 7))},
        ["x_embedder, of shapes (32, 2) and (2, 7), for (32, 16)"],
    ),
    (
        lambda f: (
            f
            | {
                "transformer.x_embedder.lora_magnitude_vector": drawn((32,)),
                "text_encoder.layers.0.lora_A.weight": drawn((2, 4)),
                "lora_unet_a.lokr_w1": drawn((2, 2)),
            }
        ),
        ["x_embedder.lora_magnitude_vector", "text_encoder.layers.0", "lora_unet_a.lokr_w1"],
    ),
    (lambda f: f | {"nothing.alpha": np.float32(1)}, ["nothing.alpha"]),
    (
        lambda f: f | {"transformer.x_embedder.lora_A.two.weight": drawn((RANK, 16))},
        ["x_embedder.lora_A", "weight, a second matrix in its place"],
    ),
]


@pytest.mark.parametrize(("change", "words"), REFUSED)
def test_what_has_no_place_is_listed(change, words, tmp_path):
    path = tmp_path / "style.safetensors"
    write_safetensors(path, change(lora("flux", diffusers)))
    with pytest.raises(ValueError) as error:
        with_loras(state("flux"), "flux", [(open_weights(path), 1.0)])
    said = str(error.value)
    assert said.startswith(f"{path}: ") and all(word in said for word in words), said
    with pytest.raises(ValueError, match="there are no LoRA matrices in it"):
        with_loras(state("flux"), "flux", [({}, 1.0)])


def test_layers_that_a_student_replaces_are_said_to_be_without_effect(caplog):
    file = {"transformer.norm_out.linear.lora_A.weight": drawn((2, 32))}
    file["transformer.norm_out.linear.lora_B.weight"] = drawn((64, 2))
    with caplog.at_level(logging.WARNING):
        with_loras(state("flux"), "flux", [(file, 1.0)], base=network("flux"))
    assert "without effect" in caplog.text and "norm_out.linear.weight" in caplog.text
