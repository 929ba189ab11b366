"""The tables of the documentation are made of reports, and reports are checked."""

import dataclasses
import json
import os
import re
import shlex
from pathlib import Path

import pytest

from piflow_jax.config import parse
from piflow_jax.config.command_line import override
from piflow_jax.distillation.stages import flat_settings
from tests.modules import load_module

ROOT = Path(__file__).parents[1]


collect_reports = load_module(ROOT / "tools" / "collect_reports.py")
collect_compiled = load_module(ROOT / "tools" / "collect_compiled.py")
collect_rivals = load_module(ROOT / "tools" / "collect_rivals.py")
collect_ablations = load_module(ROOT / "tools" / "collect_ablations.py")


def test_the_scaling_table_is_that_of_its_results(monkeypatch):
    monkeypatch.setattr(
        os, "environ", dict(os.environ)
    )  # the benchmark is for a process of its own
    monkeypatch.syspath_prepend(str(ROOT))
    scaling = load_module(ROOT / "benchmarks" / "scaling.py")
    table = scaling.table(json.loads(scaling.RESULT.read_text(encoding="utf-8")))
    assert table in (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")


def test_tables_are_what_the_reports_say():
    assert collect_reports.main(["--check"]) == 0
    assert collect_compiled.main(["--check"]) == 0
    assert collect_rivals.main(["--check"]) == 0
    assert collect_ablations.main(["--check"]) == 0


def ablation_report(student, teacher, seed):
    def row(system, nfe, frechet, **others):
        figures = {"frechet": frechet, "precision": 0.5, "recall": 0.25, "diversity": 4.0}
        return {"system": system, "nfe": nfe, "seconds": 1.0, "figures": figures} | others

    return {
        "rows": [
            row("teacher", 64, teacher, endpoint_mse=None, pixel_frechet=0.5),
            row("student", 1, student, endpoint_mse=0.01, pixel_frechet=0.75),
        ],
        "data_diversity": 5.5,
        "floor": {"frechet": 0.46, "precision": 0.91, "recall": 0.92},
        "protocol": {"seed": seed, "data": "fashion_mnist", "steps": {"student": 600}},
    }


def test_ablations_are_means_and_standard_errors(tmp_path):
    """Of three seeds: 1.5, 2.0 and 2.5 have the mean 2 and the standard error .5 / sqrt(3)."""
    results = tmp_path / "docs" / "results"
    results.mkdir(parents=True)
    for seed, frechet in enumerate((1.5, 2.0, 2.5)):
        name = f"fashion_mnist_gm_seed{seed}.json"
        (results / name).write_text(json.dumps(ablation_report(frechet, 0.8, seed)))
    trained = ablation_report(1.2, 0.8, 0)
    trained["protocol"] |= {"trained_in": ["a space"], "trained_on": ["frechet"]}
    (results / "fashion_mnist_gm_frechet_judge_seed0.json").write_text(json.dumps(trained))
    report = json.dumps(ablation_report(1.0, 0.8, 0) | {"protocol": {"seed": 0, "data": "digits"}})
    (results / "digits_gm_any_nfe_seed0.json").write_text(report)
    for name, scale, frechet in (
        ("guided", 2.0, 3.0),
        ("gm_any_guidance_scale2", 2.0, 2.0),
        ("gm_any_guidance_scale1", 1.0, 1.0),
    ):
        protocol = {"seed": 0, "data": "digits", "guidance": [scale, 0.0, 1.0]}
        report = json.dumps(ablation_report(frechet, 0.8, 0) | {"protocol": protocol})
        (results / f"digits_{name}_seed0.json").write_text(report)
    page = tmp_path / "docs" / "beyond.md"
    blocks = "\n".join(
        f"<!-- {n}:begin -->\n<!-- {n}:end -->" for n in ("corrector", "evaluations", "guidance")
    )
    page.write_text(f"before\n{blocks}\nafter\n")
    root = ["--root", str(tmp_path)]
    assert collect_ablations.main([*root, "--check"]) == 1
    assert collect_ablations.main(root) == collect_ablations.main([*root, "--check"]) == 0
    text = page.read_text()
    student = "2.000 ± 0.289 | 0.750 | 0.500 | 0.250 | 0.0100 | 2.50 ± 0.36 |"
    assert f"| 3,000 steps of pi-ID | 0, 1, 2 | {student}" in text
    # The distance that a student was trained on is in parentheses, and so is what is made of it.
    assert "= judge` | 0 | (1.200) | 0.750 | 0.500 | 0.250 | 0.0100 | (1.50) |" in text
    assert f"\n\n{collect_ablations.TRAINED_ON}\n<!-- corrector:end -->" in text
    assert "| teacher, 64 NFE |  | 0.800 | 0.500 | 0.500 | 0.250 | - | 1 |" in text
    assert "| 1 | 1.000 | 0.0100 | - | - | - |" in text
    scales = "| 1 | 0.800 | 0.250 | 1.000 | 0.250 | 0.0100 | - | - | - |\n"
    scales += "| 2 | 0.800 | 0.250 | 2.000 | 0.250 | 0.0100 | 3.000 | 0.250 | 0.0100 |\n"
    assert scales in text
    page.write_text("no markers")
    assert collect_ablations.main(root) == 2


def rivals_report(seeds=(0, 1)):
    """A comparison of two methods whose figures are easy to recompute."""

    def row(frechet, **others):
        figures = {"frechet": frechet, "precision": 0.5, "recall": 0.25, "diversity": 4.0}
        return others | {"figures": figures, "endpoint_mse": None}

    spent = {"steps": 1234, "train_seconds": 12.0}
    rows = [
        row(base + seed, method=method, nfe=1, seed=seed, teacher_seconds=extra, **spent)
        for method, base, extra in (("meanflow", 3.0, 0.0), ("gm", 1.0, 30.0))
        for seed in seeds
    ]
    settings = {"seconds": 12.0}
    times = {"settings": settings, "clock": "cores", "device": "cpu", "cores": 2, "jax": "0.10"}
    return {
        "rows": rows,
        "teacher": [row(0.75, nfe=32)],
        "times": times,
        "data_diversity": 5.5,
        "floor": {"frechet": 0.46, "precision": 0.91, "recall": 0.92},
        "protocol": {"samples": 5000, "real_images": 1797, "seed": list(seeds)},
    }


def test_rivals_are_tabulated_by_distance(tmp_path, capsys):
    (tmp_path / "docs" / "results").mkdir(parents=True)
    page, report = tmp_path / "docs" / "rivals.md", rivals_report()
    names = (*collect_rivals.COMPARISONS, "ablation")
    page.write_text("".join(f"<!-- rivals:{n} -->\n<!-- rivals:{n}:end -->\n" for n in names))
    path = tmp_path / "docs" / "results" / "rivals_digits.json"
    path.write_text(json.dumps(report))
    text = collect_rivals.render(tmp_path)
    first = text.index("| 1 | **pi-Flow, GM** | 1.50 ± 0.71 | 0.500 | 0.250 | 4.00 | - | 1,234 |")
    second = text.index("| 1 | MeanFlow | 3.50 ± 0.71 |")
    assert first < second
    assert "| 12 | 42 |" in text and "| 12 | 12 |" in text
    assert "| digits | plain |" not in text  # there is no other weight to compare it with
    weighted = [row | {"method": "gm_timed"} for row in rivals_report()["rows"][2:]]
    path.write_text(json.dumps(report | {"rows": report["rows"] + weighted}))
    text = collect_rivals.render(tmp_path)
    assert "| digits | plain | 1 | 2.00 | 0.250 | - |" in text
    assert "| digits | timed | 1 | 2.00 | 0.250 | - |" in text
    assert "mnist -->\nNot run yet." in text
    del report["rows"][0]
    path.write_text(json.dumps(report))
    assert collect_rivals.main(["--check", "--root", str(tmp_path)]) == 2
    assert "meanflow at 1 NFE has the seeds [1]" in capsys.readouterr().err


def test_curves_take_the_best_rate_at_each_budget():
    search, longer = rivals_report(seeds=(0,)), rivals_report()
    faster = [row | {"method": f"{row['method']}@3"} for row in search["rows"]]
    faster[0] = faster[0] | {"figures": {"frechet": 2.5}}
    faster[1] = faster[1] | {"figures": {"frechet": 9.0}}
    search["rows"] += faster
    longer["times"] = longer["times"] | {"settings": {"seconds": 48.0}}
    longer["rows"][0] |= {"method": "meanflow+teacher@3", "train_seconds": 90.0}
    longer["rows"][1] |= {"method": "meanflow+teacher@3", "train_seconds": 90.0}
    for one in (search, longer):
        for row in one["rows"]:
            row |= row.pop("figures")
    assert collect_rivals.curves([search, longer]) == {
        "MeanFlow": [(12.0, 2.5)],
        "MeanFlow + teacher's time": [(90.0, 3.5)],
        "**pi-Flow, GM**": [(12.0, 1.0), (48.0, 1.5)],
    }
    assert collect_rivals.name_of("gm@0.3") == "**pi-Flow, GM**, 0.3 times the rate"


def report(seed, frechet):
    def row(system, nfe, scale, mse):
        figures = {"frechet": frechet * scale, "precision": 0.9, "recall": 0.8, "diversity": 5.0}
        row = {"system": system, "nfe": nfe, "figures": figures}
        return row | {"endpoint_mse": mse, "seconds": 1.25}

    return {
        "rows": [
            row("teacher", 1, 20.0, 0.5),
            row("teacher", 128, 1.0, None),
            row("student", 1, 1.5, 0.0071),
        ],
        "data_diversity": 5.5,
        "floor": {"frechet": 0.46, "precision": 0.91, "recall": 0.92},
        "protocol": {
            "data": "digits",
            "real_images": 1797,
            "samples": 5000,
            "features_sha256": "ab" * 32,
            "guidance": [1.0, 0.0, 1.0],
            "device": "cpu",
            "jax": f"0.{seed}",
            "seed": seed,
        },
    }


@pytest.fixture
def repository(tmp_path):
    """A root with a README and two seeds of a variant; a function writes further reports."""
    (tmp_path / "docs" / "results").mkdir(parents=True)
    readme = f"before\n{collect_reports.BEGIN}\nold\n{collect_reports.END}\nafter\n"
    (tmp_path / "README.md").write_text(readme)
    begin, end = collect_compiled.BEGIN, collect_compiled.END
    (tmp_path / "docs" / "imagenet.md").write_text(f"over\n{begin}\nold\n{end}\nunder\n")

    def write(name, content):
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "docs" / "results" / name).write_text(text)
        return ["--root", str(tmp_path)]

    write("digits_gm_seed1.json", report(1, 0.6))
    write("digits_gm_seed0.json", report(0, 0.4))
    return tmp_path, write


def test_tables_hold_means_and_ratios(repository):
    root, write = repository
    root_flag = write("digits_gm_2nfe_seed0.json", report(0, 0.4))
    assert collect_reports.main([*root_flag, "--check"]) == 1
    assert collect_reports.main(root_flag) == 0
    assert collect_reports.main([*root_flag, "--check"]) == 0
    readme = (root / "README.md").read_text()
    assert readme.startswith("before\n") and readme.endswith("after\n") and "old" not in readme
    assert "mean over seeds 0, 1" in readme
    assert "| **student** | 1 | 0.750 | 0.900 | 0.800 | 5.00 | 0.0071 |" in readme
    assert "| teacher | 128 | 0.500 | 0.900 | 0.800 | 5.00 | - |" in readme
    ratios = "is 1.50 times the teacher's at 128 NFE and 0.075 times the teacher's at 1 NFE."
    assert f"The student's Frechet distance at 1 NFE {ratios}" in readme
    assert "corrected" not in readme
    root_flag = write("digits_gm_corrected_seed0.json", report(0, 0.3))
    assert collect_reports.main(root_flag) == 0
    own, corrected = re.findall(r"\| (\*\*.*?) \| 1 \| (\S+)", (root / "README.md").read_text())
    assert own == ("**student**", "0.750") and corrected == ("**student**, corrected", "0.450")
    said = "The corrected student's is 1.50 times its teacher's, which is 0.300: that teacher comes"
    assert said in (root / "README.md").read_text()
    page = (root / "docs" / "results.md").read_text()
    assert page.index("digits.py, gm\n") < page.index("digits.py, gm_2nfe\n")
    assert "| 1 | 0.900 | 0.600 | 12.000 | 1.500 | 0.075 | 0.000 | 0.000 | 0.0071 |" in page
    assert "| mean | 0.750 | 0.500 | 10.000 | 1.500 | 0.075 | 0.000 | 0.000 | 0.0071 |" in page
    assert "| data, half against half | - | 0.460 | 0.910 | 0.920 | 5.50 | - | - |" in page
    assert "| jax | 0.0, 0.1 |" in page and "| guidance | [1.0, 0.0, 1.0] |" in page
    (root / "docs" / "results.md").write_text(page + "edited")
    assert collect_reports.main([*root_flag, "--check"]) == 1


def compiled(topology, **settings):
    shares = {"teacher": 0.4, "student": 0.35, "policy": 0.2, "optimizer": 0.04, "other": 0.01}
    return {
        "topology": topology,
        "devices": 16,
        "batch_per_device": 256.0,
        "microbatches": 16,
        "remat": "none",
        "moment_dtype": "float32",
        "memory_bytes": {"peak": 13 * 2**30, "chip": 16 * 2**30},
        "flops": {"counted": 3.25e18, "ratio": 0.995},
        "cycles": {"total": 123456789, "shares": shares, "rollouts": 1},
        "jax": "0.1",
        "libtpu": "0.2",
    } | settings


def test_compiled_steps_have_a_table(repository):
    root, write = repository
    page = root / "docs" / "imagenet.md"
    root_flag = ["--root", str(root)]
    assert collect_compiled.main(root_flag) == 0
    assert "No step has been compiled yet." in page.read_text()
    kernel = compiled("v6e:4x4", remat="dots", attention="splash")
    kernel["cycles"] = kernel["cycles"] | {"minimum": 5e7, "rollouts": 0}
    write("compile_gm_repa-v6e_4x4.json", kernel)
    small = {"peak": 17 * 2**30, "chip": 16 * 2**30}
    halved = compiled("v5e:4x4", moment_dtype="bfloat16", memory_bytes=small)
    halved["libtpu_flags"] = "--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000 --other=1"
    write("compile_gm_repa-v5e_4x4_bfloat16.json", halved)
    write("compile_gm_repa-v5e_4x4.json", compiled("v5e:4x4"))
    assert collect_compiled.main([*root_flag, "--check"]) == 1
    assert collect_compiled.main(root_flag) == 0
    assert collect_compiled.main([*root_flag, "--check"]) == 0
    text = page.read_text()
    assert text.startswith("over\n") and text.endswith("under\n") and "old" not in text
    first, second, third = (line for line in text.splitlines() if line.startswith("| `gm_repa`"))
    assert first == (
        "| `gm_repa` | v5e:4x4 | 16 | 256 in 16 | none | float32 | on | 13.00 of 16 | 3.250e+18 "
        "| 0.995 | 1.235e+08 | - | 40.0% | 35.0% | 20.0% | 4.0% | 1.0% | loop | arrays |"
    )
    assert "bfloat16 | off | 17.00 of 16, does not fit |" in second
    assert "v6e:4x4" in third and "| dots | float32 | on |" in third
    assert "| 1.235e+08 | 2.47 |" in third and third.endswith("| kernel | kernel |")
    assert "Compiled with jax 0.1, libtpu 0.2." in text


@pytest.mark.parametrize("config", [path.stem for path in (ROOT / "configs").glob("*.py")])
def test_reports_may_be_of_every_config(config):
    match = collect_reports.NAME.fullmatch(f"{config}_gm_2nfe_seed1.json")
    assert match.groups() == (config, "gm_2nfe", "1")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nobody_gm_seed0.json", report(0, 1.0), "is not called <config>_<variant>_seed<k>.json"),
        ("digits.json", report(0, 1.0), "is not called <config>_<variant>_seed<k>.json"),
        ("digits_dx_seed3.json", report(2, 1.0), "says that its seed is 2"),
        ("mnist_gm_seed0.json", report(0, 1.0), "says that its data is digits"),
        ("digits_dx_seed0.json", "{", "is not a report (JSONDecodeError"),
        ("digits_dx_seed0.json", {"rows": []}, "is not a report (KeyError: 'floor')"),
        (
            "compile_v5e.json",
            compiled("v5e:4x4"),
            "is not called compile_<variant>-<anything>.json",
        ),
        ("compile_gm-v5e.json", {"cycles": {}}, "is not a report (KeyError: 'memory_bytes')"),
    ],
)
def test_unusable_reports_are_named(repository, capsys, name, content, message):
    _, write = repository
    collector = collect_compiled if name.startswith("compile") else collect_reports
    assert collector.main(write(name, content)) == 2
    error = capsys.readouterr().err
    assert name in error and message in error


def test_seeds_of_other_protocols_are_not_averaged(repository, capsys):
    _, write = repository
    other = report(2, 0.5)
    other["protocol"]["samples"] = 1000
    assert collect_reports.main(write("digits_gm_seed2.json", other)) == 2
    assert "seeds 0 and 2 of digits_gm differ in samples" in capsys.readouterr().err


@pytest.mark.parametrize("name", collect_rivals.COMPARISONS)
def test_the_command_of_a_comparison_makes_what_its_page_shows(name):
    """The page has a command for each report, with its budget, methods and seeds."""
    page = (ROOT / "docs" / "rivals.md").read_text(encoding="utf-8").replace("\\\n", "")
    (command,) = re.findall(rf"^python .*--workdir=runs/rivals_{name} .*$", page, re.M)
    words = shlex.split(command)
    config = re.search(r"--config=configs/(\w+)\.py:rivals", command)[1]
    made = load_module(ROOT / "configs" / f"{config}.py").get_config("rivals")
    override(made, [word for word in words if word.startswith("--config.")])
    found = flat_settings(dataclasses.asdict(parse(made).rivals))
    report = json.loads((ROOT / f"docs/results/rivals_{name}.json").read_text(encoding="utf-8"))
    shown = report["times"]["settings"] | {"seeds": report["protocol"]["seed"]}
    assert {*found.pop("methods")} == {*shown.pop("methods")}
    assert found == shown
