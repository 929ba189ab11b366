"""The page in Gradio: a tab for each view, with its picture, times and controls."""

import os
import re
from collections.abc import Generator
from pathlib import Path
from typing import Any

from piflow_jax.demo import markup
from piflow_jax.demo.drawer import Drawer
from piflow_jax.demo.pictures import as_sample
from piflow_jax.demo.server import KEPT_SECONDS, LARGEST_PICTURE
from piflow_jax.demo.views import View, views_of

_WAITING = 8  # calls that may wait for their turn
_CANVAS = 280  # pixels of a side on which pictures are drawn
_BRUSH = 18  # of these


def make_page(*drawers: Drawer) -> Any:
    """The page, a `gradio.Blocks` with the functions `/draw`, `/path`, `/morph` and `/edit`.

    Its first picture is drawn here, so that nobody waits for it. Values that its controls do not
    have are put to the nearest that they have, or refused. Calls are drawn one after the other. A
    few may wait; for others the page says that the queue is full.

    Args:
      drawers: what draws, one for each student. With several there is a link to each, and functions
        of the second end in `_1`.

    Returns:
      The page, for `serve`, or `.launch()` where it is one's own machine's.

    Raises:
      ImportError: Gradio is not there; `pip install -e ".[demo]"`.
      ValueError: there is no student.
    """
    import gradio

    if not drawers:
        raise ValueError("a page needs a student")
    first, *others = drawers
    with gradio.Blocks(
        title=f"pi-Flow: {first.title}",
        analytics_enabled=False,
        fill_width=True,
        delete_cache=(KEPT_SECONDS, KEPT_SECONDS),
    ) as page:
        if others:
            gradio.Navbar(main_page_name=first.title)
        _student(first)
    for number, drawer in enumerate(others, 1):
        slug = re.sub(r"\W+", "-", drawer.title).strip("-")
        with page.route(drawer.title, f"/{slug}-{number}"):
            _student(drawer)
    return page.queue(max_size=_WAITING)


def _student(drawer: Drawer) -> None:
    """A student's part of the page."""
    import gradio

    gradio.Markdown(f"# pi-Flow: a student of {drawer.title}")
    with gradio.Tabs():
        for number, view in enumerate(views_of(drawer)):
            with gradio.Tab(view.title) as tab:
                _view(drawer, view, tab, first=number == 0)


def _view(drawer: Drawer, view: View, tab: Any, first: bool) -> None:
    """A tab: a picture, and what belongs to it at its side."""
    import gradio

    shown = markup.empty(view.empty), ""
    if first:
        shown = view.show(drawn(view.draw(**_values(view, _defaults(view)))))
    inputs = []
    with gradio.Row():
        with gradio.Column(scale=3, min_width=340):
            if view.takes_picture:
                inputs.append(_editor())
            picture = gradio.HTML(shown[0])
        with gradio.Column(scale=1, min_width=300):
            side = gradio.HTML(shown[1])
            components = {}
            for control in view.controls:
                if control.key not in view.folded:
                    components[control.key] = control.component()
            folded = [control for control in view.controls if control.key in view.folded]
            if folded:
                with gradio.Accordion("More", open=False):
                    components |= {control.key: control.component() for control in folded}
            button = gradio.Button("Draw", variant="primary")
    inputs += [components[control.key] for control in view.controls]

    def said(steps):
        while True:
            try:
                yield gradio.skip(), markup.busy(next(steps))
            except StopIteration as end:
                return end.value

    def draw(*sent):
        try:
            values = _values(view, sent, drawer)
            found = yield from said(view.draw(**values))
            yield view.show(found)
        except ValueError as error:
            raise gradio.Error(str(error), print_exception=False) from error

    # The controls' own checks know no steps, and end in tracebacks for what is no number.
    options = {"preprocess": False, "concurrency_id": "draw", "show_progress": "minimal"}
    outputs = [picture, side]
    button.click(draw, inputs, outputs, api_name=view.call, **options)
    if not first and not view.takes_picture:
        tab.select(draw, inputs, outputs, api_name=False, **options)


def _editor() -> Any:
    import gradio

    return gradio.ImageEditor(
        label="picture",
        sources=("upload",),
        type="filepath",
        layers=False,
        transforms=(),
        canvas_size=(_CANVAS, _CANVAS),
        fixed_canvas=True,
        brush=gradio.Brush(default_size=_BRUSH, colors=["#000000"], color_mode="fixed"),
        height=_CANVAS + 60,
        buttons=[],
    )


def _defaults(view: View) -> tuple[float, ...]:
    return tuple(control.value for control in view.controls)


def _values(view: View, sent: Any, drawer: Drawer | None = None) -> dict[str, Any]:
    """What a view draws, for the values that a call sent.

    Raises:
      ValueError: a value is none of a control's, or the picture cannot be used.
    """
    picture, *sent = sent if view.takes_picture else (None, *sent)
    values = {
        control.key: control.read(one) for control, one in zip(view.controls, sent, strict=True)
    }
    values = {"label": 0} | {
        key: int(value) if value == int(value) else value for key, value in values.items()
    }
    if view.takes_picture:
        data = drawer.student.settings.data
        inverted = bool(values.pop("inverted", 0))
        contents = _contents(picture)
        values["picture"] = as_sample(contents, data.sample_size, data.channels, inverted)
    return values


def _contents(sent: Any) -> bytes:
    """The file that was drawn or uploaded; Gradio knows that it came from there."""
    parts = sent if isinstance(sent, dict) else {}
    file = parts.get("composite") or parts.get("background")
    if not isinstance(file, dict) or not file.get("path"):
        raise ValueError("draw or upload a picture first")
    path = Path(file["path"])
    if os.path.getsize(path) > LARGEST_PICTURE:
        raise ValueError(f"a picture may have {LARGEST_PICTURE // 2**20} MB")
    return path.read_bytes()


def drawn(steps: Generator[str, None, Any]) -> Any:
    """What one of the drawer's generators draws; what it says is printed.

    Args:
      steps: such as `Drawer.samples(...)`.

    Returns:
      The drawing or trajectory.
    """
    while True:
        try:
            print(next(steps), flush=True)
        except StopIteration as end:
            return end.value
