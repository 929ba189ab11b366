"""`report.html`: what a run learned and how, in one file that opens without a network."""

import base64
import contextlib
import html
import json
import math
import os
import string
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from piflow_jax.config import Config, base_config
from piflow_jax.distillation.stages import flat_settings
from piflow_jax.evaluation import Report
from piflow_jax.origin import origin
from piflow_jax.runs.metrics import logged_images
from piflow_jax.runs.workdir import user_path
from piflow_jax.whole_files import replacing

# Titles of plots, by the names of metrics.
_PLOTS = {"loss": "Loss of the {}", "eval_frechet": "Frechet distance of the {}"}
_MOST_GRIDS = 8  # of the looks at a student in training
_MOST_POINTS = 300  # of a line
_MOST_PLAIN = 100  # values that need no running mean
_READING = (
    "A smaller Frechet distance is better. The endpoint error is the mean squared distance to what "
    "the teacher makes of the same noise at most evaluations. Seconds are those of all samples."
)
_NO_LINE = (AttributeError, KeyError, RecursionError, TypeError, ValueError)
_WIDTH, _HEIGHT = 560, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 12, 34

Points = tuple[np.ndarray, np.ndarray]
"""Steps and values of a line."""


def write_page(config: Config, workdir: str | os.PathLike, report: Report | None) -> epath.Path:
    """Writes `<workdir>/report.html` from the files of a run.

    It has `samples.png`, `nearest.png` where there is one, the report's table, loss and Frechet
    distance over training, the grids of the looks at the student, and the settings. All of it is
    inside of the file.

    Args:
      config: the run's settings.
      workdir: the run's directory, with `samples.png`.
      report: the figures; None where there are none.

    Returns:
      The file.
    """
    workdir = user_path(workdir)
    samples = (workdir / "samples.png").read_bytes()
    sections = [("Samples", _picture(samples, "Samples of a column start at the same noise."))]
    nearest = workdir / "nearest.png"
    if nearest.exists():
        caption = "The training image below each sample is the nearest to it, by its pixels."
        sections.append(("Are they copies?", _picture(nearest.read_bytes(), caption)))
    if report is not None:
        sections.append(("Figures", _figures(report)))
    plots = []
    for stage in ("teacher", "student"):
        scalars = _scalars(workdir / stage / "metrics.jsonl")
        for name, title in _PLOTS.items():
            if name in scalars:
                plots.append(_plot(title.format(stage), *scalars[name]))
    if plots:
        sections.append(("Training", f'<div class="plots">{"".join(plots)}</div>'))
    grids = logged_images(workdir / "student")
    if grids:
        shown = sorted({round(i) for i in np.linspace(0, len(grids) - 1, _MOST_GRIDS)})
        pictures = "".join(_picture(grids[i][1], f"step {grids[i][0]:,}") for i in shown)
        title = "Samples of the student in training"
        sections.append((title, f'<div class="grids">{pictures}</div>'))
    sections.append(("Settings", _settings(config)))
    if report is not None:
        sections.append(
            ("Protocol of the figures", _folded("All that they depend on", report.protocol))
        )
    nfe = config.sampling_nfe
    page = string.Template(_PAGE).substitute(
        title=html.escape(f"{config.data.name}: a student of {nfe} evaluation{'s' * (nfe > 1)}"),
        origin=html.escape(f"{origin()}, {workdir}"),
        sections="\n".join(
            f"<section><h2>{html.escape(title)}</h2>{body}</section>" for title, body in sections
        ),
    )
    path = workdir / "report.html"
    with replacing(path) as under_way:
        under_way.write_text(page, encoding="utf-8")
    return path


def _scalars(path: epath.Path) -> dict[str, Points]:
    """The finite values of a stage's metrics by name; none where there is no such file."""
    found: dict[str, list[tuple[int, float]]] = {}
    text = path.read_bytes().decode(errors="replace") if path.exists() else ""
    for line in text.splitlines():
        with contextlib.suppress(*_NO_LINE):  # cut short by a killed run, or edited
            values = json.loads(line)
            for name in _PLOTS.keys() & values.keys():
                value = float(values[name])
                if math.isfinite(value):
                    found.setdefault(name, []).append((int(values["step"]), value))
    return {name: tuple(np.asarray(points, float).T) for name, points in found.items()}


def _picture(png: bytes, caption: str) -> str:
    data = base64.b64encode(png).decode()
    text = html.escape(caption)
    return (
        f'<figure><img alt="{text}" src="data:image/png;base64,{data}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def _figures(report: Report) -> str:
    """The report's own table, as HTML."""
    lines = [line for line in report.table().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    head, _, *rows = cells
    return f"{_rows(head, rows)}<p>{_READING}</p>"


def _settings(config: Config) -> str:
    """Settings that are not the default, and all of them folded away."""
    settings, defaults = flat_settings(vars(config)), flat_settings(base_config().to_dict())
    changed = {key: value for key, value in settings.items() if defaults.get(key) != value}
    return (
        f"<p>Other than the defaults:</p>{_table(changed)}"
        f"{_folded(f'All {len(settings)} settings', settings)}"
    )


def _folded(title: str, values: Mapping[str, Any]) -> str:
    return f"<details><summary>{title}</summary>{_table(flat_settings(dict(values)))}</details>"


def _table(values: Mapping[str, Any]) -> str:
    return _rows(("key", "value"), [(key, str(value)) for key, value in values.items()])


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def row(cells, tag):
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(row(cells, "td") for cells in rows)
    return f'<div class="wide"><table>{row(head, "th")}{body}</table></div>'


def _plot(title: str, steps: np.ndarray, values: np.ndarray) -> str:
    """A line over training as SVG, logarithmic where all values are positive.

    Of many values the line is a running mean, and the values are faint behind it.
    """
    to, back = (np.log, np.exp) if values.min() > 0 else (np.asarray, np.asarray)
    values = to(values)
    lines = {"line": _thinned(steps, values)}
    if len(values) > _MOST_PLAIN:
        size = len(values) // 20
        mean = np.convolve(values, np.ones(size) / size, mode="valid")
        lines = {"faint": lines["line"], "line": _thinned(steps[size - 1 :], mean)}
    low, high = float(values.min()), float(values.max())
    room, last = high - low or 1.0, max(float(steps.max()), 1.0)

    def x(step):
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * step / last

    def y(level):
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - (level - low) / room)

    parts, levels = [], np.linspace(low, low + room, 4)
    for level, label in zip(levels, _labels(back(levels)), strict=True):
        parts.append(
            f'<path class="rule" d="M{_LEFT} {y(level):.1f}H{_WIDTH - _RIGHT}"/>'
            f'<text x="{_LEFT - 8}" y="{y(level) + 4:.1f}" text-anchor="end">{label}</text>'
        )
    for share, anchor in ((0, "start"), (0.5, "middle"), (1, "end")):
        label = f"{'step ' * (share == 1)}{round(share * last):,}"
        parts.append(
            f'<text x="{x(share * last):.1f}" y="{_HEIGHT - 12}" '
            f'text-anchor="{anchor}">{label}</text>'
        )
    for kind, (at, found) in lines.items():
        path = "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in zip(at, found, strict=True))
        parts.append(f'<path class="{kind}" d="M{path}"/>')
    return (
        f'<figure><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{title}">'
        f"{''.join(parts)}</svg><figcaption>{title}</figcaption></figure>"
    )


def _labels(values: np.ndarray) -> list[str]:
    """Numbers in as few digits as tell them apart, in two or more."""
    for digits in range(2, 8):
        labels = [f"{value:.{digits}g}" for value in values]
        if len(set(labels)) == len(labels):
            break
    return labels


def _thinned(steps: np.ndarray, values: np.ndarray) -> Points:
    shown = np.unique(np.linspace(0, len(steps) - 1, _MOST_POINTS).round().astype(int))
    return steps[shown], values[shown]


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ink: #1d1d1f; --paper: #fff; --rule: #d8d8dc; --line: #1f5fbf; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8ea; --paper: #17181a; --rule: #3c3e42; --line: #7fb0ff; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 1080px; margin: 0 auto; padding: 24px 16px; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
figure { margin: 0; } img, svg { max-width: 100%; height: auto; }
figcaption, .origin { font-size: .85rem; opacity: .75; overflow-wrap: anywhere; }
.grids { display: grid; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); gap: 16px; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 4px 16px 4px 0; border-bottom: 1px solid var(--rule); }
.plots { display: grid; gap: 16px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); }
svg { width: 100%; } svg text { font-size: 12px; fill: var(--ink); }
path { fill: none; } .rule { stroke: var(--rule); }
.line { stroke: var(--line); stroke-width: 2; } .faint { stroke: var(--line); opacity: .3; }
</style>
</head>
<body>
<h1>$title</h1>
<p class="origin">$origin</p>
$sections
</body>
</html>
"""
