"""Weight files, adapters and the settings inside files: what is read rightly, what is refused.

A case is one line: what is done to a small official state or file, and words of the answer or the
right value. Files of other programs are in `tests/cases`, with what is right and why.
"""

import dataclasses
import functools
import json
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import piflow_jax
from configs import flux as flux_config
from configs import qwen_image as qwen_config
from piflow_jax.config import parse
from piflow_jax.convert import (
    export_adapter,
    load_adapter,
    load_params,
    load_torch_state,
    open_autoencoder,
    open_weights,
    to_torch_state,
    write_safetensors,
)
from piflow_jax.loading.runs import load_student
from piflow_jax.models.dit import DiT
from piflow_jax.models.flux import FLUX_TARGETS, Flux
from piflow_jax.models.heads import DXHead, GMHead, VelocityHead
from piflow_jax.models.layers import time_features
from piflow_jax.models.lora import LoRA, split
from piflow_jax.models.qwen_image import QWEN_TARGETS, QwenImage
from piflow_jax.modes import run
from piflow_jax.systems import networks
from piflow_jax.systems import spec as specs
from piflow_jax.systems.shapes import DataShape
from tests import tiny, tiny_text

CASES = Path(__file__).parents[1] / "cases"
SIZES = {
    "in_channels": 4,
    "hidden": 32,
    "num_heads": 2,
    "text_features": 12,
    "axes_dims_rope": (4, 6, 6),
}
NETWORKS = {
    "dit": functools.partial(
        DiT, hidden=16, num_heads=2, depth=2, num_classes=3, in_channels=4, sample_size=4
    ),
    "flux": functools.partial(Flux, **SIZES, double_depth=1, single_depth=2, pooled_features=10),
    "qwen_image": functools.partial(QwenImage, **SIZES, depth=2),
}
FF = "transformer_blocks.0.ff.net.2"
GIVEN = {"dit": {"num_heads": 2, "sample_size": 4}}
HEADS = {"gm": GMHead(2, 8), "dx": DXHead(3), "": VelocityHead()}


def network(name, **options):
    """The module that is called `flux`, `gm_flux` and so on."""
    kind = name if name in NETWORKS else name.partition("_")[2]
    return NETWORKS[kind](head=HEADS[name.removesuffix(kind).removesuffix("_")], **options)


@functools.cache
def drawn(module):
    shapes = jax.eval_shape(module.init, jax.random.key(0), *module.example())
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32), shapes)


def state(name):
    """A whole network under official names, or the adapter of a student, `gm_flux+lora`."""
    if not name.endswith("+lora"):
        return to_torch_state(network(name), drawn(network(name)))
    module = adapted(name)
    return export_adapter(module, split(drawn(module))[1])


def adapted(name):
    targets = QWEN_TARGETS if "qwen" in name else FLUX_TARGETS
    return network(name.removesuffix("+lora"), lora=LoRA(targets, rank=3))


def load(name, arrays):
    """What the weights are read as."""
    if name.endswith("+lora"):
        return load_adapter(adapted(name), arrays)
    given = GIVEN.get(name.partition("_")[2] or name, SIZES)
    given = {"axes_dims_rope": (4, 6, 6)} if given is SIZES else given
    return load_torch_state(arrays, name, **given)


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


# --- Weights that are not what they are said to be -----------------------------------------------


def of(name):
    return lambda _: state(name)


def changed(name, change):
    return lambda arrays: arrays | {name: change(arrays[name])}


def number(name, value):
    return changed(name, lambda a: np.where(np.arange(a.size).reshape(a.shape), a, value))


def cast(name, dtype):
    return changed(name, lambda a: np.asarray(a).astype(dtype))


def transposed(name):
    return changed(name, lambda a: np.ascontiguousarray(a.T))


def named(change):
    return lambda arrays: {change(name): array for name, array in arrays.items()}


def without(*names):
    return lambda arrays: {n: a for n, a in arrays.items() if not n.startswith(names)}


def kohya(name):
    layer, _, which = name.partition(".lora_")
    if not which:
        return name
    which = "down" if which.startswith("A") else "up"
    return f"lora_transformer_{layer.replace('.', '_')}.lora_{which}.weight"


def comfy(name):
    return f"diffusion_model.double_blocks.{name.replace('lora_A', 'lora_down')}"


FOREIGN = {
    "bfl": {"double_blocks.0.img_attn.qkv.weight": np.zeros((3, 1))},
    "t5": {"encoder.block.0.layer.0.SelfAttention.q.weight": np.zeros((1, 1))},
    "clip": {"text_model.encoder.layers.0.self_attn.q_proj.weight": np.zeros((1, 1))},
    "vae": {"decoder.mid_block.resnets.0.norm1.weight": np.zeros(1)},
}
ONE = r"^1 of the \d+ numbers of {} are not finite"
REFUSED = [
    ("dit", number("proj_out_2.bias", np.nan), ONE.format("proj_out_2.bias")),
    ("gm_flux", number("proj_out_means.weight", np.inf), ONE.format("proj_out_means.weight")),
    ("flux", number("transformer_blocks.0.attn.to_k.bias", -np.inf), ONE.format(".*to_k.bias")),
    ("gm_qwen_image+lora", number("norm_out.linear.bias", np.nan), ONE.format("norm_out.*bias")),
    ("dit", cast("proj_out_2.bias", np.int32), "proj_out_2.bias is of type int32, and weights are"),
    ("flux", cast("x_embedder.bias", np.uint32), "x_embedder.bias is of type uint32"),
    ("flux", cast("x_embedder.bias", np.bool_), "x_embedder.bias is of type bool"),
    ("qwen_image", cast("img_in.weight", np.int8), "img_in.weight is of type int8"),
    ("gm_flux+lora", cast("norm_out.linear.bias", np.int64), "norm_out.linear.bias is of type int"),
    ("flux", lambda s: {n: a.astype(np.float64) * 1e39 for n, a in s.items()}, "not finite"),
    ("qwen_image", transposed("img_in.weight"), r"img_in.weight has shape \(16, 32\) \(transposed"),
    ("qwen_image", transposed("txt_in.weight"), r"txt_in.weight has shape \(12, 32\) \(transposed"),
    ("flux", transposed("context_embedder.weight"), r"context_embedder.weight .* \(transposed\)"),
    (
        "flux",
        transposed("proj_out.weight"),
        r"proj_out.weight .*expected \(16, 32\) \(transposed\)",
    ),
    ("dit", transposed(f"{FF}.weight"), r"ff.net.2.weight has shape .* \(transposed\)"),
    ("flux", changed("x_embedder.bias", lambda a: a[:0]), r"x_embedder.bias has shape \(0,\)"),
    (
        "flux",
        changed("x_embedder.weight", lambda a: a[:, :3]),
        "x_embedder.weight has 3 entries, no",
    ),
    ("dx_qwen_image", of("qwen_image"), "one output per site and channel: .* weights of a teacher"),
    ("dx_flux", of("flux"), "weights of a teacher"),
    ("dx_dit", of("dit"), "weights of a teacher"),
    ("flux", of("dx_flux"), "3 outputs per site and channel: .* grid, dx_flux"),
    (
        "flux",
        of("gm_flux"),
        "weights of a gm_flux, a student that predicts a mixture, not of a flux",
    ),
    ("gm_flux", of("flux"), r"weights of a teacher \(flux\) or of a grid \(dx_flux\)"),
    ("flux", of("qwen_image"), "^these are weights of a qwen_image, not of a flux"),
    ("gm_qwen_image", of("gm_flux"), "^these are weights of a flux, not of a gm_qwen_image"),
    ("flux", of("dit"), "^these are weights of a dit, not of a flux"),
    ("dit", of("flux"), "^these are weights of a flux, not of a dit"),
    ("flux", lambda _: FOREIGN["bfl"], "FLUX.1 under its first names.* folder transformer"),
    ("flux", lambda _: FOREIGN["t5"], "weights of the text encoder T5"),
    ("qwen_image", lambda _: FOREIGN["clip"], "weights of the text encoder CLIP"),
    ("flux", lambda _: FOREIGN["vae"], "weights of a vae, not of a flux"),
    ("flux", of("gm_flux+lora"), "these are LoRA matrices, an adapter, not a whole flux"),
    (
        "flux",
        lambda s: s | named("ema.{}".format)(s) | named("net.{}".format)(s),
        "unexpected ema.",
    ),
    (
        "flux",
        lambda s: named("ema.{}".format)(s) | named("net.{}".format)(s),
        "select one.*ema, net",
    ),
    ("flux", lambda s: s | {"transformer_blocks.123456789.x": s["proj_out.bias"]}, "123456789: "),
    ("flux", lambda s: s | {"more": s["proj_out.bias"]}, r"unexpected more \(16,\)"),
    ("flux", without("proj_out.bias"), "missing proj_out.bias"),
    (
        "gm_flux+lora",
        of("gm_flux"),
        "^there are no LoRA matrices; what is read has the names of dif",
    ),
    ("gm_flux+lora", named(kohya), "LoRA matrices under kohya's names; what is read"),
    ("gm_flux+lora", named(comfy), "LoRA matrices under ComfyUI's names; what is read"),
    ("gm_flux+lora", without("proj_out"), "without an output head, an adapter of the teacher"),
    ("gm_flux+lora", of("dx_flux+lora"), "predicts a grid, and config.policy.kind is 'gm'"),
    ("dx_flux+lora", of("gm_flux+lora"), "predicts a mixture, and config.policy.kind is 'dx'"),
    ("gm_flux+lora", without("norm_out.linear.bias"), r"missing norm_out.linear.bias \(64,\)"),
]


@pytest.mark.parametrize(("name", "change", "words"), REFUSED)
def test_weights_that_are_not_what_they_are_said_to_be(name, change, words):
    arrays = state(name)
    same(load(name, arrays), load(name, dict(arrays)))  # they are in order
    with pytest.raises(ValueError, match=words):
        load(name, change(arrays))


AUTOENCODERS = [
    (lambda: state("flux"), "weights of a flux, not of a vae"),
    (lambda: {"decoder.mid.block_1.norm1.weight": np.zeros(1)}, "an autoencoder under its first"),
]


@pytest.mark.parametrize(("arrays", "words"), AUTOENCODERS)
def test_what_is_no_autoencoder(tmp_path, arrays, words):
    write_safetensors(tmp_path / "x.safetensors", arrays())
    with pytest.raises(ValueError, match=words):
        open_autoencoder(tmp_path)


def test_a_rank_that_is_not_that_of_the_settings_is_one_sentence():
    module = adapted("gm_flux+lora").clone(lora=LoRA(FLUX_TARGETS, rank=4))
    with pytest.raises(ValueError, match=r"^the rank is 3, and the settings' lora_rank is 4$"):
        load_adapter(module, state("gm_flux+lora"))


def test_a_grid_of_one_point_is_one_where_the_settings_say_so():
    module = network("flux").clone(head=DXHead(1))
    params = load_params(module, state("flux"), "dx_flux")
    same(params, {"params": drawn(network("flux"))["params"]})


def test_a_long_list_of_faults_ends():
    more = {f"x{i}": np.zeros(1) for i in range(50)}
    with pytest.raises(ValueError, match=r"and 30 more$") as error:
        load("flux", state("flux") | more)
    assert len(str(error.value).splitlines()) == 22


# --- Names ----------------------------------------------------------------------------------------

PREFIXES = [
    "module.",
    "_orig_mod.",
    "module._orig_mod.",
    "_orig_mod.module.",
    "module._orig_mod.module.",
    "_fsdp_wrapped_module.",
    "net.",  # of a LightningModule, or any other
    "model.diffusion.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_what_stands_before_all_names_is_taken_off(tmp_path, prefix):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, named(f"{prefix}{{}}".format)(state("dit")))
    same(load("dit", open_weights(path)), load("dit", state("dit")))


INNER = [
    ("transformer_blocks.0.", "transformer_blocks.0._orig_mod."),
    ("transformer_blocks.0.", "transformer_blocks.0._checkpoint_wrapped_module."),
]


@pytest.mark.parametrize(("plain", "wrapped"), INNER)
def test_wrappers_of_parts_are_taken_off(tmp_path, plain, wrapped):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, named(lambda name: name.replace(plain, wrapped))(state("dit")))
    same(load("dit", open_weights(path)), load("dit", state("dit")))


def test_the_average_of_ema_pytorch_is_taken(tmp_path):
    arrays = {n: a + 1 for n, a in state("dit").items()}
    both = named("ema_model.{}".format)(arrays) | named("online_model.{}".format)(state("dit"))
    write_safetensors(tmp_path / "x.safetensors", both | {"step": np.int64([3])})
    weights = open_weights(tmp_path / "x.safetensors")
    assert weights.selected == "ema_model"
    same(load("dit", weights), load("dit", arrays))


ADAPTER_NAMES = [
    "transformer.{}",
    "base_model.model.{}",
    "base_model.model.transformer.{}",
]


@pytest.mark.parametrize("names", ADAPTER_NAMES)
def test_adapters_under_the_names_of_pipelines_and_peft(names):
    arrays = state("gm_flux+lora")
    other = {names.format(n).replace(".lora_A.", ".lora_A.piflow."): a for n, a in arrays.items()}
    same(load("gm_flux+lora", other), load("gm_flux+lora", arrays))


# --- Files ----------------------------------------------------------------------------------------


def raw(entries, data=b"", metadata=None):
    """The bytes of a `.safetensors` file whose header is written as it is, twice-named or not."""
    pairs = [] if metadata is None else [f'"__metadata__": {json.dumps(metadata)}']
    pairs += [f'"{name}": {json.dumps(entry)}' for name, entry in entries]
    text = ("{" + ", ".join(pairs) + "}").encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


FILES = [
    (raw([("w", entry()), ("w", entry())], bytes(8)), "has w twice; write it anew"),
    (raw([("w", entry()), ("w", entry(offsets=(8, 16)))], bytes(16)), "has w twice"),
    (raw([("w", entry("F4", (4,), (0, 2)))], bytes(2)), "tensors of types that are not read: F4"),
    (raw([("w", entry(shape=(3,)))], bytes(8)), "is damaged.*w lies at 0 to 8 .*it has 12"),
    (raw([("w", entry(offsets=(4, 12)))], bytes(12)), "is damaged"),
    (raw([("w", entry(shape=(-1, -2)))], bytes(8)), "is damaged"),
    (raw([("w", entry(shape=(2.0,)))], bytes(8)), "is damaged"),
    (raw([("w", entry())], bytes(7)), "is damaged or cut short"),
    (raw([("w", entry())], bytes(9)), "is damaged"),
    (raw([("w", [])], bytes(8)), "is damaged"),
    (raw([("w", {"dtype": "F32"})], bytes(8)), "is damaged"),
    (raw([("w", entry())], bytes(8), metadata={"format": 3}), "its metadata is not text"),
    (raw([("w", entry())], bytes(8), metadata=[1]), "is damaged"),
    (raw([]), "holds no tensors by name"),
    (struct.pack("<Q", 8) + b"[1, 2]  ", "is damaged"),
    (struct.pack("<Q", 4000) + b"[" * 4000, "is damaged"),
    (struct.pack("<Q", 2**63) + b"{}", "is damaged"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    (b"", "is damaged or cut short"),
]
PICKLED = [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    (b"<!DOCTYPE html>", "PyTorch met 'Unsupported operand 60"),
    (b"\x80\x02]q\x00(X\x01\x00\x00\x00", "is damaged"),
    (b"PK\x03\x04" + bytes(60), "is damaged or cut short"),
]


@pytest.mark.parametrize(("content", "words"), FILES)
def test_files_that_are_no_weights(tmp_path, content, words):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=f"x.safetensors.*{words}"):
        open_weights(tmp_path / "x.safetensors")


@pytest.mark.parametrize(("content", "words"), PICKLED)
def test_files_of_pytorch_that_are_no_weights(tmp_path, content, words):
    pytest.importorskip("torch")
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(ValueError, match=f"x.pth.*{words}"):
        open_weights(tmp_path / "x.pth")


SHARDS = ("m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors")
FOLDERS = [
    (SHARDS, "holds shards and no index, .*fetch that too"),
    (SHARDS[:1], "holds shards and no index"),
    (("transformer/x.safetensors", "text_encoder/y.bin"), "look in transformer/, text_encoder/$"),
    (("a.safetensors", "b.safetensors"), "several weight files, name one of: a"),
    (("model_index.json",), "a directory without weight files$"),
]


@pytest.mark.parametrize(("names", "words"), FOLDERS)
def test_folders_that_are_no_weights(tmp_path, names, words):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_safetensors(tmp_path / name, {"w": np.zeros(1)})
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        open_weights(tmp_path)


def test_one_shard_is_no_network(tmp_path):
    write_safetensors(tmp_path / SHARDS[0], state("dit"))
    with pytest.raises(ValueError, match="is one of several shards: give their index, or their"):
        load("dit", open_weights(tmp_path / SHARDS[0]))


AVERAGES = [
    lambda average: {"model": {"w": average}, "ema": {"decay": 0.9, "shadow_params": [average]}},
    lambda average: {"shadow_params": [average], "collected_params": None, "w": average},
]


@pytest.mark.parametrize("content", AVERAGES)
def test_averages_without_names_are_not_passed_over(tmp_path, content):
    torch = pytest.importorskip("torch")
    torch.save(content(torch.ones(2)), tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"averages as a list without names.*select=\.\.\."):
        open_weights(tmp_path / "x.pt")


UNREAD = ["float8_e8m0fnu", "complex32", "sparse"]


@pytest.mark.parametrize("kind", UNREAD)
def test_tensors_that_numpy_has_not(tmp_path, kind):
    torch = pytest.importorskip("torch")
    plain = torch.eye(2)
    tensor = plain.to_sparse() if kind == "sparse" else plain.to(getattr(torch, kind))
    torch.save({"w": tensor}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt has tensors of types that are not read"):
        open_weights(tmp_path / "x.pt")


# --- float8 ---------------------------------------------------------------------------------------

E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_float8_in_and_out(tmp_path, dtype):
    small = np.linspace(-3, 3, 6).reshape(2, 3).astype(dtype)
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"w": small, "b": np.ones(3, np.float32)})
    read = open_weights(path)["w"]
    assert read.dtype == dtype and np.asarray(read).tobytes() == small.tobytes()
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(path, framework="np") as file:  # the format's own library
        assert file.get_slice("w").get_dtype() == {E4M3: "F8_E4M3", E5M2: "F8_E5M2"}[dtype]


def test_a_network_of_float8_has_its_numbers_in_bfloat16():
    arrays = {n: a.astype(E4M3) if a.ndim > 1 else a for n, a in state("flux").items()}
    _, params = load("flux", arrays)
    kernel = params["params"]["text_embed"]["kernel"]
    assert kernel.dtype == jnp.bfloat16
    expected = arrays["context_embedder.weight"].astype(np.float32).T
    np.testing.assert_array_equal(np.asarray(kernel, np.float32), expected)


BLOCKS = np.repeat(np.repeat([[1.0, 2.0], [3.0, 4.0]], 128, 0), 128, 1)[:130, :200]
SCALES = [
    ("l.scale_weight", np.float32(0.5), 0.5),
    ("l.weight_scale", np.float32([0.5]), 0.5),
    ("l.weight_scale", np.linspace(1, 2, 130, dtype=np.float32)[:, None], None),
    ("l.weight_scale", np.linspace(1, 2, 130, dtype=np.float32), None),
    ("l.weight_scale_inv", np.float32([[1, 2], [3, 4]]), BLOCKS),
]


@pytest.mark.parametrize(("name", "scale", "factor"), SCALES)
def test_float8_is_multiplied_by_its_scales(tmp_path, name, scale, factor):
    small = np.random.default_rng(0).normal(size=(130, 200)).astype(E4M3)
    beside = {"l.scale_input": np.float32(3), "scaled_fp8": np.zeros(0, E4M3), "b": np.ones(2)}
    write_safetensors(tmp_path / "x.safetensors", {"l.weight": small, name: scale} | beside)
    weights = open_weights(tmp_path / "x.safetensors")
    assert sorted(weights) == ["b", "l.weight"]
    factor = scale.reshape(-1, 1) if factor is None else factor
    assert weights["l.weight"].dtype == np.float32
    np.testing.assert_allclose(weights["l.weight"], small.astype(np.float64) * factor, rtol=1e-6)
    assert name in open_weights(tmp_path / "x.safetensors", "")


def test_a_scale_that_does_not_fit_is_refused(tmp_path):
    arrays = {"w": np.zeros((2, 3), E4M3), "w_scale": np.ones(3, np.float32)}
    write_safetensors(tmp_path / "x.safetensors", arrays)
    with pytest.raises(ValueError, match=r"x.safetensors: the scale of w has shape \(3,\)"):
        open_weights(tmp_path / "x.safetensors")


def test_a_dtype_that_the_format_lacks_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="w is of complex64, a type that the format lacks"):
        write_safetensors(tmp_path / "x.safetensors", {"w": np.zeros(2, np.complex64)})
    assert not list(tmp_path.iterdir())


# --- Scales of adapters ---------------------------------------------------------------------------

SETTINGS = json.loads((CASES / "01-lora-scale-in-metadata" / "settings.json").read_text())
LORA = [  # what other programs wrote, at rank 4; then by hand, at the state's own rank 3
    ({}, 1.0),
    (SETTINGS["alpha4"], 4 / 3),
    (SETTINGS["alpha16"], 16 / 3),
    (SETTINGS["rslora"], 4 / 3**0.5),
    ({"r": 3, "lora_alpha": 3}, 1.0),
    ({"transformer.r": 3, "transformer.lora_alpha": 6}, 2.0),
    ({"r": 3, "lora_alpha": 3, "alpha_pattern": {"ff.net.2": 9}}, 3.0),
    ({"r": 3, "lora_alpha": 3, "alpha_pattern": {"net.2": 9, "other": 2}}, 3.0),
]


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize(("settings", "scale"), LORA)
def test_the_scale_of_an_adapter_is_its_own(tmp_path, settings, scale, beside):
    text, arrays = json.dumps(settings), state("gm_flux+lora")
    if beside:
        (tmp_path / "adapter_config.json").write_text(text)
    metadata = {} if beside or not settings else {"lora_adapter_metadata": text}
    write_safetensors(tmp_path / "x.safetensors", arrays, metadata)
    again = export_adapter(adapted("gm_flux+lora"), load("gm_flux+lora", open_weights(tmp_path)))
    expected = arrays[f"{FF}.lora_B.weight"] * np.float64(scale)
    np.testing.assert_allclose(again[f"{FF}.lora_B.weight"], expected, rtol=1e-6)
    same(again[f"{FF}.lora_A.weight"], arrays[f"{FF}.lora_A.weight"])
    if settings.get("alpha_pattern"):  # and the others are not
        name = "time_text_embed.timestep_embedder.linear_1.lora_B.weight"
        same(again[name], arrays[name])


BAD_LORA = [
    ('{"lora_alpha": -1}', "lora_alpha must be finite and above 0, got -1"),
    ('{"lora_alpha": NaN}', "lora_alpha must be finite and above 0"),
    ('{"lora_alpha": 0}', "lora_alpha must be finite and above 0, got 0"),
    ('{"lora_alpha": "much"}', "holds no settings of an adapter"),
    ('{"lora_alpha": [1]}', "holds no settings of an adapter"),
    ('{"lora_alpha": 1, "alpha_pattern": {"(": 2}}', "holds no settings of an adapter"),
    ('{"lora_alpha": 1, "alpha_pattern": [1]}', "holds no settings of an adapter"),
    ("[1]", "holds no settings of an adapter"),
    ("{", "holds no settings of an adapter"),
    ("[" * 100_000, "holds no settings of an adapter"),
]


@pytest.mark.parametrize(("text", "words"), BAD_LORA)
def test_damaged_settings_of_an_adapter(tmp_path, text, words):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, state("gm_flux+lora"), {"lora_adapter_metadata": text})
    with pytest.raises(ValueError, match=f"^lora_adapter_metadata.*{words}"):
        load("gm_flux+lora", open_weights(path))


# --- Settings inside files ------------------------------------------------------------------------


@functools.cache
def student(kind="dit"):
    """Settings, spec, and the arrays of a file, of a small student."""
    config = parse(tiny.get_config() if kind == "dit" else tiny_text.get_config(kind))
    data = DataShape(name="digits", sample_size=8, channels=1, num_classes=10)
    if kind != "dit":
        data = DataShape(name="prompts", channels=1, text_features=5, pooled_features=3)
    module = networks.student_network(config.model, config.policy, data)
    params = drawn(module.module)
    spec = json.loads(json.dumps(specs.student_spec(config, data)))
    arrays = (
        to_torch_state(module.module, params)
        if kind == "dit"
        else export_adapter(module.module, split(params)[1])
    )
    return config, data, spec, arrays


def written(path, spec, kind="dit"):
    text = spec if isinstance(spec, str) else json.dumps(spec)
    write_safetensors(path, student(kind)[3], {"piflow_jax": text})
    return path


WRONG = [
    ("kind", "teacher", "this holds a teacher, not a student"),
    ("kind", None, "this holds a None"),
    ("model.hidden", 0, "config.model.dit.hidden must be at least 4"),
    ("model.hidden", "64", "config.model.dit.hidden must be of type int"),
    ("model.hidden", True, "config.model.dit.hidden must be of type int"),
    ("model.hidden", 18, "config.model.dit.hidden must be divisible by 4"),
    ("model.hidden", 2 * 32, "hidden: given 64, the state has"),
    ("model.num_heads", 0, "config.model.dit.num_heads must be at least 1"),
    ("model.num_heads", [2], "config.model.dit.num_heads must be of type int"),
    ("model.depth", -1, "config.model.dit.depth must be at least 1"),
    ("model.patch_size", 3, "model.patch_size .3. must divide data.sample_size .8."),
    ("model.time_scale", 0, "config.model.dit.time_scale must be above 0"),
    ("model.time_scale", float("nan"), "config.model.dit.time_scale must be finite"),
    ("model.mlp_ratio", float("inf"), "config.model.dit.mlp_ratio must be finite"),
    ("model.network", [], r"model.network = \[\] is not one of"),
    ("model.network", 3, "model.network = 3 is not one of"),
    ("data.sample_size", 10**7, "data.sample_size must be at most 4,096"),
    ("model.network", "unet", "model.network = 'unet' is not one of"),
    ("model.width", 4, "unknown key config.model.dit.width"),
    ("policy.kind", "gmm", "config.policy.kind must be one of"),
    ("policy.num_components", 0, "config.policy.num_components must be at least 1"),
    ("policy.num_components", 3.5, "config.policy.num_components must be of type int"),
    ("policy.logstd_hidden", {}, "config.policy.logstd_hidden must be of type int"),
    ("train.nfe", 0, "config.train.nfe must be at least 1"),
    ("train.nfe", 10**7, "config.train.nfe must be"),
    ("train.nfe", "1", "config.train.nfe must be of type int"),
    ("train.shift", -1.0, "config.train.shift must be above 0"),
    ("train.shift", None, "config.train.shift must be of type float"),
    ("train.shift", 1e300, "config.train.shift must be"),
    ("train.final_step_size_scale", 0, "config.train.final_step_size_scale must be above 0"),
    ("train.total_substeps", 0, "config.train.total_substeps must be at least 1"),
    ("data.channels", 0, "data.channels must be at least 1"),
    ("data.channels", "3", "data.channels must be of type int"),
    ("data.sample_size", 0, "data.sample_size must be at least 1, got 0"),
    ("data.sample_size", -8, "data.sample_size must be at least 0"),
    ("data.num_classes", 1.5, "data.num_classes must be of type int"),
    ("data.latent_shift", "x", "data.latent_shift must be of type float"),
    ("data.latent_shift", float("-inf"), "data.latent_shift must be finite"),
    ("data.latent_scale", 0.0, "data.latent_scale must be above 0"),
    ("data.vae", 3, "data.vae must be of type str"),
    ("data.height", 3, "unknown key data.height"),
    ("sampling.nfe", 3, "unknown key sampling.nfe; this version reads model, policy, train, data"),
    ("hidden", 3, "unknown key hidden"),
]


@pytest.mark.parametrize(("key", "value", "words"), WRONG)
def test_settings_in_a_file_go_through_the_schema(tmp_path, key, value, words):
    spec = student()[2] | {key: value}
    path = written(tmp_path / "x.safetensors", spec)
    with pytest.raises(ValueError, match=f"^{path}: {words}"):
        piflow_jax.load(path)


TEXT = [
    ("model.rope_axes", [4, 2], "config.model.flux.rope_axes must be three even numbers"),
    ("model.rope_axes", 8, "config.model.flux.rope_axes must be a tuple"),
    ("model.lora_rank", 0, "config.model.flux.lora_rank must be at least 1"),
    ("model.lora_rank", 4, "the rank is 3, and the settings' lora_rank is 4"),
    ("model.distilled_guidance", -1, "config.model.flux.distilled_guidance must be at least 0"),
    ("model.time_dtype", "float16", "config.model.flux.time_dtype must be one of"),
    ("data.text_features", -5, "data.text_features must be at least 0"),
]


@pytest.mark.parametrize(("key", "value", "words"), TEXT)
def test_settings_of_a_student_that_reads_text(tmp_path, key, value, words):
    path = written(tmp_path / "x.safetensors", student("flux")[2] | {key: value}, "flux")
    with pytest.raises(ValueError, match=f"^{path}: {words}"):
        piflow_jax.load(path, teacher=path)


@pytest.mark.parametrize("text", ["{", "[]]", "3", "null", '"student"', "[" * 100_000, "[1, 2]"])
def test_settings_that_are_no_settings(tmp_path, text):
    path = written(tmp_path / "x.safetensors", text)
    with pytest.raises(ValueError, match=f"^{path}: the settings in its metadata are damaged"):
        piflow_jax.load(path)


@pytest.mark.parametrize("key", sorted(student()[2]))
def test_a_setting_that_is_missing_is_not_made_up(tmp_path, key):
    spec = {name: value for name, value in student()[2].items() if name != key}
    path = written(tmp_path / "x.safetensors", spec)
    if key == "data.vae":  # what older files lack, and is not known then
        assert piflow_jax.load(path).settings.data.vae == ""
        return
    with pytest.raises(ValueError, match=f"^{path}: .*{key.rpartition('.')[2]}|holds a None"):
        piflow_jax.load(path)


def test_an_older_student_saw_its_times_as_they_are(tmp_path):
    spec = {name: v for name, v in student("flux")[2].items() if name != "model.time_dtype"}
    assert specs.student_settings(spec).model.own.time_dtype == "float32"


OFFICIAL = [
    ("{", "its policy_config is damaged"),
    ("[" * 100_000, "its policy_config is damaged"),
    ('{"type": "DX"}', "its policy_config has the type 'DX', the settings make it 'GMFlow'"),
    ('{"type": "ArcFlow"}', "its policy_config has the type 'ArcFlow'"),
]


@pytest.mark.parametrize(("text", "words"), OFFICIAL)
def test_what_an_official_file_says_of_its_policy(tmp_path, text, words):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, student()[3], {"policy_config": text})
    with pytest.raises(ValueError, match=f"^{path}: {words}"):
        piflow_jax.load(path, config=tiny.get_config())


GRIDS = [
    ({"type": "DX", "segment_size": 1 / 3.5, "shift": 3.2, "mode": "grid"}, None),
    ({"type": "DX", "shift": 3.2}, None),
    ({"type": "DX", "segment_size": 1.0}, "has the segment_size 1.0, the settings make it 0.28"),
    ({"type": "DX", "shift": 1.0}, "has the shift 1.0, the settings make it 3.2"),
    ({"type": "DX", "shift": "x"}, "has the shift 'x'"),
    (
        {"type": "DX", "mode": "polynomial"},
        "has the mode 'polynomial', the settings make it 'grid'",
    ),
    ({"type": "GMFlow"}, "has the type 'GMFlow', the settings make it 'DX'"),
]


@pytest.mark.parametrize(("said", "words"), GRIDS)
def test_what_an_official_file_says_of_its_grid(said, words):
    config = parse(flux_config.get_config("dx_4nfe"))
    arguments = json.dumps(said), config.policy, config.train
    if words is None:
        return specs.check_policy_config(*arguments)
    with pytest.raises(ValueError, match=words):
        specs.check_policy_config(*arguments)


# --- Where files are given ------------------------------------------------------------------------


def test_the_folder_that_export_wrote_is_loaded(tmp_path):
    config, data, spec, arrays = student("flux")
    base = to_torch_state(
        networks.teacher_network(config.model, data).module, teacher_params("flux")
    )
    (tmp_path / "base").mkdir()
    (tmp_path / "adapter").mkdir()
    write_safetensors(tmp_path / "base" / "diffusion_pytorch_model.safetensors", base)
    written(tmp_path / "adapter" / "diffusion_pytorch_model.safetensors", spec, "flux")
    (tmp_path / "adapter" / "config.json").write_text("{}")
    loaded = piflow_jax.load(tmp_path / "adapter", teacher=tmp_path / "base")
    again = export_adapter(loaded.network.module, split(loaded.params)[1])
    same(again, arrays)


@functools.cache
def teacher_params(kind):
    config, data = student(kind)[:2]
    return drawn(networks.teacher_network(config.model, data).module)


LOADED = [
    (lambda s: {n: kohya(n) for n in s}, "LoRA matrices under kohya's names"),
    (lambda s: {n: comfy(n) for n in s}, "LoRA matrices under ComfyUI's names"),
]


@pytest.mark.parametrize(("names", "words"), LOADED)
def test_foreign_adapters_are_named_without_any_configuration(tmp_path, names, words):
    arrays = student("flux")[3]
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {names(arrays)[n]: a for n, a in arrays.items()})
    with pytest.raises(ValueError, match=words):
        piflow_jax.load(path)


def digits(**changes):
    config = tiny.get_config()
    config.update_from_flattened_dict(changes)
    return config


NAN = {"proj_out_means.bias": lambda a: a * np.nan}
COMMANDS = [
    ({}, NAN, "numbers of proj_out_means.bias are not finite"),
    ({"train.shift": 3.0}, {}, "train.shift: the checkpoint has 1.0, asked for 3.0"),
    ({"policy.num_components": 7}, {}, "policy.num_components: the checkpoint has"),
    ({"policy.kind": "dx", "train.gm_dropout": 0.0}, {}, "policy.kind: the checkpoint has 'gm'"),
]


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize(("settings", "damage", "words"), COMMANDS)
def test_the_command_line_names_key_file_and_cause(
    tmp_path, capsys, settings, damage, words, folder
):
    arrays, spec = dict(student()[3]), student()[2]
    arrays |= {name: change(arrays[name]) for name, change in damage.items()}
    path = tmp_path / "weights" / "x.safetensors"
    path.parent.mkdir()
    write_safetensors(path, arrays, {"piflow_jax": json.dumps(spec)})
    given = str(path.parent if folder else path)
    status = run("sample", digits(**settings | {"evaluation.weights": given}), tmp_path / "run")
    said = capsys.readouterr().err
    assert status == 2 and f"error: config.evaluation.weights = {given!r}: " in said, said
    assert words in said


def test_the_command_line_takes_the_folder(tmp_path):
    config, data, spec, _ = student()
    written(tmp_path / "x.safetensors", spec)
    config = parse(digits(**{"evaluation.weights": str(tmp_path)}))
    module = networks.student_network(config.model, config.policy, data).module
    same(load_student(config, data, tmp_path / "run"), drawn(module))


TEACHERS = [
    (lambda arrays: arrays | {"proj_out_2.bias": arrays["proj_out_2.bias"] * np.nan}, "not finite"),
    (lambda arrays: student()[3], "weights of a gm_dit, a student that predicts a mixture"),
]


@pytest.mark.parametrize(("change", "words"), TEACHERS)
def test_a_teacher_is_checked_before_anything_is_compiled(tmp_path, capsys, change, words):
    config, data = student()[:2]
    module = networks.teacher_network(config.model, data).module
    path = tmp_path / "x.safetensors"
    write_safetensors(path, change(to_torch_state(module, teacher_params("dit"))))
    status = run("train", digits(**{"teacher.weights": str(path)}), tmp_path / "run")
    said = capsys.readouterr().err
    assert status == 2 and f"error: config.teacher.weights = '{path}': " in said, said
    assert words in said


# --- Times ----------------------------------------------------------------------------------------


@pytest.fixture
def miniature(monkeypatch):
    """The settings of a released student at the size of the recorded cases."""

    def miniature(kind):
        config = {"flux": flux_config, "qwen_image": qwen_config}[kind].get_config()
        sizes = {"hidden": 48, "num_heads": 3, "rope_axes": (4, 6, 6), "lora_rank": 4}
        depth = {"depth": 2, "single_depth": 2} if kind == "flux" else {"depth": 3}
        config.model[kind].update(sizes | depth)
        config.policy.logstd_hidden = 24
        pooled = 32 if kind == "flux" else 0
        latents = DataShape(
            name="prompts", sample_size=128, channels=16, text_features=64, pooled_features=pooled
        )
        row = dataclasses.replace(networks.NETWORKS[kind], official=latents)
        monkeypatch.setitem(networks.NETWORKS, kind, row)
        return config

    return miniature


def test_released_adapters_see_times_in_bfloat16(miniature):
    case = CASES / "02-bf16-times-of-released-adapters"
    recorded = np.load(case / "official.npz")
    config = miniature("flux")
    student = piflow_jax.load(case / "adapter", config, "bfloat16", case / "base")
    told = {"text": recorded["text"], "text_length": np.int32([5, 5]), "pooled": recorded["pooled"]}
    options = {"nfe": 4, "substeps": 125, "solver": "euler", "temperature": 0.3}
    x = student.sample(0, told, size=(6, 10), noise=recorded["noise"], **options)
    # Of a standard deviation of 2.25; what is left is the arithmetic of bfloat16. It was 1.22.
    assert np.sqrt(np.mean((np.asarray(x) - recorded["x"]) ** 2)) < 0.12
    exact = piflow_jax.load(case / "adapter", config, "float32", case / "base")
    assert exact.network.module.time_dtype == jnp.float32  # where it agrees with the release


def test_qwen_image_rounds_times_and_no_frequencies(miniature):
    case = CASES / "03-qwen-bf16-frequencies"
    recorded, features = np.load(case / "means.npz"), np.load(case / "features.npz")
    rounded = features["t"].astype(ml_dtypes.bfloat16).astype(np.float32)
    ours = time_features(jnp.asarray(rounded), scale=1000.0)
    np.testing.assert_allclose(ours, features["bf16"], atol=2e-4)
    student = piflow_jax.load(case / "adapter", miniature("qwen_image"), "bfloat16", case / "base")
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(2, 6, 10, 16)).astype(np.float32)[:1]
    text = rng.normal(size=(2, 5, 64)).astype(np.float32)[:1]
    told = student.network.conditioning({"text": text, "text_length": np.int32([5])})
    apply = jax.jit(lambda t: student.network.module.apply(student.params, noise, t, **told).means)
    for t in (1.0, 0.889, 0.706, 0.348):
        means = np.asarray(apply(jnp.full(1, t)))[0].reshape(3, 2, 5, 2, 8, 16)
        means = means.transpose(0, 2, 4, 5, 1, 3).reshape(recorded[f"{t}_bfloat16"].shape)
        difference = means - recorded[f"{t}_bfloat16"]
        assert np.sqrt(np.mean(difference**2)) < 0.02 * recorded[f"{t}_bfloat16"].std(), t


ROUNDED = [("flux", "gm_4nfe"), ("flux", "datafree"), ("qwen_image", "dx_4nfe")]


@pytest.mark.parametrize(("kind", "variant"), ROUNDED)
def test_teacher_and_student_round_alike_where_they_compute_in_bfloat16(kind, variant):
    config = {"flux": flux_config, "qwen_image": qwen_config}[kind].get_config(variant)
    data = networks.NETWORKS[kind].official
    for dtype in ("bfloat16", "float32"):
        config.model.dtype = dtype
        settings = parse(config)
        teacher = networks.teacher_network(settings.model, data)
        student = networks.student_network(settings.model, settings.policy, data)
        assert teacher.module.time_dtype == student.module.time_dtype == jnp.dtype(dtype)
        assert specs.student_spec(settings, data)["model.time_dtype"] == "bfloat16"
