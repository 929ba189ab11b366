"""The step compiled for TPU slices that are not here; in a process of its own, for libtpu."""

import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

from piflow_jax.config import ConfigError, parse
from piflow_jax.modes import compile as stages_compile
from piflow_jax.modes.compile import compile_sampling, compile_step
from tests import tiny, tiny_text, tpu_compiler

ROOT = Path(__file__).parents[2]


def test_an_unknown_slice_is_refused_before_anything_else(tmp_path):
    with pytest.raises(ConfigError, match=r"config.topology: unknown topology ''; it is a chip"):
        compile_step(parse(tiny.get_config()), tmp_path)


@pytest.mark.parametrize(
    ("mode", "group"), [(compile_step, "train"), (compile_sampling, "evaluation")]
)
@pytest.mark.parametrize("data", ["digits", "captioned_digits", "prompts"])
def test_a_batch_that_the_slice_cannot_share_is_refused(tmp_path, monkeypatch, mode, group, data):
    chips = [types.SimpleNamespace(platform="tpu", slice_index=0)] * 4
    monkeypatch.setattr(stages_compile, "topology_devices", lambda topology: chips)
    config = tiny.get_config() if data == "digits" else tiny_text.get_config()
    config.data.name, config.topology = data, "v5e:2x2"
    config[group].batch_size = 6
    with pytest.raises(ConfigError, match=rf"config\.{group}\.batch_size must be .* 4 devices"):
        mode(parse(config, None), tmp_path)


def run(workdir, *flags, mode="compile", settings="tiny"):
    name, _, network = settings.partition(":")
    arguments = (
        f"--config={ROOT / 'tests' / name}.py{network and ':' + network}",
        f"--workdir={workdir}",
        f"--mode={mode}",
        "--config.topology=v5e:2x2",
        *(("--config.train.microbatches=2",) if mode == "compile" else ()),
    )
    return subprocess.run(
        [sys.executable, "-m", "piflow_jax.main", *arguments, *flags],
        cwd=ROOT,
        env=tpu_compiler.environment(),
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.mark.tpu
def test_a_large_product_is_near_the_makers_rate():
    """At clocks of 1.5 and 1.75 GHz."""
    code = "\n".join(
        (
            "import json",
            "from piflow_jax.modes.compile import product_rate",
            "from piflow_jax.parallel.topology import CHIPS, topology_devices",
            "clocks = {'v5e': 1.5e9, 'v5p': 1.75e9}",
            "slices = {'v5e': 'v5e:1x1', 'v5p': 'v5p:1x1x1'}",
            "def share(chip):",
            "    rate = product_rate(topology_devices(slices[chip])[0], 'bfloat16')",
            "    return rate * clocks[chip] / CHIPS[chip].flops",
            "print(json.dumps({chip: share(chip) for chip in slices}))",
        )
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=tpu_compiler.environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert all(0.8 < share < 1 for share in json.loads(done.stdout.splitlines()[-1]).values())


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_a_small_step_compiles_for_a_slice(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "compile_v5e_2x2.json").read_text())
    assert (report["devices"], report["batch_per_device"]) == (4, 2)
    assert 1 <= report["flops"]["ratio"] < 1.15
    assert 0 < report["memory_bytes"]["peak"] < report["memory_bytes"]["chip"]
    assert "fits" in done.stderr
    assert report["libtpu_flags"] == "--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000"

    cycles = report["cycles"]
    assert cycles["total"] > cycles["minimum"] > 0
    # The batch is split by jit over four chips, and yet each has the kernel.
    assert (cycles["rollouts"], cycles["kernels"], cycles["substeps"]) == (0, 1, 8)
    assert set(cycles["shares"]) == {"teacher", "student", "policy", "optimizer", "other"}
    assert sum(cycles["shares"].values()) == pytest.approx(1)
    assert min(cycles["shares"].values()) > 0 and cycles["shares"]["other"] < 0.1
    shares = ", ".join(f"{name} {share:.1%}" for name, share in cycles["shares"].items())
    assert shares in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_a_small_sampler_compiles_for_a_slice_that_could_not_train(tmp_path):
    """Of a network that reads text; no batch of training is made."""
    flags = ("--config.evaluation.batch_size=8", "--config.train.batch_size=6")
    done = run(tmp_path, *flags, mode="compile_sampling", settings="tiny_text")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "compile_sampling_v5e_2x2.json").read_text())
    assert (report["devices"], report["batch_per_device"], report["nfe"]) == (4, 2, 2)
    assert 0.99 < report["flops"]["ratio"] < 1.15
    assert report["flops"]["teacher_share"] == 0
    assert 0 < report["memory_bytes"]["peak"] < report["memory_bytes"]["chip"]
    assert set(report["cycles"]["shares"]) == {"teacher", "student", "policy", "optimizer", "other"}
    assert report["cycles"]["shares"]["student"] > 0.5


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_a_base_in_few_bits_takes_less_of_a_slice(tmp_path):
    """Of a slice that is smaller than a host, too."""
    pytest.importorskip("qwix")
    found = {}
    for dtype in ("bfloat16", "int8"):
        flags = (
            *(
                "--config.topology=v5e:1x2",
                "--config.mesh.fsdp=2",
                "--config.model.flux.hidden=512",
            ),
            *("--config.model.flux.num_heads=4", "--config.model.flux.rope_axes=(64,32,32)"),
            *("--config.model.flux.lora_rank=4", "--config.evaluation.batch_size=2"),
            f"--config.model.flux.base_dtype={dtype}",
        )
        done = run(tmp_path, *flags, mode="compile_sampling", settings="tiny_text")
        assert done.returncode == 0, done.stderr
        report = json.loads((tmp_path / "compile_sampling_v5e_1x2.json").read_text())
        assert (report["devices"], report["base_dtype"]) == (2, dtype)
        found[dtype] = report["memory_bytes"]["arguments"]
    assert found["int8"] < 0.6 * found["bfloat16"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize(
    ("network", "dtype", "axes"),
    [
        ("qwen_image", "bfloat16", "(16,56,56)"),
        ("qwen_image", "int8", "(16,56,56)"),
        ("flux2", "bfloat16", "(32,32,32,32)"),
        ("flux2", "int8", "(32,32,32,32)"),
    ],
)
def test_the_base_is_not_copied_into_another_layout(tmp_path, network, dtype, axes):
    """Most arguments are those of 24 blocks, and what is temporary belongs to one block.

    Kernels have two pieces (gated MLPs of FLUX.2), three and six. With one example, the product of
    a modulation is that of a vector, for which the compiler prefers another layout.
    """
    if dtype == "int8":
        pytest.importorskip("qwix")
    own = f"--config.model.{network}."
    flags = (
        *("--config.topology=v5e:1x1", "--config.evaluation.batch_size=1"),
        *(f"{own}hidden=1024", f"{own}num_heads=8", f"{own}rope_axes={axes}", f"{own}depth=24"),
        *(f"{own}lora_rank=4", f"{own}base_dtype={dtype}", "--config.model.dtype=bfloat16"),
        *((f"{own}single_depth=24",) if network == "flux2" else ()),
    )
    done = run(tmp_path, *flags, mode="compile_sampling", settings=f"tiny_text:{network}")
    assert done.returncode == 0, done.stderr
    memory = json.loads((tmp_path / "compile_sampling_v5e_1x1.json").read_text())["memory_bytes"]
    assert memory["arguments"] > 2**28
    assert memory["temporary"] < 0.1 * memory["arguments"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_references_are_tokens_of_a_compiled_step(tmp_path):
    found = []
    for data, references in (("captioned_digits", 0), ("edited_digits", 1)):
        flags = f"--config.data.name={data}", f"--config.model.flux.references={references}"
        done = run(tmp_path, *flags, settings="tiny_text")
        assert done.returncode == 0, done.stderr
        found.append(json.loads((tmp_path / "compile_v5e_2x2.json").read_text())["flops"])
    assert all(0.99 < flops["ratio"] < 1.15 for flops in found)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_loops_are_counted_as_often_as_they_run(tmp_path):
    """A grid's rollout has no kernel: four times the substeps are about four times its cycles."""
    found = []
    for substeps in (8, 32):
        grid = ("--config.policy.kind=dx", "--config.train.gm_dropout=0.0")
        done = run(tmp_path, *grid, f"--config.train.total_substeps={substeps}")
        assert done.returncode == 0, done.stderr
        found.append(json.loads((tmp_path / "compile_v5e_2x2.json").read_text())["cycles"])
    cycles, long = found
    # One loop, which the compiler keeps, has a length that follows from the batch.
    assert (cycles["rollouts"], cycles["kernels"], cycles["substeps"]) == (1, 0, 8)

    def of(cycles, *scopes):
        return sum(cycles["total"] * cycles["shares"][scope] for scope in scopes)

    assert of(long, "teacher", "student") == pytest.approx(of(cycles, "teacher", "student"))
    assert 1.5 < of(long, "policy") / of(cycles, "policy") < 4


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_what_does_not_fit_is_refused_with_what_helps(tmp_path):
    refused = run(tmp_path, "--config.train.microbatches=8")
    assert refused.returncode == 2
    assert "config.train.microbatches times the 4 devices that share a batch" in refused.stderr
    refused = run(tmp_path, f"--config.train.batch_size={2**25}")
    assert refused.returncode == 2
    assert "the step does not fit v5e:2x2; raise config.train.microbatches" in refused.stderr
