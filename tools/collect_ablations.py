"""Collects the ablations of what goes beyond the paper into `docs/beyond.md`.

    python -m tools.collect_ablations             # rewrite the tables
    python -m tools.collect_ablations --check     # exit 1 if the tables are not what reports say

The tables are between markers and are a pure function of the reports in `docs/results/`, which
`tools/collect_reports.py` reads too.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from tools.collect_reports import (
    DECIMALS,
    Report,
    ReportError,
    compare,
    filled,
    load,
    run,
    table,
)

CORRECTED = {
    "gm": "3,000 steps of pi-ID",
    "gm_3820": "3,820 steps of pi-ID",
    "gm_continued": "+ 600 steps of pi-ID",
    "gm_continued_1140": "+ 1,140 steps of pi-ID",
    "gm_corrected": "+ 600 with `critic`",
    "gm_corrected_own": "+ 600 with `critic`, from a student of its own",
    "gm_corrected_scale4_critic1": "+ 600 with `critic`, `critic_steps = 1`",
    "gm_corrected_scale1_critic1": "+ 600 with `critic`, `critic_steps = 1`, `scale = 1`",
    "gm_corrected_shift3": "+ 600 with `critic`, `critic_steps = 1`, `scale = 1`, `shift = 3`",
    "gm_corrected_1800": "+ 1,800 with `critic`, `critic_steps = 1`, `scale = 1`",
    "gm_corrected_policy": "+ 600 with `policy`, `scale = 1`",
    "gm_frechet": "+ 600 with `frechet`",
    "gm_corrected_frechet": (
        "+ 600 with `critic`, `critic_steps = 1`, `scale = 1`, then 600 with `frechet`"
    ),
    "gm_frechet_judge": "the same with `corrector.space = judge`",
    "gm_frechet_pixels": "the same with `corrector.space = pixels`",
}
OWN = {1: "gm", 2: "gm_2nfe"}
# Evaluations of one student at several scales, and the student that was trained for one of them.
ANY_GUIDANCE, GUIDED = "gm_any_guidance_scale", "guided"
SHOWN = ("frechet", "pixel_frechet", "precision", "recall", "endpoint_mse")
TRAINED_ON = "A figure in parentheses is a distance that the student was trained on."
HEADS = ("Frechet", "Frechet of pixels", "precision", "recall", "endpoint MSE")


def corrector_table(variants: dict[str, dict[int, Report]]) -> list[str]:
    """Lines of the table of students with and without the corrector, means over seeds."""
    head = ["training", "seeds", *HEADS, "Frechet, over the teacher's"]
    compared = next(iter(variants.values()))
    rows = [
        [title, ", ".join(map(str, variants[name])), *_cells([*variants[name].values()], "student")]
        for name, title in CORRECTED.items()
        if name in variants
    ]
    most = compare(next(iter(compared.values())))["most"]
    rows.append([f"teacher, {most['nfe']} NFE", "", *_cells([*compared.values()], "most")])
    lines = table(head, rows, left=2)
    return [*lines, "", TRAINED_ON] if any(" | (" in line for line in lines) else lines


def _cells(reports: Sequence[Report], system: str) -> list[str]:
    pairs = [compare(report) for report in reports]
    values = {name: [pair[system].get(name) for pair in pairs] for name in SHOWN}
    cells = {name: _spread(of, DECIMALS[name]) for name, of in values.items()}
    cells["ratio"] = "1"
    if system == "student":
        cells["ratio"] = _spread([pair["to_most"] for pair in pairs], 2)
        known = reports[0]["protocol"].get("trained_on", ())
        known = [*known, *(["ratio"] if "frechet" in known else [])]
        cells |= {name: f"({cells[name]})" for name in known}
    return [*cells.values()]


def evaluations_table(variants: dict[str, dict[int, Report]]) -> list[str]:
    """Lines of the table of one student for several numbers of evaluations."""
    (report,) = variants["gm_any_nfe"].values()
    head = ["NFE", "one student: Frechet", "endpoint MSE"]
    head += ["a student of this number: Frechet", "endpoint MSE", "its steps"]
    rows = []
    for row in report["rows"]:
        if row["system"] != "student":
            continue
        cells = [str(row["nfe"]), f"{row['frechet']:.3f}", f"{row['endpoint_mse']:.4f}"]
        own = variants.get(OWN.get(row["nfe"], ""), {}).get(0)
        if own is None:
            rows.append([*cells, "-", "-", "-"])
            continue
        student = compare(own)["student"]
        steps = f"{own['protocol']['steps']['student']:,}" if "steps" in own["protocol"] else "-"
        rows.append([*cells, f"{student['frechet']:.3f}", f"{student['endpoint_mse']:.4f}", steps])
    return table(head, rows)


def guidance_table(variants: dict[str, dict[int, Report]]) -> list[str]:
    """Lines of the table of one student for several guidance scales."""

    def cells(row, *names):
        return [_spread([row[name]], DECIMALS[name]) for name in names]

    of_student = ("frechet", "recall", "endpoint_mse")
    head = ["scale", "teacher: Frechet", "recall", "one student: Frechet", "recall", "endpoint MSE"]
    head += ["a student of this scale: Frechet", "recall", "endpoint MSE"]
    (own,) = variants[GUIDED].values()
    rows = []
    for name in sorted(name for name in variants if name.startswith(ANY_GUIDANCE)):
        (report,) = variants[name].values()
        pair, scale = compare(report), report["protocol"]["guidance"][0]
        row = [f"{scale:g}", *cells(pair["most"], "frechet", "recall")]
        row += cells(pair["student"], *of_student)
        same = scale == own["protocol"]["guidance"][0]
        rows.append([*row, *(cells(compare(own)["student"], *of_student) if same else "---")])
    return table(head, rows)


def _spread(values: Sequence[float | None], decimals: int) -> str:
    """Mean and standard error."""
    if None in values:
        return "-"
    mean = f"{fmean(values):.{decimals}f}"
    if len(set(values)) == 1:
        return mean
    return f"{mean} ± {stdev(values) / len(values) ** 0.5:.{decimals}f}"


def render(root: Path) -> dict[Path, str]:
    """The text of `docs/beyond.md` with the tables of today's reports, by path.

    Args:
      root: the repository.

    Returns:
      One page.

    Raises:
      ReportError: a report is missing or cannot be used, or the page lacks its markers.
    """
    page, reports = root / "docs" / "beyond.md", load(root / "docs" / "results")
    text = page.read_text(encoding="utf-8")
    try:
        blocks: dict[str, Any] = {
            "corrector": corrector_table(reports["fashion_mnist"]),
            "evaluations": evaluations_table(reports["digits"]),
            "guidance": guidance_table(reports["digits"]),
        }
    except KeyError as error:
        raise ReportError(f"{root / 'docs' / 'results'} has no report of {error}") from error
    for name, lines in blocks.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        text = filled(text, page, begin, end, "\n".join([*lines, ""]))
    return {page: text}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return run(render, "python -m tools.collect_ablations", __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
