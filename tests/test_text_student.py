"""Students that read text in notebooks: what they are told, their memory, and refusals."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import piflow_jax
from piflow_jax.config import parse
from piflow_jax.convert import export_adapter, to_torch_state, write_safetensors
from piflow_jax.distillation.stages import flat_settings
from piflow_jax.flow.rollout import rollout
from piflow_jax.flow.schedule import TimeWarp
from piflow_jax.models.lora import fuse, split
from piflow_jax.student import Student
from piflow_jax.systems.networks import student_network, teacher_network
from piflow_jax.systems.shapes import DataShape
from piflow_jax.systems.spec import StudentSettings, student_spec, teacher_spec
from tests import tiny_text
from tests.saved_runs import save_stage
from tests.students import moved

DATA = DataShape(name="prompts", channels=1, text_features=5, pooled_features=3)


@pytest.fixture(scope="module")
def student():
    config = parse(tiny_text.get_config("flux"))
    settings = StudentSettings(
        model=config.model, policy=config.policy, train=config.train, data=DATA
    )
    module = student_network(config.model, config.policy, DATA)
    params = moved(jax.jit(lambda: module.init(jax.random.key(0)))())
    return Student(module, params, settings)


def embedded(number, length=4):
    rng = np.random.default_rng(0)
    text = rng.normal(size=(3, length, 5)).astype(np.float32)[:number]
    pooled = rng.normal(size=(3, 3)).astype(np.float32)[:number]
    return {"text": text, "text_length": np.full(number, length, np.int32), "pooled": pooled}


@pytest.mark.slow
def test_a_prompt_gets_the_same_sample_in_any_company(student):
    three = student.sample(1, embedded(3), size=(4, 8), substeps=4)
    assert three.shape == (3, 4, 8, 1) and three.dtype == jnp.float32
    one = student.sample(1, embedded(1), size=(4, 8), substeps=4)
    np.testing.assert_allclose(one[0], three[0], atol=1e-5)
    # By the pieces: a student of two segments is two policies, one after the other.
    key, told = jax.random.fold_in(jax.random.key(1), 0), embedded(1)
    x = jax.random.normal(key, (1, 4, 8, 1))
    warp, tau = TimeWarp(3.2), jnp.ones(1)
    for end in (1 - 1 / 1.5, 0.0):
        policy = student.policy(x, warp.warp(tau), told)
        # Of the last segment's 1.33 substeps the release takes two.
        ends = jnp.full(1, end)
        x, _ = rollout(policy, x, tau, ends, warp, 4, solver="multistep", rounding="ceil")
        tau = jnp.full(1, end)
    np.testing.assert_allclose(one, x, atol=1e-4)


def test_what_is_no_embedded_prompt_is_refused(student):
    with pytest.raises(ValueError, match=r"reads text: pass embedded prompts.*text_length, pooled"):
        student.sample(0, [1, 2], size=(4, 8))
    with pytest.raises(ValueError, match=r"reads text"):
        student.sample(0, {"text": embedded(1)["text"]}, size=(4, 8))
    with pytest.raises(ValueError, match=r"no size of its own: pass size=\(H, W\)"):
        student.sample(0, embedded(1))
    wrong = embedded(2) | {"pooled": embedded(1)["pooled"]}
    with pytest.raises(ValueError, match=r"text\[N, L, 5\].*'pooled': \[1, 3\]"):
        student.sample(0, wrong, size=(4, 8))


@pytest.fixture(scope="module")
def bfloat16_run(tmp_path_factory):
    """A run whose base is bfloat16, as FLUX.1's, with its teacher, and files of the same."""
    config = tiny_text.get_config("flux")
    config.model.flux.base_dtype = "bfloat16"
    config = parse(config)
    teacher = teacher_network(config.model, DATA)
    student = student_network(config.model, config.policy, DATA)
    base, whole = (jax.jit(lambda m=m: m.init(jax.random.key(0)))() for m in (teacher, student))
    workdir = tmp_path_factory.mktemp("run")
    trained = student.trained(whole)
    parts = {
        "teacher": (base, teacher_spec(config, DATA)),
        "student": (trained, student_spec(config, DATA)),
    }
    for stage, (params, spec) in parts.items():
        # As `distillation/stages.py` keeps settings.
        save_stage(workdir, stage, params, spec, flat_settings({"model": config.model}))
    metadata = {"piflow_jax": json.dumps(student_spec(config, DATA))}
    write_safetensors(workdir / "teacher.safetensors", to_torch_state(teacher.module, base))
    write_safetensors(
        workdir / "adapter.safetensors", export_adapter(student.module, trained), metadata
    )
    merged = fuse(student.with_base(trained, base))
    state = to_torch_state(student.module.clone(lora=None), merged)
    write_safetensors(workdir / "student.safetensors", state, metadata)
    return workdir


@pytest.mark.parametrize(
    ("path", "teacher"),
    [
        (".", None),
        (".", "teacher.safetensors"),
        ("adapter.safetensors", "teacher.safetensors"),
        ("adapter.safetensors", "."),
        ("student.safetensors", None),
    ],
)
def test_a_base_is_loaded_in_the_memory_that_it_was_trained_in(bfloat16_run, path, teacher):
    teacher = teacher and bfloat16_run / teacher
    student = piflow_jax.load(bfloat16_run / path, teacher=teacher)
    base, trained = split(student.params)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(base)) == 2 * sum(
        leaf.size for leaf in jax.tree.leaves(base)
    )
    assert {leaf.dtype.name for leaf in jax.tree.leaves(trained)} == {"float32"}
    assert (
        student.settings.model.own.base_dtype
        == student.network.module.param_dtype.name
        == "bfloat16"
    )
    assert student.network.module.dtype == jnp.float32  # of the computation, as asked for
