"""Adapters that travel: ours in the pipelines of the pi-Flow release, the release's in ours.

They run where `PIFLOW_REFERENCE` names a checkout of github.com/Lakonik/LakonLab, with torch,
diffusers (0.37 for all of them), peft and accelerate installed; mmcv need not be.
"""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import piflow_jax
from configs import flux as flux_config
from configs import flux2 as flux2_config
from configs import qwen_image as qwen_config
from piflow_jax.config import parse
from piflow_jax.convert import adapter_config, export_adapter, to_torch_state, write_safetensors
from piflow_jax.models.heads import DXHead
from piflow_jax.models.lora import split
from piflow_jax.systems import networks
from piflow_jax.systems.policies import POLICIES
from piflow_jax.systems.shapes import DataShape
from piflow_jax.systems.spec import student_spec

CASES = Path(__file__).parents[1] / "cases"
CHECKOUT = os.environ.get("PIFLOW_REFERENCE", "")
NEEDED = [
    name
    for name in ("torch", "diffusers", "peft", "accelerate")
    if importlib.util.find_spec(name) is None
]
pytestmark = [
    pytest.mark.skipif(
        not CHECKOUT, reason="PIFLOW_REFERENCE names no checkout of github.com/Lakonik/LakonLab"
    ),
    pytest.mark.skipif(bool(NEEDED), reason=f"the reference needs {', '.join(NEEDED)}"),
]

# 125 substeps are as many in each segment whether they are rounded or counted up.
SAMPLING = {"nfe": 4, "substeps": 125}
CONFIGS = {"flux": flux_config, "qwen_image": qwen_config, "flux2": flux2_config}


def settings(kind, variant="gm_4nfe"):
    """Released settings, of a network of 48 features; and what its data look like."""
    config = CONFIGS[kind].get_config(variant)
    sizes = {"hidden": 48, "num_heads": 3, "rope_axes": (4, 6, 6), "lora_rank": 4}
    depth = {"depth": 3} if kind == "qwen_image" else {"depth": 2, "single_depth": 2}
    depth |= {"rope_axes": (4, 4, 4, 4), "text_features": 64} if kind == "flux2" else {}
    config.model[kind].update(sizes | depth | {"base_dtype": "float32"})
    config.policy.logstd_hidden = 24
    data = DataShape(
        name="prompts",
        channels=16,
        sample_size=128,
        text_features=64,
        pooled_features=32 if kind == "flux" else 0,
    )
    return config, data


def drawn(module, seed):
    shapes = jax.eval_shape(module.init, jax.random.key(0), *module.example())
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: 0.15 * rng.normal(size=a.shape).astype(np.float32), shapes)


def write(folder, state, config, metadata=None):
    folder.mkdir()
    write_safetensors(folder / "diffusion_pytorch_model.safetensors", state, metadata)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def ours(folder, kind, variant):
    """A teacher and a student of ours, as `--mode=export` writes them."""
    config, data = settings(kind, variant)
    config = parse(config)
    teacher = networks.teacher_network(config.model, data).module
    student = networks.student_network(config.model, config.policy, data).module
    spec = student_spec(config, data)
    policy = POLICIES[config.policy.kind].official(config.policy, config.train)
    metadata = {"piflow_jax": json.dumps(spec), "policy_config": json.dumps(policy)}
    # The configuration of a plain network is that of a grid of one point.
    base_config = adapter_config(teacher.clone(head=DXHead(1)))
    base = write(folder / "base", to_torch_state(teacher, drawn(teacher, 0)), base_config)
    trained = split(drawn(student, 1))[1]
    adapter = export_adapter(student, trained)
    return base, write(folder / "adapter", adapter, adapter_config(student), metadata)


def inputs(kind):
    rng = np.random.default_rng(2)
    shapes = {"noise": (2, 6, 10, 16), "text": (2, 5, 64)} | (
        {"pooled": (2, 32)} if kind == "flux" else {}
    )
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    # FLUX sees all of the text; Qwen-Image's second prompt is shorter, and padding is not seen.
    arrays["text_length"] = np.int64([5, 3 if kind == "qwen_image" else 5])
    return arrays


def reference(folder, kind, base, adapter, arrays, temperature, dtype="float32", **more):
    """The latents that the release draws."""
    np.savez(folder / "inputs.npz", **arrays)
    job = (
        SAMPLING
        | {
            "network": kind,
            "base": str(base),
            "adapter": str(adapter),
            "inputs": str(folder / "inputs.npz"),
            "outputs": str(folder / "outputs.npz"),
            "dtype": dtype,
            "shift": 3.2,
            "final_step_size_scale": 0.5,
            "temperature": temperature,
        }
        | more
    )
    (folder / "job.json").write_text(json.dumps(job))
    script = Path(__file__).with_name("reference.py")
    command = [sys.executable, str(script), CHECKOUT, str(folder / "job.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    if "does not accept an external attention_mask" in done.stderr:
        pytest.skip("the release's Qwen-Image masks text by diffusers 0.37, which is not installed")
    assert done.returncode == 0, done.stderr
    return np.load(folder / "outputs.npz")["x"]


def sampled(student, arrays, temperature):
    told = {name: a for name, a in arrays.items() if name != "noise"}
    noise = arrays["noise"]
    options = SAMPLING | {"solver": "euler", "temperature": temperature}
    return np.asarray(student.sample(0, told, size=noise.shape[1:3], noise=noise, **options))


# The release's pipeline of FLUX.2 fails with its own grids.
TRAVELLING = [(kind, "gm_4nfe", 0.3) for kind in CONFIGS]
TRAVELLING += [(kind, "dx_4nfe", 1.0) for kind in ("flux", "qwen_image")]


@pytest.mark.parametrize(("kind", "variant", "temperature"), TRAVELLING)
def test_ours_in_the_release(tmp_path, kind, variant, temperature):
    base, adapter = ours(tmp_path, kind, variant)
    arrays = inputs(kind)
    theirs = reference(tmp_path, kind, base, adapter, arrays, temperature)
    x = sampled(piflow_jax.load(adapter, teacher=base), arrays, temperature)
    assert 0.3 < x.std() < 30  # there is something to compare
    assert np.sqrt(np.mean((x - theirs) ** 2)) < 1e-4 * theirs.std()


@pytest.mark.parametrize(
    ("kind", "case"),
    [("flux", "02-bf16-times-of-released-adapters"), ("qwen_image", "03-qwen-bf16-frequencies")],
)
def test_the_releases_in_ours(tmp_path, monkeypatch, kind, case):
    base, adapter = CASES / case / "base", CASES / case / "adapter"
    config, data = settings(kind)
    row = dataclasses.replace(networks.NETWORKS[kind], official=data)
    monkeypatch.setitem(networks.NETWORKS, kind, row)
    arrays = inputs(kind)
    for dtype, bound in (("float32", 1e-4), ("bfloat16", 0.1)):
        theirs = reference(tmp_path, kind, base, adapter, arrays, 0.3, dtype)
        config.model[kind].base_dtype = dtype
        x = sampled(piflow_jax.load(adapter, config, dtype, base), arrays, 0.3)
        assert np.sqrt(np.mean((x - theirs) ** 2)) < bound * theirs.std(), dtype


def test_the_releases_of_flux2_in_ours(tmp_path, monkeypatch):
    """Written by the release's own classes, because none is recorded."""
    config, data = settings("flux2")
    row = dataclasses.replace(networks.NETWORKS["flux2"], official=data)
    monkeypatch.setitem(networks.NETWORKS, "flux2", row)
    base, adapter, arrays = tmp_path / "base", tmp_path / "adapter", inputs("flux2")
    sizes = {"in_channels": 64, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16}
    sizes |= {"num_attention_heads": 3, "joint_attention_dim": 64, "axes_dims_rope": [4] * 4}
    targets = ["ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out"]
    targets += ["timestep_embedder.linear_1", "timestep_embedder.linear_2"]
    targets += [f"single_transformer_blocks.{i}.attn.to_out" for i in range(2)]
    made = {"write": sizes, "targets": targets}
    theirs = reference(tmp_path, "flux2", base, adapter, arrays, 0.3, **made)
    x = sampled(piflow_jax.load(adapter, config, "float32", base), arrays, 0.3)
    assert 0.3 < x.std() < 30
    assert np.sqrt(np.mean((x - theirs) ** 2)) < 1e-4 * theirs.std()
