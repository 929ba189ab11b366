"""The page's pictures and bars as HTML; `page.css` says how they look.

Pictures are small: the browser enlarges their pixels. A film has its frames next to each other and
shows the one that the variable `--frame` of its stage says.
"""

import html
from collections.abc import Sequence

import numpy as np

from piflow_jax.demo.drawings import Drawing, Row, Trajectory, plural
from piflow_jax.demo.pictures import COLOURS, as_uri, film, weight_maps, weight_shares
from piflow_jax.evaluation import as_levels

_SMALL = 96  # pixels; those of larger pictures are not enlarged
_MIXTURE_HEIGHT = 100  # units of the chart


def pairs(drawing: Drawing, ends: tuple[str, str] | None = None) -> str:
    """Samples, the student's above its teacher's, with their names below.

    Args:
      drawing: what was drawn.
      ends: of a morph, what stands at the ends of its slider.

    Returns:
      The HTML.
    """
    many = len(drawing.names)
    frames = drawing.rows[0].pictures.shape[1] if ends else 1
    films = [
        [as_levels(one).reshape(frames, *one.shape[-3:-1], 3) for one in row.pictures]
        for row in drawing.rows
    ]
    figures = []
    for number, name in enumerate(drawing.names):
        shown = "".join(
            _film(of_row[number], row.system, f"{row.system}: {name}")
            for row, of_row in zip(drawing.rows, films, strict=True)
        )
        caption = f"<figcaption>{html.escape(name)}</figcaption>" if name else ""
        figures.append(f"<figure>{shown}{caption}</figure>")
    grid = f'<div class="pf-pairs" style="{_columns(many)}">{"".join(figures)}</div>'
    return _stage(_sentence(drawing.rows) + grid, frames, 0, ends)


def bars(drawing: Drawing, device: str, link: str = "") -> str:
    """Times as bars, the speed-up, and what the student was not trained for.

    Args:
      drawing: what was drawn.
      device: where it was drawn.
      link: HTML at the end.

    Returns:
      The HTML.
    """
    rows, longest = drawing.rows, max(row.seconds for row in drawing.rows)
    parts = []
    if len(rows) > 1:
        factor = rows[1].seconds / rows[0].seconds
        much, word = (factor, "faster") if factor >= 1 else (1 / factor, "slower")
        shown = f"{much:.0f}" if much >= 10 else f"{much:.1f}"
        parts.append(f'<p class="pf-speed"><b>{shown}&times;</b> {word} than its teacher</p>')
    for row in rows:
        width = max(100 * row.seconds / longest, 0.5)
        parts.append(
            f'<div class="pf-bar {row.system}"><span>{row.said}</span>'
            f"<span>{_duration(row.seconds)}</span>"
            f'<i style="width: {width:.1f}%"></i></div>'
        )
    count = int(np.prod(rows[0].samples.shape[: 2 if _has_frames(rows[0]) else 1]))
    said = f"{count} sample{'s' * (count > 1)}, {device}, without compilation."
    parts.append(f'<p class="pf-small">{html.escape(said)}</p>')
    parts += [f'<p class="pf-note">{html.escape(note)}</p>' for note in _notes(drawing)]
    return f'<div class="pf-times">{"".join(parts)}{link}</div>'


def stage(trajectory: Trajectory) -> str:
    """A sample's way, with a slider over raw time.

    Args:
      trajectory: what was followed.

    Returns:
      The HTML.
    """
    ways, frames = trajectory.ways, len(trajectory.taus)
    (_, _, mine), *others = ways
    heads = ["state x<sub>t</sub>", "x<sub>0</sub> that it heads for"]
    heads.append("mixture" if mine.weights is not None else "")
    cells = [f'<span class="pf-head">{head}</span>' for head in ["", *heads]]
    for system, _, way in ways:
        cells.append(f'<span class="pf-side {system}">{system}</span>')
        name = f"{system}: {trajectory.name}"
        cells += [_film(as_levels(a), system, name) for a in (way.states, way.x0)]
        if system == "student":
            shown = mine.weights is not None and mine.weights.ndim == 4
            maps = weight_maps(mine.weights) if shown else None
            cells.append(_film(maps, system, "mixture") if shown else "<span></span>")
        else:
            gap = np.abs(mine.states - way.states).clip(0, 2) - 1
            cells.append(_film(as_levels(gap), system, "difference of the states"))
    if others:
        cells += ["<span></span>"] * 3 + ['<span class="pf-foot">difference of the states</span>']
    body = f'<div class="pf-path">{"".join(cells)}</div>'
    said = "The student" if not others else "The student and its teacher"
    chart = ""
    if mine.weights is not None:
        number = mine.weights.shape[-1]
        chart = (
            f'<div class="pf-mixture">{_mixture(weight_shares(mine.weights))}<i></i></div>'
            f'<p class="pf-small">Where the mixture\'s weight goes: one colour for each of its '
            f"{number} components{', grey for the lightest' if number >= len(COLOURS) else ''}; "
            "a mean over the picture.</p>"
        )
    sentence = (
        f'<p class="pf-said">{said} on the way from one noise to a picture'
        f"{': ' + html.escape(trajectory.name) if trajectory.name else ''}.</p>"
    )
    ends = ("raw time 1: noise", "raw time 0: the picture")
    return _stage(sentence + body, frames, frames // 3, ends, chart)


def gap(trajectory: Trajectory, link: str = "") -> str:
    """How far the student is from its teacher on the way and at the end.

    Args:
      trajectory: what was followed.
      link: HTML at the end.

    Returns:
      The HTML.
    """
    (_, nfe, mine), *others = trajectory.ways
    parts = [
        f'<p class="pf-note">The student evaluates its network {_times(nfe)}. Its policy does the '
        "rest of the way without it.</p>"
    ]
    for _, steps, way in others:
        far = np.square(mine.states - way.states).reshape(len(mine.states), -1).mean(axis=1)
        parts.append(
            f'<p class="pf-note">Its teacher does so {_times(steps)}. At the end they are at a '
            f"mean squared distance of {far[-1]:.2g}.</p>"
        )
    return f'<div class="pf-times">{"".join(parts)}{link}</div>'


def empty(said: str) -> str:
    """A sentence in place of a picture, as HTML."""
    return f'<p class="pf-empty">{html.escape(said)}</p>' if said else ""


def busy(said: str) -> str:
    """A sentence on what takes its time, as HTML."""
    return f'<div class="pf-times"><p class="pf-busy" role="status">{html.escape(said)}</p></div>'


def _notes(drawing: Drawing) -> list[str]:
    student, *_ = drawing.rows
    notes, distance = [], drawing.distance(student)
    if distance is not None:
        said = f"Mean squared distance between the rows: {distance:.2g}"
        trained = drawing.as_trained
        if trained is not None:
            other = drawing.distance(trained)
            said += f", and {other:.2g} with the {plural(trained.evaluations)} of its training"
        notes.append(said + ".")
    return notes + [note[0].upper() + note[1:] + "." for note in drawing.notes]


def _sentence(rows: Sequence[Row]) -> str:
    student, *others = rows
    said = f'<b class="student">The student</b> after {_network(student.evaluations)}'
    if others:
        said = (
            f'Above <b class="student">the student</b> after {_network(student.evaluations)}, '
            f'below <b class="teacher">its teacher</b> after {others[0].evaluations}, '
            "from the same noise"
        )
    return f'<p class="pf-said">{said}.</p>'


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"


def _network(evaluations: int) -> str:
    return plural(evaluations).replace(" ", " network ", 1)


def _has_frames(row: Row) -> bool:
    return row.pictures.ndim == 5


def _columns(many: int) -> str:
    """Two rows where a window is wide; as many columns as fill them where it is narrow."""
    wide = -(-many // 2) if many > 4 else many
    narrow = next((n for n in (4, 5, 3) if many % n == 0), min(many, 4))
    return f"--wide: {wide}; --narrow: {narrow}"


def _film(frames: np.ndarray, system: str, name: str) -> str:
    count, height, width, _ = frames.shape
    kind = "pf-film" if max(height, width) <= _SMALL else "pf-film smooth"
    return (
        f'<i class="{kind} {system}" role="img" aria-label="{html.escape(name)}" style="'
        f"--frames: {count}; aspect-ratio: {width} / {height}; "
        f'background-image: url({as_uri(film(frames))})"></i>'
    )


def _stage(
    body: str, frames: int, frame: int, ends: tuple[str, str] | None, chart: str = ""
) -> str:
    slider = ""
    if ends:
        slider = (
            f'<input type="range" min="0" max="{frames - 1}" value="{frame}" aria-label="time" '
            "oninput=\"this.closest('.pf-stage').style.setProperty('--frame', this.value)\">"
            f'<p class="pf-ends"><span>{ends[0]}</span><span>{ends[1]}</span></p>'
        )
    style = f"--frame: {frame}; --last: {max(frames - 1, 1)}"
    return f'<div class="pf-stage" style="{style}">{body}{slider}{chart}</div>'


def _mixture(shares: np.ndarray) -> str:
    """Shares `[F, n]` as areas on top of each other, in SVG."""
    tops = np.cumsum(np.pad(shares, ((0, 0), (1, 0))), axis=1) * _MIXTURE_HEIGHT
    last = len(shares) - 1
    areas = []
    for number, colour in enumerate(COLOURS[: shares.shape[1]]):
        lower, upper = tops[:, number], tops[:, number + 1]
        points = [f"{i},{y:.1f}" for i, y in enumerate(upper)]
        points += [f"{i},{lower[i]:.1f}" for i in range(last, -1, -1)]
        areas.append(f'<polygon fill="{colour}" points="{" ".join(points)}"/>')
    return (
        f'<svg viewBox="0 0 {last} {_MIXTURE_HEIGHT}" preserveAspectRatio="none" '
        f'aria-hidden="true">{"".join(areas)}</svg>'
    )


def _duration(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
