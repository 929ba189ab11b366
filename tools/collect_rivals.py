"""Collects the comparisons of `--mode=rivals` into `docs/rivals.md` and its pictures.

    cp runs/rivals_digits/rivals.json docs/results/rivals_digits.json
    python -m tools.collect_rivals             # rewrite the tables and the pictures
    python -m tools.collect_rivals --check     # exit 1 if the tables are not what the reports say

The tables are between markers and are a pure function of the files `docs/results/rivals_*.json`.
Pictures need Matplotlib. Methods have their names in their rows, in `piflow_jax/rivals`.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from piflow_jax.rivals import RATE, find_method
from tools.collect_reports import ReportError, run

# Comparisons, and what the titles of their pictures say of them; without a picture if nothing.
SMALLER = "networks smaller than those of the main job"
COMPARISONS = {
    "fashion_mnist": "2 minutes of two cores a method",
    "fashion_mnist_long": "",
    "fashion_mnist_rates": "",
    "fashion_mnist_weights": "",
    "fashion_mnist_corrected": "",
    "digits": SMALLER,
    "mnist": SMALLER,
}
# Their distances at one evaluation are a curve over compute.
BUDGETS = ("fashion_mnist_rates", "fashion_mnist", "fashion_mnist_long")
COLUMNS = {
    "frechet": "Frechet",
    "pixel_frechet": "Frechet of pixels",  # not in older reports
    "precision": "precision",
    "recall": "recall",
    "diversity": "diversity",
    "endpoint_mse": "endpoint MSE",
}
DECIMALS = {"frechet": 2, "pixel_frechet": 2, "diversity": 2, "endpoint_mse": 4}

Report = dict[str, Any]


def load(path: Path) -> Report:
    """Reads a comparison, its rows with their figures among the other keys.

    Args:
      path: a file of `--mode=rivals`.

    Returns:
      The report.

    Raises:
      ReportError: it is no such report, or a method lacks a seed.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        for row in [*report["rows"], *report["teacher"]]:
            row |= row.pop("figures")
        seeds = report["protocol"]["seed"]
        for key in {(row["method"], row["nfe"]) for row in report["rows"]}:
            found = [r["seed"] for r in report["rows"] if (r["method"], r["nfe"]) == key]
            if sorted(found) != sorted(seeds):
                raise ReportError(f"{path}: {key[0]} at {key[1]} NFE has the seeds {found}")
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, ReportError):
            raise
        raise ReportError(f"{path} is not a report ({type(error).__name__}: {error})") from error
    return report


def name_of(method: str) -> str:
    """The usual name of a method; the evaluations that it was trained for have their own column."""
    row, (_, _, factor) = find_method(method), method.partition(RATE)
    credit = " + teacher's time" if row.credit else ""
    return row.title + credit + (f", {factor} times the rate" if factor else "")


def marker_of(name: str) -> str:
    """The marker of a method by its usual name: a circle for pi-Flow, a square for the others."""
    return "o" if name.startswith("**") else "s"


def most_evaluated(report: Report) -> Report:
    """The teacher's row with the most evaluations."""
    return max(report["teacher"], key=lambda row: row["nfe"])


def groups(report: Report) -> list[tuple[int, str, list[Report]]]:
    """`(nfe, method, rows of all seeds)`, by evaluations and then by distance."""
    found: dict[tuple[int, str], list[Report]] = {}
    for row in report["rows"]:
        found.setdefault((row["nfe"], row["method"]), []).append(row)
    order = sorted(found, key=lambda key: (key[0], fmean(row["frechet"] for row in found[key])))
    return [(nfe, method, found[nfe, method]) for nfe, method in order]


def _cell(rows: Sequence[Report], key: str) -> str:
    values = [row.get(key) for row in rows]
    if None in values:
        return "-"
    decimals = DECIMALS.get(key, 3)
    text = f"{fmean(values):.{decimals}f}"
    if key.endswith("frechet") and len(values) > 1:
        text += f" ± {stdev(values):.{decimals}f}"
    return text


def comparison(report: Report) -> list[str]:
    """Lines of the table of all methods, means over seeds."""
    keys = [key for key in COLUMNS if any(key in row for row in report["teacher"])]
    heads = [COLUMNS[key] for key in keys]
    head = ["NFE", "method", *heads, "steps", "training, s", "and the teacher's, s"]
    rows = []
    for nfe, method, same in groups(report):
        first = same[0]
        whole = first["train_seconds"] + first["teacher_seconds"]
        cells = [_cell(same, key) for key in keys]
        times = f"{first['steps']:,}", f"{first['train_seconds']:.0f}", f"{whole:.0f}"
        rows.append([str(nfe), name_of(method), *cells, *times])
    for row in report["teacher"]:
        cells = [_cell([row], key) for key in keys]
        rows.append([str(row["nfe"]), "teacher", *cells, "", "", ""])
    floor = report["floor"] | {"diversity": report["data_diversity"]}
    cells = [_cell([floor], key) for key in keys]
    rows.append(["-", "data, half against half", *cells, "", "", ""])
    rule = ["---:", "---", *["---:"] * (len(head) - 2)]
    return [f"| {' | '.join(row)} |" for row in (head, rule, *rows)]


def ablation(reports: dict[str, Report]) -> list[str]:
    """Lines of the table of weights of pi-ID at one evaluation, seed by seed."""
    lines = ["| data | loss | seed | Frechet | recall | endpoint MSE |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: |")
    for data, report in reports.items():
        students = [g for g in groups(report) if g[0] == 1 and g[1].split("_")[0] == "gm"]
        if "gm" not in {method for _, method, _ in students} or len(students) == 1:
            continue
        for _, method, rows in students:
            _, *parts = method.split("_")
            loss = ", ".join(parts) or "plain"
            rows = sorted(rows, key=lambda row: row["seed"])
            for name, same in [*((str(row["seed"]), [row]) for row in rows), ("mean", rows)]:
                cells = [_cell(same, key) for key in ("frechet", "recall", "endpoint_mse")]
                lines.append(f"| {data} | {loss} | {name} | {' | '.join(cells)} |")
    return lines


def blocks(root: Path) -> dict[str, str]:
    """The texts between the markers of the page, by name."""
    results, texts, reports = root / "docs" / "results", {}, {}
    for data in COMPARISONS:
        path = results / f"rivals_{data}.json"
        if path.exists():
            report = reports[data] = load(path)
            protocol, times = report["protocol"], report["times"]
            said = (
                f"{protocol['samples']} samples a system against {protocol['real_images']} images; "
                f"seeds {', '.join(map(str, protocol['seed']))}; "
                f"{times['settings']['seconds']:.0f} s of training a method "
                f"({'of all cores together' if times['clock'] == 'cores' else 'of the clock'}) on "
                f"{times['device']}, {times['cores']} cores; jax {times['jax']}."
            )
            texts[data] = "\n".join([*comparison(report), "", said, ""])
        else:
            texts[data] = "Not run yet.\n"
    texts["ablation"] = "\n".join([*ablation(reports), ""]) if reports else "Not run yet.\n"
    return texts


def render(root: Path) -> str:
    """The text of `docs/rivals.md` with its tables as the reports say.

    Args:
      root: the repository.

    Returns:
      The text.

    Raises:
      ReportError: a report cannot be used, or the page lacks its markers.
    """
    page = root / "docs" / "rivals.md"
    text = page.read_text(encoding="utf-8")
    for name, block in blocks(root).items():
        begin, end = f"<!-- rivals:{name} -->", f"<!-- rivals:{name}:end -->"
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
            raise ReportError(f"{page} must have {begin} and then {end}, once each")
        text = f"{text.split(begin)[0]}{begin}\n{block}{end}{text.split(end)[1]}"
    return text


def draw(report: Report, path: Path, title: str) -> None:
    """Frechet distance over recall (above) and over diversity within a class (below).

    Each number of evaluations has a column, and each seed a marker. With one number, the second
    plot is to the right of the first. The data's own distance and recall are left out. With them,
    all methods would crowd at the other end of the axes.

    Args:
      report: a comparison.
      path: the picture.
      title: its title.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    methods = sorted({name_of(row["method"]) for row in report["rows"]})
    # No grey, which is for lines.
    palette = [colour for colour in pyplot.get_cmap("tab10").colors if len(set(colour)) > 1]
    styles = {
        name: {
            "color": palette[place % len(palette)],
            "marker": marker_of(name),
        }
        for place, name in enumerate(methods)
    }
    evaluations = sorted({row["nfe"] for row in report["rows"]})
    best = most_evaluated(report)
    teacher = {"marker": "*", "facecolor": "none", "edgecolor": "black", "lw": 1.3}
    count, shared = len(evaluations), {"sharey": True, "squeeze": False, "layout": "constrained"}
    if count > 1:
        size = (3.3 * count + 1.6, 7.4)
        figure, axes = pyplot.subplots(2, count, figsize=size, sharex="row", **shared)
    else:  # a single column would be too narrow for the legend
        figure, axes = pyplot.subplots(1, 2, figsize=(9.6, 4.8), **shared)
        axes = axes.T
    names = {"recall": "recall", "diversity": "diversity within a class"}
    for line, (key, name) in zip(axes, names.items(), strict=True):
        for axis, nfe in zip(line, evaluations, strict=True):
            for _, method, rows in (group for group in groups(report) if group[0] == nfe):
                x, y = zip(*((row[key], row["frechet"]) for row in rows), strict=True)
                axis.scatter(x, y, s=42, edgecolor="white", lw=0.6, **styles[name_of(method)])
            axis.scatter(best[key], best["frechet"], **teacher, s=150, zorder=3)
            if key == "diversity":
                axis.axvline(report["data_diversity"], color="black", ls=":", lw=1.2)
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(ticker.MaxNLocator(7))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_locator(ticker.NullLocator())
            axis.set_xlabel(name)
            axis.grid(alpha=0.3)
        line[0].set_ylabel("Frechet distance")
    for axis, nfe in zip(axes[0], evaluations, strict=True):
        axis.set_title(f"{nfe} evaluation{'s' if nfe > 1 else ''}", fontsize=11)
    dot = pyplot.Line2D
    handles = [
        dot([], [], ls="", ms=7, label=name.replace("*", ""), **style)
        for name, style in styles.items()
    ]
    label = f"teacher, {best['nfe']} evaluations"
    handles.append(dot([], [], color="black", marker="*", mfc="none", ms=11, ls="", label=label))
    handles.append(dot([], [], color="black", ls=":", label="the data's diversity"))
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=4 if count > 1 else 3,
        frameon=False,
        fontsize=9,
    )
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def curves(reports: Sequence[Report]) -> dict[str, list[tuple[float, float]]]:
    """Points `(training seconds, Frechet distance)` of each method at one evaluation.

    Args:
      reports: comparisons with different budgets.

    Returns:
      The points by the method's name. Of several learning rates, the best counts; distances are
      means over seeds.
    """
    points: dict[str, dict[float, float]] = {}
    for report in reports:
        for nfe, method, rows in groups(report):
            if nfe != 1:
                continue
            found = points.setdefault(name_of(method.partition(RATE)[0]), {})
            distance = fmean(row["frechet"] for row in rows)
            budget = report["times"]["settings"]["seconds"]
            spent = rows[0]["train_seconds"] if find_method(method).credit else budget
            found[spent] = min(distance, found.get(spent, distance))
    return {name: sorted(found.items()) for name, found in points.items()}


def draw_budgets(reports: Sequence[Report], path: Path) -> None:
    """Draws `curves` of comparisons and their teacher's distance as `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axis = pyplot.subplots(figsize=(7.6, 4.6), layout="constrained")
    for name, points in curves(reports).items():
        label = name.replace("*", "")
        axis.plot(*zip(*points, strict=True), marker=marker_of(name), label=label)
    best = most_evaluated(reports[0])
    label = f"teacher, {best['nfe']} evaluations"
    axis.axhline(best["frechet"], color="black", ls="--", lw=1.2, label=label)
    axis.set(xscale="log", yscale="log", ylabel="Frechet distance at one evaluation")
    axis.set_xlabel("training, seconds of all cores together")
    for one in (axis.xaxis, axis.yaxis):
        one.set_major_formatter("{x:g}")
        one.set_minor_formatter(ticker.NullFormatter())
    axis.xaxis.set_major_locator(
        ticker.FixedLocator([r["times"]["settings"]["seconds"] for r in reports])
    )
    axis.yaxis.set_major_locator(ticker.FixedLocator([0.3, 0.5, 1, 2, 3, 5, 10, 20, 30]))
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def pictures(root: Path) -> list[Path]:
    """Draws the pictures of the page and returns their paths."""
    folder, images = root / "docs" / "results", root / "docs" / "images"
    paths = {name: folder / f"rivals_{name}.json" for name in COMPARISONS}
    reports = {name: load(path) for name, path in paths.items() if path.exists()}
    drawn = []
    for name, report in reports.items():
        if COMPARISONS[name]:
            seeds = ", ".join(map(str, report["protocol"]["seed"]))
            title = f"configs/{name}.py:rivals, seeds {seeds}; {COMPARISONS[name]}"
            drawn.append(images / f"rivals_{name}.png")
            draw(report, drawn[-1], title)
    if all(name in reports for name in BUDGETS):
        drawn.append(images / "rivals_budgets.png")
        draw_budgets([reports[name] for name in BUDGETS], drawn[-1])
    return drawn


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""

    def texts(root: Path) -> dict[Path, str]:
        return {root / "docs" / "rivals.md": render(root)}

    return run(texts, "python -m tools.collect_rivals", __doc__, arguments, pictures)


if __name__ == "__main__":
    sys.exit(main())
