"""LoRA files where a run or a notebook names them: what they change, and what is refused."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import piflow_jax
from piflow_jax.arguments import lora_strengths
from piflow_jax.config import ConfigError, parse
from piflow_jax.convert import export_adapter, to_torch_state, write_safetensors
from piflow_jax.loading.runs import load_student, load_system, load_teacher
from piflow_jax.models.lora import split
from piflow_jax.systems import networks
from piflow_jax.systems.settings import check_choices
from piflow_jax.systems.shapes import DataShape
from tests import tiny_text
from tests.weights import drawn

DATA = DataShape(
    name="prompts",
    sample_size=4,
    channels=1,
    text_features=5,
    pooled_features=3,
    released=True,
)
LAYER = "transformer_blocks.0.attn.to_q"


def settings(folder, **changes):
    config = tiny_text.get_config("flux")
    config.data.name = "prompts"
    config.teacher.weights = str(folder / "base.safetensors")
    config.evaluation.weights = str(folder / "student.safetensors")
    config.update_from_flattened_dict({key.replace("__", "."): v for key, v in changes.items()})
    return config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A teacher, a student's adapter and two LoRA files, all of official names."""
    folder = tmp_path_factory.mktemp("loras")
    config = parse(settings(folder))
    teacher = networks.teacher_network(config.model, DATA).module
    student = networks.student_network(config.model, config.policy, DATA).module
    base = to_torch_state(teacher, drawn(teacher))
    write_safetensors(folder / "base.safetensors", base)
    write_safetensors(
        folder / "student.safetensors", export_adapter(student, split(drawn(student))[1])
    )
    rng = np.random.default_rng(1)
    outs, ins = base[f"{LAYER}.weight"].shape
    for name in ("one", "other"):
        down, up = (rng.normal(size=size).astype(np.float32) for size in ((2, ins), (outs, 2)))
        arrays = {f"{LAYER}.lora_A.weight": down, f"{LAYER}.lora_B.weight": up}
        write_safetensors(folder / f"{name}.safetensors", arrays)
        base[name] = up @ down
    return folder, base


def queries(params):
    """`W[out, in]` of the layer in a network's parameters."""
    kernel = np.asarray(params["params"]["double_blocks"]["image_qkv"]["kernel"], np.float32)[0]
    return kernel[:, 0].T


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_teacher_is_its_base_and_its_lora(folder, tmp_path):
    path, base = folder
    one, other = (str(path / f"{name}.safetensors") for name in ("one", "other"))
    config = parse(settings(path, teacher__loras=(one,), evaluation__loras=(f"{other}@-0.5",)))
    plain = base[f"{LAYER}.weight"]
    trained_on = load_teacher(config, DATA, tmp_path)
    close(queries(trained_on), plain + base["one"])
    both = plain + base["one"] - 0.5 * base["other"]
    for load, system in ((load_student, "student"), (load_system, "teacher")):
        asked = dataclasses.replace(config.evaluation, system=system)
        params = load(dataclasses.replace(config, evaluation=asked), DATA, tmp_path)
        close(queries(params), both)
        if system == "student":  # its own adapters are as they were
            own = jax.tree.map(np.asarray, split(params)[1])
            alone = load_student(parse(settings(path)), DATA, tmp_path)
            jax.tree.map(np.testing.assert_array_equal, own, split(alone)[1])


def test_a_notebook_gives_strengths_by_path(folder, monkeypatch):
    path, base = folder
    monkeypatch.setitem(
        networks.NETWORKS,
        "flux",
        dataclasses.replace(networks.NETWORKS["flux"], official=DATA),
    )
    student, teacher = path / "student.safetensors", path / "base.safetensors"
    loras = {path / "one.safetensors": 0.25, path / "other.safetensors": 2}
    found = piflow_jax.load(student, settings(path), teacher=teacher, loras=loras)
    close(queries(found.params), base[f"{LAYER}.weight"] + 0.25 * base["one"] + 2 * base["other"])
    found = piflow_jax.load(
        student, settings(path), teacher=teacher, loras=[path / "one.safetensors"]
    )
    close(queries(found.params), base[f"{LAYER}.weight"] + base["one"])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        piflow_jax.load(student, settings(path), teacher=teacher, loras=["nowhere.safetensors"])
    with pytest.raises(ValueError, match="what has no place in the network"):
        piflow_jax.load(student, settings(path), teacher=teacher, loras=[student])


def test_students_without_adapters_take_no_lora():
    with pytest.raises(ValueError, match="added to the official weights of a student's teacher"):
        piflow_jax.load("fashion_mnist", loras={"x.safetensors": 1.0})


REFUSED = [
    (
        {"teacher.loras": ("x",), "teacher.weights": ""},
        "config.teacher.loras must be empty",
    ),
    (
        {"evaluation.loras": ("x",), "teacher.weights": ""},
        "config.evaluation.loras must be empty",
    ),
    ({"evaluation.loras": ("x@inf",)}, "config.evaluation.loras: the strength of x must be finite"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED)
def test_what_is_no_lora_is_refused_by_its_key(folder, changes, words):
    config = settings(folder[0], **{k.replace(".", "__"): v for k, v in changes.items()})
    with pytest.raises(ConfigError, match=words):
        check_choices(parse(config, None))


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        (("a", "b@0.5"), {"a": 1.0, "b": 0.5}),
        (("gs://x@y/z",), {"gs://x@y/z": 1.0}),
        (("a@y@-2",), {"a@y": -2.0}),
        (("a", "a@0.5"), {"a": 1.5}),
        ({"a@1": 3}, {"a@1": 3}),
        ("ab.safetensors@2", {"ab.safetensors": 2.0}),
        (Path("ab"), {"ab": 1.0}),
    ],
)
def test_an_entry_is_a_path_and_a_strength(entries, expected):
    assert lora_strengths(entries) == expected


@pytest.mark.parametrize("strength", ["1", None, float("nan"), jnp.ones(2)])
def test_strengths_are_numbers(strength):
    with pytest.raises(ValueError, match="the strength of a must be"):
        lora_strengths({"a": strength})
