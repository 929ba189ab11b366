"""Collects runs' reports into `docs/results.md` and the table of `README.md`.

    cp runs/digits/report.json docs/results/digits_gm_seed0.json
    python tools/collect_reports.py            # rewrite the files
    python tools/collect_reports.py --check    # exit 1 if they are not what the reports say

A report's file is called `<config>_<variant>_seed<k>.json`, as in `digits_gm_2nfe_seed1.json`. The
output is a pure function of the files. The script needs the standard library only.
"""

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

CONFIGS = sorted(path.stem for path in (Path(__file__).parents[1] / "configs").glob("*.py"))
NAME = re.compile(rf"(?P<config>{'|'.join(CONFIGS)})_(?P<variant>\w+)_seed(?P<seed>\d+)\.json")
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
MAIN_VARIANT = "gm"
# Beyond the paper; its student has a row in README.md too.
CORRECTED_VARIANT = "gm_corrected"
# The first of these with reports has the one table of README.md; all are in docs/results.md.
README_CONFIGS = ("fashion_mnist", "digits")
# Seeds of a variant may differ in these, and in nothing else that figures depend on.
FREE_PROTOCOL = ("seed", "device", "jax", "version", "commit")

HEAD = """\
# Results

`python tools/collect_reports.py` makes this page from the reports in `docs/results/`. Do not edit
it. [Evaluation](evaluation.md#what-is-measured) says what the figures mean and what changes them
apart from quality.

Reports that name no `solver` used Euler's substeps. Reports that name no `rounding` rounded the
number of substeps to the nearest whole number; today it is rounded up. This makes a difference
for `configs/flux.py` and `configs/qwen_image.py` only, whose last segment had 18 substeps and now
has 19.

Some sections are not variants of a configuration, but a variant with other settings:

| section | variant and settings |
| --- | --- |
| `gm_teacher_adamw` | `gm` with [AdamW for the teacher](recipes.md#the-teachers-optimiser) |
| `gm_euler128` | `gm`, trained with 128 Euler substeps as in the paper, not 16 of second order |
| `gm_teacher_adamw_euler128` | `gm_teacher_adamw`, trained with 128 Euler substeps |
| `gm_any_guidance_scale1` to `4` | `gm_any_guidance` with `--config.evaluation.guidance=1` to `4` |
| `gm_teacher_euler` | `gm` with `--config.evaluation.teacher_solver=euler` |
| `gm_teacher_euler` of digits | the same, and `evaluation.teacher_steps=(1,2,4,8,32,128)` |
| `gm_3820` | `gm` with `--config.train.steps=3820` |
| `gm_continued` | `gm_corrected` without the corrector |
| `gm_continued_1140` | the same with `--config.train.steps=1140` |
| `gm_corrected_own` | `gm_corrected`, continuing a student of the same seed |
| `gm_corrected_scale4_critic1` | `gm_corrected` with `--config.train.corrector.critic_steps=1` |
| `gm_corrected_scale1_critic1` | the same with `--config.train.corrector.scale=1` too |
| `gm_corrected_policy` | the same with `kind=policy`, and the critic's optimiser at its defaults |
| `gm_corrected_shift3` | `gm_corrected_scale1_critic1` with `shift=3` of the corrector |
| `gm_corrected_1800` | `gm_corrected_scale1_critic1` with `--config.train.steps=1800` |
| `gm_corrected` of emoji | `gm` with [these settings](beyond.md#correcting-the-distribution) |
| `gm_corrected_frechet` | `gm_frechet`, continuing the student of `gm_corrected_scale1_critic1` |
"""
COLUMNS = {
    "frechet": "Frechet",
    "precision": "precision",
    "recall": "recall",
    "diversity": "diversity",
    "endpoint_mse": "endpoint MSE",
    "pixel_frechet": "Frechet of pixels",  # not in older reports
}
FIGURES = tuple(COLUMNS)[:-1]
TRAINED = " (trained on)"
STUDENT = "| **student**"  # the beginning of its row
DECIMALS = dict.fromkeys(COLUMNS, 3) | {"diversity": 2, "endpoint_mse": 4}

Report = dict[str, Any]


class ReportError(ValueError):
    """A report's file cannot be used."""


def load(directory: Path) -> dict[str, dict[str, dict[int, Report]]]:
    """Reads all reports.

    Args:
      directory: where the JSON files lie.

    Returns:
      Reports by config, variant and seed, each sorted; the main variant comes first.

    Raises:
      ReportError: a file's name or content is wrong, or seeds of a variant cannot be compared.
    """
    found: dict = defaultdict(lambda: defaultdict(dict))
    for path in sorted(directory.glob("*.json")):
        if path.name.startswith(("compile_", "rivals_")):  # tables of their own
            continue
        match = NAME.fullmatch(path.name)
        if match is None:
            raise ReportError(f"{path} is not called <config>_<variant>_seed<k>.json")
        seed = int(match["seed"])
        found[match["config"]][match["variant"]][seed] = _read(path, match["config"], seed)
    for config, variants in found.items():
        for variant, seeds in variants.items():
            _check_comparable(f"{config}_{variant}", seeds)

    def order(item):
        return item[0] != MAIN_VARIANT, item[0]

    return {
        config: {
            variant: dict(sorted(seeds.items()))
            for variant, seeds in sorted(variants.items(), key=order)
        }
        for config, variants in sorted(found.items())
    }


def _read(path: Path, config: str, seed: int) -> Report:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        for row in report["rows"]:
            row |= row.pop("figures")
            missing = {"system", "nfe", "seconds", *FIGURES} - row.keys()
            if missing:
                raise KeyError(sorted(missing)[0])
        floor = {name: report["floor"][name] for name in ("frechet", "precision", "recall")}
        report["floor_row"] = floor | {"diversity": report["data_diversity"], "endpoint_mse": None}
        protocol = report["protocol"]
        said, data = protocol["seed"], protocol["data"]
        network = protocol.get("network")
    except (ValueError, KeyError, TypeError) as error:
        raise ReportError(f"{path} is not a report ({type(error).__name__}: {error})") from error
    if said != seed:
        raise ReportError(f"{path} says that its seed is {said}")
    if not data.startswith(config) and network != config:
        raise ReportError(f"{path} says that its data is {data}")
    if not [row for row in report["rows"] if row["system"] == "student"]:
        raise ReportError(f"{path} has no student")
    return report


def _check_comparable(name: str, seeds: dict[int, Report]) -> None:
    def fixed(report):
        protocol = {k: v for k, v in report["protocol"].items() if k not in FREE_PROTOCOL}
        if "steps" in protocol:  # of a teacher of another run there are none
            protocol["steps"] = protocol["steps"]["student"]
        return protocol | {"systems": [[row["system"], row["nfe"]] for row in report["rows"]]}

    first, *others = seeds
    for other in others:
        one, two = fixed(seeds[first]), fixed(seeds[other])
        different = sorted(k for k in one.keys() | two.keys() if one.get(k) != two.get(k))
        if different:
            raise ReportError(
                f"seeds {first} and {other} of {name} differ in {', '.join(different)}; "
                "evaluate them again with equal settings (--mode=evaluate)"
            )


def _number(value: float | None, decimals: int) -> str:
    return "-" if value is None else f"{value:.{decimals}f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Lines of a Markdown table, whose first `left` columns are words and the others numbers."""
    rule = [*["---"] * left, *["---:"] * (len(head) - left)]
    return [f"| {' | '.join(row)} |" for row in (head, rule, *rows)]


def _mean(values: Sequence[float | None]) -> float | None:
    return None if None in values else fmean(values)


def _figures(rows: Sequence[Report], names: Sequence[str]) -> list[str]:
    """Cells of the means over rows of one system."""
    return [_number(_mean([row.get(name) for row in rows]), DECIMALS[name]) for name in names]


def systems_table(reports: Sequence[Report], *, seconds: bool = False) -> list[str]:
    """Lines of the table of all systems and the data floor, means over reports."""
    of_pixels = any(row.get("pixel_frechet") for report in reports for row in report["rows"])
    names = tuple(COLUMNS) if of_pixels else FIGURES
    known = reports[0]["protocol"].get("trained_on", ())
    head = ["system", "NFE", *(f"{COLUMNS[name]}{TRAINED * (name in known)}" for name in names)]
    head += ["sampling, s"] if seconds else []
    lines = []
    for index, row in enumerate(reports[0]["rows"]):
        same = [report["rows"][index] for report in reports]
        time = [_number(fmean(r["seconds"] for r in same), 1)] if seconds else []
        name = "**student**" if row["system"] == "student" else row["system"]
        lines.append([name, str(row["nfe"]), *_figures(same, names), *time])
    floors = [report["floor_row"] for report in reports]
    lines.append(
        ["data, half against half", "-", *_figures(floors, names), *(["-"] if seconds else [])]
    )
    return table(head, lines)


def _find(report: Report, system: str, pick: Callable[[Report], bool]) -> Report | None:
    return next((r for r in report["rows"] if r["system"] == system and pick(r)), None)


def compare(report: Report) -> dict[str, Any]:
    """Student against teacher: the rows and the ratios of their Frechet distances.

    Args:
      report: one report.

    Returns:
      `student`, `most` (the teacher at most evaluations), `equal` (at the student's, or None),
      `to_most` and `to_equal` (student over teacher, None where there is no such row).
    """
    student = _find(report, "student", lambda row: True)
    teachers = [row for row in report["rows"] if row["system"] == "teacher"]
    most = max(teachers, key=lambda row: row["nfe"])
    equal = _find(report, "teacher", lambda row: row["nfe"] == student["nfe"])
    return {
        "student": student,
        "most": most,
        "equal": equal,
        "to_most": student["frechet"] / most["frechet"],
        "to_equal": equal and student["frechet"] / equal["frechet"],
    }


def comparison_table(seeds: dict[int, Report]) -> list[str]:
    """Lines of the table of student against teacher, one row a seed and their mean."""
    pairs = {seed: compare(report) for seed, report in seeds.items()}
    any_pair = next(iter(pairs.values()))
    few, many = any_pair["student"]["nfe"], any_pair["most"]["nfe"]
    columns = {
        f"Frechet: student, {few} NFE": (3, lambda p: p["student"]["frechet"]),
        f"teacher, {many} NFE": (3, lambda p: p["most"]["frechet"]),
        f"teacher, {few} NFE": (3, lambda p: p["equal"] and p["equal"]["frechet"]),
        f"student / teacher at {many}": (3, lambda p: p["to_most"]),
        f"student / teacher at {few}": (3, lambda p: p["to_equal"]),
        "precision, student - teacher": (
            3,
            lambda p: p["student"]["precision"] - p["most"]["precision"],
        ),
        "recall, student - teacher": (3, lambda p: p["student"]["recall"] - p["most"]["recall"]),
        "endpoint MSE": (4, lambda p: p["student"]["endpoint_mse"]),
    }
    rows = [
        [str(seed), *(_number(get(pair), decimals) for decimals, get in columns.values())]
        for seed, pair in pairs.items()
    ]
    if len(pairs) > 1:
        means = [_number(_mean([get(p) for p in pairs.values()]), d) for d, get in columns.values()]
        rows.append(["mean", *means])
    return table(["seed", *columns], rows)


def protocol_table(seeds: dict[int, Report]) -> list[str]:
    """Lines of the table of everything that the figures depend on."""
    keys = dict.fromkeys(key for report in seeds.values() for key in report["protocol"])
    rows = []
    for key in keys:
        if key == "seed":
            continue
        values = dict.fromkeys(
            value if isinstance(value, str) else json.dumps(value)
            for value in (report["protocol"].get(key) for report in seeds.values())
        )
        rows.append([key, ", ".join(values)])
    return ["| protocol | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in rows)]


def results_page(reports: dict[str, dict[str, dict[int, Report]]]) -> str:
    """The text of `docs/results.md`."""
    lines = [HEAD]
    if not reports:
        lines.append("No report has been collected yet.\n")
    for config, variants in reports.items():
        for variant, seeds in variants.items():
            many = len(seeds) > 1
            count = f"Seed{'s' if many else ''} {', '.join(map(str, seeds))}."
            pair = compare(next(iter(seeds.values())))
            lines += [f"## configs/{config}.py, {variant}", "", count, ""]
            lines += [*comparison_table(seeds), ""]
            lines += [
                f"Precision and recall are compared with the teacher's at {pair['most']['nfe']} "
                "NFE, and endpoints with its endpoints from the same noise."
                + (" The last row is the mean of each column." if many else ""),
                "",
            ]
            if many:
                lines += ["### Mean over seeds", "", *systems_table([*seeds.values()]), ""]
            for seed, report in seeds.items():
                lines += [f"### Seed {seed}", "", *systems_table([report], seconds=True), ""]
            lines += ["### Protocol", "", *protocol_table(seeds), ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def readme_block(reports: dict[str, dict[str, dict[int, Report]]]) -> str:
    """The text between the markers of `README.md`."""
    config = next((name for name in README_CONFIGS if MAIN_VARIANT in reports.get(name, {})), None)
    if config is None:
        return "No report has been collected yet.\n"
    seeds = reports[config][MAIN_VARIANT]
    found = [*seeds.values()]
    pairs = [compare(report) for report in found]
    student, most, equal = (pairs[0][name] for name in ("student", "most", "equal"))

    def said(key):
        return ", ".join(dict.fromkeys(str(report["protocol"][key]) for report in found))

    split = found[0]["protocol"].get("real_split", "train")
    over = "mean over seeds" if len(seeds) > 1 else "seed"
    few = f"{student['nfe']} NFE"
    ratios = f"{fmean(pair['to_most'] for pair in pairs):.2f} times the teacher's at "
    ratios += f"{most['nfe']} NFE"
    if equal:
        ratios += (
            f" and {fmean(pair['to_equal'] for pair in pairs):.3f} times the teacher's at {few}"
        )
    lines = [
        f"`configs/{config}.py`, {over} {', '.join(map(str, seeds))}: {said('samples')} "
        f"samples of each system against {said('real_images')} real {split} images, "
        f"on {said('device')}.",
        "",
        *systems_table(found)[:-1],  # the data's own distance is on the page of results
        "",
        f"The student's Frechet distance at {few} is {ratios}.",
    ]
    if corrected := [*reports[config].get(CORRECTED_VARIANT, {}).values()]:
        own = next(line for line in lines if line.startswith(STUDENT))
        row = next(line for line in systems_table(corrected) if line.startswith(STUDENT))
        lines.insert(lines.index(own) + 1, row.replace(STUDENT, f"{STUDENT}, corrected", 1))
        ratio = fmean(compare(report)["to_most"] for report in corrected)
        most = fmean(compare(report)["most"]["frechet"] for report in corrected)
        lines[-1] += (
            f" The corrected student's is {ratio:.2f} times its teacher's, which is {most:.3f}: "
            "that teacher comes with the package, in bfloat16."
        )
    return "\n".join([*lines, ""])


def render(root: Path) -> dict[Path, str]:
    """Texts of the files that depend on the reports, by path.

    Args:
      root: the repository.

    Returns:
      `docs/results.md` and `README.md`.

    Raises:
      ReportError: a report cannot be used, or `README.md` lacks its markers.
    """
    reports = load(root / "docs" / "results")
    readme = root / "README.md"
    block = readme_block(reports)
    return {
        root / "docs" / "results.md": results_page(reports),
        readme: filled(readme.read_text(encoding="utf-8"), readme, BEGIN, END, block),
    }


def filled(text: str, page: Path, begin: str, end: str, block: str) -> str:
    """The text of a page with another block between its markers; ReportError without them."""
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ReportError(f"{page} must have {begin} and then {end}, once each")
    return f"{text.split(begin)[0]}{begin}\n{block}{end}{text.split(end)[1]}"


def run(
    render: Callable[[Path], dict[Path, str]],
    command: str,
    description: str,
    arguments: Sequence[str] | None,
    draw: Callable[[Path], list[Path]] = lambda root: [],
) -> int:
    """Runs the command line of a collector.

    Args:
      render: texts of its files, by path, of a root.
      command: how it is called, without options.
      description: its docstring.
      arguments: of the command line; None takes those of the process.
      draw: writes the pictures of a root and returns their paths; `--check` ignores them.

    Returns:
      The exit status: 0; 1 for stale files with `--check`; 2 for reports that cannot be used.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if stale")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[1])
    options = parser.parse_args(arguments)
    try:
        texts = render(options.root)
    except (ReportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    stale = [p for p, text in texts.items() if not p.exists() or p.read_text("utf-8") != text]
    for path in stale:
        if options.check:
            print(f"{path} is stale; run: {command}", file=sys.stderr)
        else:
            path.write_text(texts[path], encoding="utf-8")
            print(f"wrote {path}")
    for path in () if options.check else draw(options.root):
        print(f"wrote {path}")
    return 1 if options.check and stale else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return run(render, "python tools/collect_reports.py", __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
