"""Weight files, adapters and the settings inside files: what is read rightly, what is refused.

A case is one line: what is done to a small official state or file, and words of the answer or the
right value. Files of other programs are in `tests/cases`, with what is right and why.
"""

import json
import struct

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from piflow_jax.convert import (
    holds_weights,
    load_adapter,
    load_params,
    open_autoencoder,
    open_weights,
    write_safetensors,
)
from piflow_jax.models.flux import FLUX_TARGETS
from piflow_jax.models.heads import DXHead
from piflow_jax.models.lora import LoRA
from tests.weights import FF, adapted, comfy, drawn, kohya, load, network, same, state

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
    ("flux2", of("flux"), "^these are weights of a flux, not of a flux2"),
    ("flux", of("qwen_image"), "^these are weights of a qwen_image, not of a flux"),
    ("gm_qwen_image", of("gm_flux"), "^these are weights of a flux, not of a gm_qwen_image"),
    ("flux", of("dit"), "^these are weights of a dit, not of a flux"),
    ("dit", of("flux"), "^these are weights of a flux, not of a dit"),
    (
        "flux",
        lambda _: FOREIGN["bfl"],
        "FLUX.1 or FLUX.2 under its first names.* folder transformer",
    ),
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


def test_hidden_files_are_no_weights(tmp_path):
    """A write that was killed leaves one, and macOS puts one beside each file."""
    write_safetensors(tmp_path / "a.safetensors", {"w": np.ones(1)})
    for name in (".a.0f3a.safetensors", "._a.safetensors"):
        (tmp_path / name).write_bytes(b"half a file")
    assert list(open_weights(tmp_path)) == ["w"]
    (tmp_path / "a.safetensors").unlink()
    assert not holds_weights(tmp_path)


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
