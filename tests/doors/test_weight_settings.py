"""Settings inside weight files, and where the files are given: what is refused in which words.

A case is one line: a setting and the words of the answer, or the right value.
"""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import piflow_jax
from configs import flux as flux_config
from configs import imagenet as imagenet_config
from configs import qwen_image as qwen_config
from piflow_jax.config import parse
from piflow_jax.convert import (
    export_adapter,
    open_weights,
    to_torch_state,
    write_safetensors,
)
from piflow_jax.loading.runs import data_shape, load_student, load_system
from piflow_jax.models.layers import time_features
from piflow_jax.models.lora import split
from piflow_jax.models.vae import AutoencoderKL
from piflow_jax.modes import run
from piflow_jax.modes.autoencoder import load_autoencoder, pixel_sampler
from piflow_jax.systems import networks
from piflow_jax.systems import spec as specs
from piflow_jax.systems.assembly import Systems
from piflow_jax.systems.shapes import DataShape
from tests import tiny, tiny_text
from tests.weights import FF, adapted, comfy, drawn, kohya, load, same, state

CASES = Path(__file__).parents[1] / "cases"


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
    ({"train.shift": 3.0}, {}, "config.train.shift: the checkpoint has 1.0, asked for 3.0"),
    ({"model.dit.hidden": 32}, {}, "config.model.dit.hidden: the checkpoint has 16, asked for 32"),
    ({"policy.num_components": 7}, {}, "config.policy.num_components: the checkpoint has"),
    (
        {"policy.kind": "dx", "train.gm_dropout": 0.0},
        {},
        "config.policy.kind: the checkpoint has 'gm'",
    ),
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


# --- Weights for the latents of another autoencoder -----------------------------------------------


@pytest.mark.slow
def test_official_weights_of_va_vae_are_sampled_through_its_decoder(tmp_path):
    """A REPA-E teacher of one narrow block: its pixels, from its noise, statistics and weights."""
    config = imagenet_config.get_config("gm_repae")
    config.model.dit.update({"hidden": 16, "num_heads": 2, "depth": 1})
    config.model.update({"dtype": "float32", "remat": "none"})
    config.evaluation.update({"system": "teacher", "grid_classes": (7,), "grid_samples": 1})
    config.evaluation.teacher_steps = (1,)
    teacher = networks.teacher_network(parse(config).model, networks.official_data(parse(config)))
    params = {"params": jax.tree.map(lambda a: 0.1 * a, drawn(teacher.module)["params"])}
    arrays = to_torch_state(teacher.module, params)
    assert arrays["pos_embed.proj.weight"].shape == (16, 32, 1, 1)
    assert arrays["proj_out_2.weight"].shape == (32, 16)
    write_safetensors(tmp_path / "teacher.safetensors", arrays)
    vae = AutoencoderKL(
        channels=(4,) * 5,
        latent_channels=32,
        layers_per_block=1,
        norm_groups=2,
        attention_levels=(4,),
        latent_scale=tuple(1 / (1 + i % 3) for i in range(32)),
        latent_shift=tuple(0.1 * i for i in range(32)),
    )
    vae_params = jax.jit(vae.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    (tmp_path / "vae").mkdir()
    write_safetensors(tmp_path / "vae" / "x.safetensors", to_torch_state(vae, vae_params))
    settings = {
        "norm_num_groups": 2,
        "latents_mean": vae.latent_shift,
        "latents_std": [1 / s for s in vae.latent_scale],
    }
    (tmp_path / "vae" / "config.json").write_text(json.dumps(settings))
    config.teacher.weights = str(tmp_path / "teacher.safetensors")
    config.data.vae = str(tmp_path / "vae")
    config = parse(config)
    data = data_shape(config, tmp_path)
    autoencoder = load_autoencoder(config, data)
    sampler = pixel_sampler(Systems.of(config, data).sampler(), autoencoder.module, data)
    both = (load_system(config, data, tmp_path), autoencoder.params)
    noise = np.random.default_rng(0).normal(size=(1, *data.shape)).astype(np.float32)
    labels = np.int32([7])
    pixels = sampler(both, noise, labels)
    # One Euler step from t = 1, where guidance is outside of its interval.
    x_0 = noise - np.asarray(teacher.apply(params, noise, jnp.ones(1), labels))
    raw = x_0 * np.float32(settings["latents_std"]) + np.float32(settings["latents_mean"])
    assert pixels.shape == (1, 256, 256, 3)
    np.testing.assert_allclose(pixels, vae.apply(vae_params, raw, method="decode"), atol=1e-3)
