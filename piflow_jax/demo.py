"""A page to play with: `python -m piflow_jax.demo --checkpoint=runs/digits`.

Shows samples of a student next to its teacher's, from the same noise, with the times they took.
A student of latents takes their autoencoder, `--vae`. One that reads text takes prompts of a
prepared set, `--prompts`, and its teacher's weights, `--teacher`; its teacher is not drawn.
Students and their samplers are those of arXiv 2510.14974. Needs `pip install -e ".[demo]"`.
"""

import argparse
import dataclasses
import math
import re
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import piflow_jax
from piflow_jax.config import DataConfig
from piflow_jax.convert import open_autoencoder
from piflow_jax.data import stacked
from piflow_jax.evaluation import draw_grid
from piflow_jax.flow.teacher import Teacher
from piflow_jax.keys import index_keys, index_noise, seed_key
from piflow_jax.models.vae import picture_decoder
from piflow_jax.runs.checkpoint import CheckpointError
from piflow_jax.runs.workdir import user_path
from piflow_jax.systems.datasets import DATASETS
from piflow_jax.systems.sampling import sampling_cautions, teacher_sampler

__all__ = ["Drawer", "main", "make_page", "serve"]

# Of a prepared set, in the list to choose from.
_MOST_PROMPTS = 200
_PROGRAMS = 16  # numbers of the teacher's steps whose programs are kept; a student keeps its own
_WAITING = 8  # calls that may wait for their turn
_LARGEST_SEED = 2**31 - 1
_LARGEST_CALL = 2**16  # bytes
_KEPT_SECONDS = 3600  # how long a picture can be fetched
# What a page calls that takes no files.
_CALLS = re.compile(r"/gradio_api/(queue/join|(call|call/v2|run|api)/draw|reset|cancel)/?")


@dataclasses.dataclass(frozen=True, eq=False)
class Drawer:
    """What the page's button does.

    Attributes:
      student: the student.
      teacher: the teacher of the same run, guided as the student was taught, or None.
      teacher_params: its weights.
      prompts: of a student that reads text, a source of prompts with their embeddings.
      decode: latents `[N, H, W, C]` to pictures, where samples are latents.
    """

    student: piflow_jax.Student
    teacher: Teacher | None = None
    teacher_params: Any = None
    prompts: Any = None
    decode: Callable[[jax.Array], jax.Array] | None = None
    _programs: dict = dataclasses.field(default_factory=dict, repr=False)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        teacher: str | Path | None = None,
        prompts: str | Path | None = None,
        vae: str | Path | None = None,
        dtype: str = "float32",
    ) -> "Drawer":
        """Loads a student, and its teacher where the run has one.

        Args:
          path: what `piflow_jax.load` takes.
          teacher: the same, of a student that reads text.
          prompts: directory of prepared prompts, likewise; captioned digits need none.
          vae: weights of the autoencoder, `.safetensors` or a folder, for a student of latents.
            Samples with neither one nor three channels are latents.
          dtype: compute dtype of the student's network, as of `piflow_jax.load`.

        Returns:
          The drawer.

        Raises:
          CheckpointError: the run's student has no checkpoint yet, or an unusable one.
          FileNotFoundError: there is nothing at the path.
          ValueError: prompts, teacher or autoencoder are missing or others'.
        """
        student = piflow_jax.load(path, dtype=dtype, teacher=teacher)
        data = student.settings.data
        decode = _decoder(data, vae)
        if student.network.conditioning.reads_text:
            row = DATASETS[data.name]
            if prompts is None and not row.bundled:
                raise ValueError(
                    "this student reads text: pass --prompts, a directory that --mode=prepare made"
                )
            source = row.load(DataConfig(name=data.name, data_dir=prompts or ""))
            return cls(student, prompts=source, decode=decode)
        if not (user_path(path) / "teacher" / "checkpoints").is_dir():
            return cls(student, decode=decode)
        return cls(student, *piflow_jax.load_teacher(path), decode=decode)

    def draw(
        self,
        label: int,
        seed: int,
        nfe: int,
        substeps: int,
        temperature: float,
        teacher_nfe: int,
        count: int = 8,
    ) -> tuple[np.ndarray, str]:
        """Samples of one class or prompt.

        Args:
          label: the class, or the number of the prompt.
          seed: of the noise, shared by student and teacher.
          nfe: the student's network evaluations.
          substeps: policy substeps per unit of raw time.
          temperature: of the mixture, in all segments but the last.
          teacher_nfe: the teacher's Euler steps; 0 leaves it out.
          count: samples.

        Returns:
          A picture, `uint8[H, W, 3]` with a row for each system, and a text with their times in
          milliseconds, compilation not counted, and with what the student was not trained for.

        Raises:
          ValueError: a number is out of range.
        """
        options = {"nfe": int(nfe), "substeps": int(substeps), "temperature": float(temperature)}
        if self.prompts is None:
            labels = np.full(int(count), int(label))
        else:
            example = self.prompts[int(label)]
            labels = stacked([example["condition"]] * int(count))
            options["size"] = example["x"].shape[:2]
        systems = {
            f"student, {int(nfe)} NFE": lambda: self.student.sample(int(seed), labels, **options)
        }
        if self.teacher is not None and teacher_nfe:
            scale = self.teacher.guidance_scale
            guided = "" if scale == 1 else f", guidance {scale:g}"
            systems[f"teacher, {int(teacher_nfe)} NFE{guided}"] = lambda: self._teach(
                int(seed), labels, int(teacher_nfe)
            )
        rows, times = [], []
        for name, system in systems.items():

            def pictures(system=system):
                return np.asarray(system() if self.decode is None else self.decode(system()))

            pictures()  # compiles, if it has to
            start = time.perf_counter()
            rows.append((name, pictures()))
            times.append(f"{name}: {1e3 * (time.perf_counter() - start):.1f} ms")
        train = self.student.settings.train
        options = {"temperature": float(temperature)}
        notes = sampling_cautions(train, int(nfe), **options)
        return np.asarray(draw_grid(rows)), "\n".join([*times, *notes])

    def _teach(self, seed: int, labels: np.ndarray, steps: int) -> jax.Array:
        name = (len(labels), steps)
        # Used last, at the end; the one in front goes.
        self._programs[name] = self._programs.pop(name, None) or self._compiled(steps)
        if len(self._programs) > _PROGRAMS:
            del self._programs[next(iter(self._programs))]
        return self._programs[name](self.teacher_params, seed_key(seed), labels)

    def _compiled(self, steps: int) -> Callable[..., jax.Array]:
        teacher = teacher_sampler(self.teacher, self.student.settings.train.shift, steps)

        def sample(params, key, labels):
            keys = index_keys(key, jnp.arange(len(labels), dtype=jnp.uint32))
            noise = index_noise(keys, self.teacher.shape)
            return teacher(params, noise, labels)

        return jax.jit(sample)


def _decoder(data: Any, vae: str | Path | None) -> Callable[[jax.Array], jax.Array] | None:
    """What makes pictures of samples; None where these are pixels."""
    if data.channels in (1, 3):
        if vae is not None:
            raise ValueError("this student's samples are pixels: leave --vae out")
        return None
    if vae is None:
        raise ValueError(
            f"samples are latents of {data.channels} channels: pass --vae, the autoencoder's "
            "weights"
        )
    module, params = open_autoencoder(vae)
    if module.latent_channels != data.channels:
        raise ValueError(
            f"--vae is of latents with {module.latent_channels} channels, the student's samples "
            f"have {data.channels}"
        )
    return picture_decoder(data.decoder(module), params)


@dataclasses.dataclass(frozen=True)
class _Control:
    """A control of the page, and what of the values that a call may send it takes.

    Attributes:
      name: its label.
      low: the smallest value.
      high: the largest.
      value: where it stands at first.
      step: between values; a slider's value is the nearest, other controls take no value between.
      choices: names of the values, of a list.
    """

    name: str
    low: float
    high: float
    value: float
    step: float = 1
    choices: tuple[str, ...] = ()
    slider: bool = True

    def component(self) -> Any:
        """The control on the page."""
        import gradio

        if self.choices:
            choices = [(name, i) for i, name in enumerate(self.choices)]
            return gradio.Dropdown(choices, value=self.value, label=self.name)
        if not self.slider:
            return gradio.Number(
                self.value, precision=0, minimum=self.low, maximum=self.high, label=self.name
            )
        return gradio.Slider(self.low, self.high, self.value, step=self.step, label=self.name)

    def read(self, sent: Any) -> float:
        """A value of the control for what a call sent.

        Raises:
          ValueError: there is none; names the control.
        """
        number = isinstance(sent, int | float) and not isinstance(sent, bool)
        if not number or not math.isfinite(sent):
            raise ValueError(f"{self.name} must be a number, got {str(sent)[:40]!r}")
        if not self.slider and not (self.low <= sent <= self.high and sent == int(sent)):
            raise ValueError(
                f"{self.name} must be a whole number from {self.low} to {self.high}, got {sent}"
            )
        steps = round((min(max(sent, self.low), self.high) - self.low) / self.step)
        return round(self.low + steps * self.step, 6)


def _controls(drawer: Drawer) -> tuple[_Control, ...]:
    """The page's controls, in the order of `Drawer.draw`."""
    data, nfe = drawer.student.settings.data, drawer.student.settings.train.nfe
    if drawer.prompts is None:
        name, choices = "class", tuple(map(str, range(data.num_classes)))
    else:
        name, choices = "prompt", tuple(drawer.prompts.prompts[:_MOST_PROMPTS])
    last = len(choices) - 1
    return (
        _Control(name, 0, last, 3 % len(choices), choices=choices, slider=False),
        _Control("seed", 0, _LARGEST_SEED, 0, slider=False),
        _Control("student's NFE", 1, max(8, nfe), nfe),
        _Control("substeps", 8, 512, 128, step=8),
        _Control("policy temperature", 0.1, 1.0, 1.0, step=0.1),
        _Control("teacher's NFE", 0, 128, 32),
    )


def make_page(drawer: Drawer) -> Any:
    """The page, a `gradio.Blocks` with one function, `/draw`.

    Values that its controls do not have are put to the nearest that they have, or refused. Calls
    are drawn one after the other. A few may wait; for others the page says that the queue is full.

    Args:
      drawer: what draws.

    Returns:
      The page, for `serve`, or `.launch()` where it is one's own machine's.

    Raises:
      ImportError: Gradio is not there; `pip install -e ".[demo]"`.
    """
    import gradio

    controls = _controls(drawer)
    with gradio.Blocks(
        title="pi-Flow",
        analytics_enabled=False,
        delete_cache=(_KEPT_SECONDS, _KEPT_SECONDS),
    ) as page:
        gradio.Markdown(f"# pi-Flow: a student of {drawer.student.settings.data.name}")
        with gradio.Row():
            with gradio.Column(scale=1):
                inputs = [control.component() for control in controls]
                button = gradio.Button("Draw", variant="primary")
            with gradio.Column(scale=2):
                picture = gradio.Image(label="samples", format="png", buttons=[])
                times = gradio.Textbox(label="times", lines=2)

        def draw(*sent):
            try:
                values = [control.read(one) for control, one in zip(controls, sent, strict=True)]
                return drawer.draw(*values)
            except ValueError as error:
                raise gradio.Error(str(error)) from error

        # The controls' own checks know no steps, and end in tracebacks for what is no number.
        outputs, unread = [picture, times], {"preprocess": False}
        button.click(draw, inputs, outputs, api_name="draw", **unread)
        page.load(draw, inputs, outputs, api_name=False, **unread)
    return page.queue(max_size=_WAITING)


class _Guard:
    """ASGI middleware: lets through what the page needs, from where it may come.

    Pages of other origins cannot start anything here, nor is a file taken, since no control of the
    page has one.

    Args:
      app: what is guarded.
      origins: other origins whose calls are let in, such as `https://example.org`; `*` is any.
    """

    def __init__(self, app: Callable, origins: Sequence[str] = ()):
        self._app = app
        self._origins = origins

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        """An ASGI call."""
        answer = self._refusal(scope) if scope["type"] == "http" else None
        if answer is None:
            return await self._app(scope, receive, send)
        status, words = answer
        kind = (b"content-type", b"text/plain; charset=utf-8")
        await send({"type": "http.response.start", "status": status, "headers": [kind]})
        await send({"type": "http.response.body", "body": words.encode()})

    def _refusal(self, scope: dict) -> tuple[int, str] | None:
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return None
        if not _CALLS.fullmatch(scope["path"]):
            return 404, "this page takes no files"
        headers = {name.decode("latin-1"): v.decode("latin-1") for name, v in scope["headers"]}
        length = headers.get("content-length", "")
        if not length.isdecimal() or int(length) > _LARGEST_CALL:
            return 413, f"a call must say its length, of at most {_LARGEST_CALL} bytes"
        origin, host = headers.get("origin"), headers.get("host")
        own = None, f"http://{host}", f"https://{host}"
        if origin not in (*own, *self._origins) and "*" not in self._origins:
            return 403, f"calls from {origin[:200]} are let in by --origin alone"
        return None


def serve(page: Any, host: str, port: int, *, origins: Sequence[str] = (), **options: Any) -> Any:
    """Serves a page so that it can be exposed: it takes its own calls and nothing else.

    Args:
      page: from `make_page`.
      host: address to listen at; 0.0.0.0 is all of the machine's.
      port: port to listen at.
      origins: other origins whose calls are let in, such as `https://example.org`; `*` is any.
      options: for `gradio.Blocks.launch`.

    Returns:
      What `launch` returns.
    """
    guard = (_Guard, (), {"origins": tuple(origins)})
    return page.launch(
        server_name=host, server_port=port, app_kwargs={"middleware": [guard]}, **options
    )


def main(arguments: list[str] | None = None) -> None:
    """Serves the page until it is interrupted.

    Args:
      arguments: of the command line, without the program's name.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="what piflow_jax.load takes")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 serves other machines too")
    parser.add_argument(
        "--origin",
        action="append",
        default=[],
        help="whose pages may call this one too, such as https://example.org; * is any",
    )
    parser.add_argument("--prompts", help="prepared prompts, for a student that reads text")
    parser.add_argument("--teacher", help="weights of its teacher, or the run that has them")
    parser.add_argument("--vae", help="the autoencoder of its latents")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="the network's compute dtype",
    )
    flags = parser.parse_args(arguments)
    try:  # before what may take minutes
        with socket.socket(socket.AF_INET6 if ":" in flags.host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((flags.host, flags.port))
    except (OSError, OverflowError) as error:
        parser.error(f"cannot listen at {flags.host}, port {flags.port} ({error}): pass another")
    given = {name: getattr(flags, name) for name in ("teacher", "prompts", "vae", "dtype")}
    try:
        page = make_page(Drawer.load(flags.checkpoint, **given))
    except (CheckpointError, FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    serve(page, flags.host, flags.port, origins=flags.origin)


if __name__ == "__main__":
    main()
