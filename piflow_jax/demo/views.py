"""The views of the page: what each one asks, draws, shows and lets download."""

import base64
import dataclasses
from collections.abc import Callable, Generator
from typing import Any

import jax
import numpy as np

from piflow_jax.demo import markup
from piflow_jax.demo.controls import Control
from piflow_jax.demo.drawer import EACH, Drawer
from piflow_jax.demo.drawings import Drawing, Trajectory, plural
from piflow_jax.demo.pictures import animation, png
from piflow_jax.evaluation import draw_grid

# Of a prepared set, in the list to choose from.
_MOST_PROMPTS = 200
_LARGEST_SEED = 2**31 - 1
_EVALUATIONS = (1, 2, 4, 8)
_SCALE = 48  # least pixels of a side in a file


@dataclasses.dataclass(frozen=True, kw_only=True)
class View:
    """A tab of the page.

    Attributes:
      title: its name.
      call: the name of its function.
      controls: its controls, in the order of a call.
      draw: what is drawn of their values; says in between what takes its time.
      show: HTML of the picture, and of what stands at its side.
      folded: keys of controls that are folded away.
      takes_picture: whether a call has a picture, before the values of controls.
      empty: what stands in place of the picture until something is drawn.
    """

    title: str
    call: str
    controls: tuple[Control, ...]
    draw: Callable[..., Generator[str, None, Any]]
    show: Callable[[Any], tuple[str, str]]
    folded: tuple[str, ...] = ()
    takes_picture: bool = False
    empty: str = ""


def views_of(drawer: Drawer) -> tuple[View, ...]:
    """The views of a student.

    Args:
      drawer: what draws.

    Returns:
      Samples, the way of one, a morph; and image to image where pictures are samples.
    """
    each, one = _choice(drawer, each=True), _choice(drawer, each=False)
    seed = Control(key="seed", name="seed", kind="number", value=0, high=_LARGEST_SEED)
    other = dataclasses.replace(seed, key="other_seed", name="second seed", value=1)
    nfe, teacher = _evaluations(drawer), _teacher(drawer)
    views = [
        View(
            title="Samples",
            call="draw",
            controls=(*each, seed, nfe, *_rollout(drawer), *teacher),
            folded=("substeps", "temperature"),
            draw=drawer.samples,
            show=lambda drawing: (markup.pairs(drawing), _side(drawing, "samples")),
        ),
        View(
            title="Path",
            call="path",
            controls=(*one, seed, nfe, *teacher),
            draw=drawer.path,
            show=lambda found: (markup.stage(found), markup.gap(found, _film(found))),
        ),
        View(
            title="Morph",
            call="morph",
            controls=(*each, seed, other, nfe, *teacher),
            draw=drawer.morph,
            show=lambda drawing: (
                markup.pairs(drawing, _seeds(drawing)),
                _side(drawing, "morph"),
            ),
        ),
    ]
    if drawer.edits:
        views.append(_edit(drawer, each, seed, nfe, teacher))
    return tuple(views)


def _edit(
    drawer: Drawer,
    each: tuple[Control, ...],
    seed: Control,
    nfe: Control,
    teacher: tuple[Control, ...],
) -> View:
    start, own = drawer.edited_from
    controls = (
        Control(
            key="start",
            name="noise level of the start",
            value=start,
            low=0.05,
            high=1.0,
            step=0.05,
            info="1 forgets the picture",
        ),
        dataclasses.replace(nfe, value=own),
    )
    if drawer.student.settings.data.channels == 1:
        strokes = (("dark on light", 1), ("light on dark", 0))
        controls += (
            Control(key="inverted", name="the picture is", kind="radio", value=1, choices=strokes),
        )
    return View(
        title="From a picture",
        call="edit",
        controls=(*each, seed, *controls, *teacher),
        draw=drawer.edit,
        show=lambda drawing: (markup.pairs(drawing), _side(drawing, "edit")),
        takes_picture=True,
        empty="Draw or upload a picture. Noise is added to it up to a level, and both systems "
        "continue from there.",
    )


def _choice(drawer: Drawer, each: bool) -> tuple[Control, ...]:
    """The control for classes or prompts, where there are any."""
    names = drawer.names[:_MOST_PROMPTS] if drawer.prompts is not None else drawer.names
    if not names:
        return ()
    name = "class" if drawer.prompts is None else "prompt"
    choices = tuple((name, i) for i, name in enumerate(names))
    value = 3 % len(names)
    if each and drawer.prompts is None and len(names) > 1:
        choices, value = (("one of each", EACH), *choices), EACH
    return (Control(key="label", name=name, kind="list", value=value, choices=choices),)


def _evaluations(drawer: Drawer) -> Control:
    numbers = sorted({*drawer.trained, *_EVALUATIONS})
    *some, last = map(str, sorted(drawer.trained))
    trained = f"{', '.join(some)} and {last}" if some else last
    return Control(
        key="nfe",
        name="student's evaluations",
        kind="radio",
        value=drawer.nfe,
        choices=tuple((f"{n}", n) for n in numbers),
        info=f"It was trained for {trained}; others are drawn with a note.",
    )


def _rollout(drawer: Drawer) -> list[Control]:
    """Controls of the policy, as far as the student has them."""
    controls = [Control(key="substeps", name="substeps", value=128, low=8, high=512, step=8)]
    if drawer.tempered:
        controls.append(
            Control(
                key="temperature", name="policy temperature", value=1.0, low=0.1, high=1, step=0.1
            )
        )
    if drawer.guidance:
        low, high = drawer.guidance_range or (1, 10)
        own = drawer.guidance
        controls.append(
            Control(key="guidance", name="guidance", value=own, low=low, high=high, step=0.5)
        )
    return controls


def _teacher(drawer: Drawer) -> tuple[Control, ...]:
    if drawer.teacher is None:
        return ()
    return (Control(key="teacher_nfe", name="teacher's evaluations", value=32, high=128),)


def _seeds(drawing: Drawing) -> tuple[str, str]:
    facts = drawing.facts
    return f"seed {facts['seed']}", f"seed {facts['other_seed']}"


def _side(drawing: Drawing, kind: str) -> str:
    """Times, and the picture to download."""
    rows, scale = [], -(-_SCALE // drawing.rows[0].pictures.shape[-3])
    columns = drawing.names
    for row in drawing.rows:
        if kind == "morph":
            rows += [
                (f"{name}: {row.said}" if name else row.said, frames)
                for name, frames in zip(drawing.names, row.pictures, strict=True)
            ]
            columns = ()
        else:
            rows.append((row.said, row.pictures))
    contents = png(np.asarray(draw_grid(rows, scale, columns)), drawing.facts)
    name = f"{_stem(drawing.facts)}_{kind}.png"
    said = "Download the picture, with its seed"
    device = jax.devices()[0].platform.upper()
    return markup.bars(drawing, device, _link(said, name, "png", contents))


def film_of(trajectory: Trajectory) -> bytes:
    """A sample's way as an animated WebP: the student above its teacher, states left of `x_0`."""
    rows = [
        (f"{system}, {plural(number)}", np.stack([way.states, way.x0], axis=1))
        for system, number, way in trajectory.ways
    ]
    return animation(rows, ("state", "x_0"), -(-2 * _SCALE // rows[0][1].shape[-3]))


def _film(trajectory: Trajectory) -> str:
    """The animation to download."""
    name = f"{_stem(trajectory.facts)}_path.webp"
    return _link("Download the path as an animation", name, "webp", film_of(trajectory))


def _stem(facts: dict[str, Any]) -> str:
    return f"{facts['student']}_seed{facts['seed']}_nfe{facts['nfe']}"


def _link(said: str, name: str, kind: str, contents: bytes) -> str:
    """A file that is in its own address: none is kept on the server."""
    uri = f"data:image/{kind};base64,{base64.b64encode(contents).decode()}"
    return f'<a class="pf-download" download="{name}" href="{uri}">{said}</a>'
