"""The benchmarks' harness: ratios by rounds, bounds, what is kept, and the page made of it."""

import functools
import importlib.util
import json
import os
import pickle
import re
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import guidance_interval, harness, page, rollout, sampler, train_step
from piflow_jax.config import parse
from piflow_jax.flow.policies import GMOutput
from tests import tiny
from tests.benchmarks import calls

RESULTS = Path(__file__).parents[2] / "docs" / "results"


@pytest.fixture
def clock(monkeypatch):
    """A clock that only calls move, and what makes such calls."""
    now = [0.0]
    monkeypatch.setattr(harness.time, "perf_counter", lambda: now[0])

    def taking(*seconds):
        left = list(seconds)

        def call():
            now[0] += left.pop(0) if len(left) > 1 else left[0]

        return call

    return taking


def test_a_ratio_is_the_median_of_the_rounds_ratios(clock):
    builders = {"ours": lambda: clock(9, 1, 1, 4, 2), "theirs": lambda: clock(5, 1, 2, 8, 8)}
    work = harness.Work(items=6, unit="examples", flops=3.0, bytes=8.0)
    peaks = harness.Peaks(bytes=16.0, flops={"float32": 2.0})
    case = harness.compare(builders, work, peaks, rounds=3)
    ours, theirs = case["alternatives"].values()
    assert ours["first_seconds"] == 9 and ours["median_seconds"] == 2 and ours["least_seconds"] == 1
    assert theirs["ratio"] == 2.0  # of 2, 2 and 4; the ratio of the medians is 4
    assert (case["bound"], case["bound_seconds"]) == ("float32 FLOPs", 1.5)
    row = harness.table(case).splitlines()[2]
    assert row == "| ours | 2000 | 1000 | 75% | 3 | 75.0% | 9 | 1 |"


@pytest.mark.parametrize("after", [0, 1, 4])
def test_what_fails_is_left_out_with_its_reason(after, capsys):
    """At the start, at the first call or in the middle; what else was measured is kept."""
    error = RuntimeError("CUDA out of memory\nat") if after else AssertionError("without CUDA")
    builders = {
        "ours": functools.partial(calls.process, os.devnull),
        "theirs": functools.partial(calls.failing, error, after),
        "others": functools.partial(calls.process, os.devnull),
    }
    work = harness.Work(items=1, unit="steps")
    case = harness.compare(builders, work, rounds=3)
    expected = "CUDA out of memory" if after else "AssertionError: without CUDA"
    assert list(case["alternatives"]) == ["ours", "others"]
    assert case["left_out"] == {"theirs": expected}
    assert f"Left out: theirs ({expected})" in harness.table(case)
    assert f"theirs is left out: {expected}" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="every alternative failed"):
        harness.compare({"theirs": lambda: calls.failing(error, 0)}, work)


def test_alternatives_apart_have_a_process_each(tmp_path, capsys):
    """What a process of JAX's takes of a GPU's memory it keeps to its end."""
    paths = [tmp_path / name for name in ("ours", "theirs")]
    builders = {path.name: functools.partial(calls.process, path) for path in paths}
    builders["failing"] = functools.partial(calls.failing, AssertionError("without CUDA"), 0)
    case = harness.compare_apart(builders, harness.Work(items=1, unit="steps"), rounds=2)
    ours, theirs = ({*path.read_text().split()} for path in paths)
    assert len(ours) == len(theirs) == 1 and len(ours | theirs | {str(os.getpid())}) == 3
    assert list(case["alternatives"]) == ["ours", "theirs"]
    assert case["left_out"] == {"failing": "AssertionError: without CUDA"}
    assert "failing is left out" in capsys.readouterr().err


def test_what_runs_apart_can_be_sent_there():
    """The steps of a stage, as a GPU's command sends them."""
    raw = train_step.load_config("configs/digits.py")
    raw.train.batch_size, raw.train.microbatches = 2, 1
    found = {}

    def keep(builders, *_, **__):
        found.update(builders)

    options = types.SimpleNamespace(
        remat=[],
        attention=[],
        rollouts=["euler:4"],
        correctors=["none", "critic:4"],
        torch=True,
        compile=True,
        apart=True,
        rounds=2,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "compare_apart", keep)
        patch.setattr(harness, "apart", lambda *_: None)
        train_step.measure(raw, "student", options)
    assert train_step.OURS in found
    config = found[f"{train_step.OURS}, 4 substeps, euler"].args[0]
    assert (config.train.solver, config.train.total_substeps) == ("euler", 4)
    names = (train_step.OURS, f"{train_step.OURS}, corrector critic:4")
    plain, corrected = (found[name].args[0].train.corrector for name in names)
    assert (plain.kind, corrected.kind, corrected.critic_steps) == ("", "critic", 4)
    for build in found.values():
        assert pickle.loads(pickle.dumps(build)).args == build.args


@pytest.mark.parametrize(
    ("platform", "cuda", "expected", "said"),
    [
        ("cpu", False, "cpu", ""),
        ("gpu", True, "cuda", ""),
        ("gpu", False, None, "its build 2.0+cpu cannot use the GPU"),
        ("tpu", False, None, "it has no tpu"),
        ("gpu", None, None, "it is not installed"),
    ],
)
def test_torch_runs_where_jax_does_or_not_at_all(
    platform, cuda, expected, said, monkeypatch, capsys
):
    torch = types.SimpleNamespace(
        __version__="2.0+cpu", cuda=types.SimpleNamespace(is_available=lambda: cuda)
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if cuda is None else torch)
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    assert harness.torch_device() == expected
    assert said in capsys.readouterr().err
    threads = train_step.torch_threads()
    assert threads == ({"PyTorch": 0} if expected == "cuda" else threads if expected else {})


def test_a_floor_of_arithmetic_is_one():
    """On an accelerator: on chip, and far above what its memory and its cache can feed."""
    chain = rollout.Chain.of("gpu")
    for operation, count in rollout.OPERATIONS.values():
        # An H100's arithmetic takes 20 operations for each byte of its memory, 12 of its cache.
        assert count * chain.operations / (2 * 4) > 60
        text = chain._replace(length=256, turns=3).program(operation)
        text = text.lower(np.zeros(256, np.float32)).compile().as_text()
        arithmetic = re.findall(
            r"= f32\[256\]\S* (fusion|exponential|multiply|add)\(", unfused(text)
        )
        assert arithmetic == ["fusion"], arithmetic
    assert 4 * chain.length <= 2**22


def unfused(text):
    """A program without the insides of its fusions."""
    parts = text.split("\n\n")
    fused = set(re.findall(r"fusion\(.*calls=%?([\w.-]+)", text))
    return "\n".join(p for p in parts if re.split(r"[ (]", p.strip().lstrip("%"))[0] not in fused)


def test_cases_of_other_solvers_and_substeps_are_kept_beside_each_other(tmp_path, monkeypatch):
    """By default Euler's, which PyTorch takes too, and the second-order one's, at equal error."""
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(harness, "tune_allocator", lambda: None)
    measured = []

    def measure(config, options, solver, substeps):
        measured.append((solver, substeps))
        rows = {sampler.OURS: 3.0, sampler.EVALUATIONS: 2.0, sampler.ROLLOUTS: 0.1}
        builders = {name: lambda: lambda: None for name in rows}
        case = harness.compare(builders, harness.Work(items=1, unit="samples"), rounds=2)
        for name, seconds in rows.items():
            case["alternatives"][name]["median_seconds"] = seconds
        return case

    monkeypatch.setattr(sampler, "measure", measure)
    for arguments in ((), ("--solver=multistep", "--substeps=32")):
        monkeypatch.setattr(sys, "argv", ["sampler", *arguments])
        sampler.main()
    assert measured == [("euler", 128), ("multistep", 64), ("multistep", 32)]
    (cases,) = harness.load("sampler").values()
    assert len(cases) == 3 and "digits.py, NFE 1, batch 64, multistep, 64 substeps" in cases
    assert page.block("sampler").count("rollouts take 0.05 times as long as the network") == 3


def test_a_network_evaluation_is_a_whole_one():
    """What nothing reads, the compiler leaves out: the heads of weights and of the deviation."""
    raw = tiny.get_config()
    raw.train.nfe = 2
    subject = train_step.Subject(parse(raw), "student")
    timed = sampler.ours(subject, np.arange(2), "euler", 2)
    shapes = [jax.tree.map(np.shape, output) for output in timed[sampler.EVALUATIONS]()]
    assert shapes == 2 * [GMOutput((2, 8, 8, 2, 1), (2, 8, 8, 2), (2,))]


def test_data_is_measured_on_the_host():
    """With large blocks kept, as everywhere, and where a GPU is not what reads."""
    code = (
        "from benchmarks import data, harness; import jax\n"
        "harness.tune_allocator = lambda: exit(print('tuned, on', jax.config.jax_platforms))\n"
        "data.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "JAX_PLATFORMS": "", "PYTHONPATH": str(RESULTS.parents[1])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout == "tuned, on cpu\n", done.stderr


def test_machines_are_kept_beside_each_other_and_the_page_shows_both(tmp_path, monkeypatch, clock):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    work = harness.Work(items=1, unit="steps")
    for cpu, seconds in (("old", 4.0), ("new", 2.0), ("new", 1.0)):
        machine = {"cpu": cpu, "cores": 2, "memory_gib": 8}
        monkeypatch.setattr(harness, "machine", lambda machine=machine: machine)
        case = harness.compare({"ours": lambda s=seconds: clock(s)}, work, rounds=2)
        harness.save("sampler", "a case", case)
    assert list(harness.load("sampler")) == ["old, 2 cores, 8 GiB", "new, 2 cores, 8 GiB"]
    text = page.block("sampler")
    assert "| ours | 4000 |" in text and "| ours | 1000 |" in text and "| ours | 2000 |" not in text


def test_the_page_is_what_the_results_say(tmp_path):
    assert page.main(["--check"]) == 0
    text = (Path(__file__).parents[2] / "docs" / "performance.md").read_text(encoding="utf-8")
    stale = tmp_path / "performance.md"
    stale.write_text(text.replace("| piflow_jax |", "| piflow_jax | 1 |", 1))
    assert page.main(["--check", "--page", str(stale)]) == 1
    assert page.main(["--page", str(stale)]) == 0
    assert stale.read_text(encoding="utf-8") == text


def test_the_bound_of_the_full_size_step_is_that_of_the_compile_reports():
    raw = train_step.load_config("configs/imagenet.py:gm_repa")
    raw.train.batch_size, raw.train.microbatches = 4, 1
    flops = train_step.Subject(parse(raw), "student").flops()
    report = json.loads((RESULTS / "compile_gm_repa-v5e_4x4.json").read_text())
    assert flops.needed / 4 == report["flops"]["minimum"] / report["batch_size"]


def test_capacity_is_exceeded_as_rarely_as_it_says():
    config = parse(train_step.load_config("configs/imagenet.py:gm_repa"))
    found = guidance_interval.savings(config)
    assert json.loads(json.dumps(found)) == harness.load("guidance_interval")
    # A batch of 16, two queries each, is exceeded once in 32 / 0.7^32 steps at most.
    rng = np.random.default_rng(0)
    needed = (rng.uniform(size=(200_000, 32)) < 0.7).mean(1)
    assert needed.max() <= found["by_batch"][16]["capacity"]
    needed = rng.binomial(256, 0.7, 2_000_000) / 256
    assert (needed > found["by_batch"][128]["capacity"]).sum() <= 10
