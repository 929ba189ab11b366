"""The benchmarks' harness: ratios by rounds, bounds, what is kept, and the page made of it."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import guidance_interval, harness, page, train_step
from piflow_jax.config import parse

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
    calls = {"ours": clock(9, 1, 1, 4, 2), "theirs": clock(5, 1, 2, 8, 8)}
    work = harness.Work(items=6, unit="examples", flops=3.0, bytes=8.0)
    peaks = harness.Peaks(bytes=16.0, flops={"float32": 2.0})
    case = harness.compare(calls, work, peaks, rounds=3)
    ours, theirs = case["alternatives"].values()
    assert ours["first_seconds"] == 9 and ours["median_seconds"] == 2 and ours["least_seconds"] == 1
    assert theirs["ratio"] == 2.0  # of 2, 2 and 4; the ratio of the medians is 4
    assert (case["bound"], case["bound_seconds"]) == ("float32 FLOPs", 1.5)
    row = harness.table(case).splitlines()[2]
    assert row == "| ours | 2000 | 1000 | 75% | 3 | 75.0% | 9 | 1 |"


def test_what_does_not_fit_is_left_out(clock, capsys):
    def too_large():
        raise RuntimeError("CUDA out of memory")

    builders = {"ours": lambda: clock(1), "theirs": lambda: too_large}
    case = harness.compare_apart(builders, harness.Work(items=1, unit="steps"), rounds=3)
    assert list(case["alternatives"]) == ["ours"]
    assert "theirs does not fit" in capsys.readouterr().err


def test_machines_are_kept_beside_each_other_and_the_page_shows_both(tmp_path, monkeypatch, clock):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    work = harness.Work(items=1, unit="steps")
    for cpu, seconds in (("old", 4.0), ("new", 2.0), ("new", 1.0)):
        machine = {"cpu": cpu, "cores": 2, "memory_gib": 8}
        monkeypatch.setattr(harness, "machine", lambda machine=machine: machine)
        case = harness.compare({"ours": clock(seconds)}, work, rounds=2)
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
    assert flops / 4 == report["flops"]["minimum"] / report["batch_size"]


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
