"""A page to play with: `python -m piflow_jax.demo --checkpoint=runs/digits`.

Shows samples of a student beside its teacher's from the same noise, with the times that they took.
Students and their samplers are those of arXiv 2510.14974. Needs `pip install -e ".[demo]"`.
"""

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import piflow_jax
from piflow_jax.evaluation import draw_grid
from piflow_jax.flow.teacher import Teacher

__all__ = ["Drawer", "main", "make_page"]


@dataclasses.dataclass(frozen=True, eq=False)
class Drawer:
    """What the page's button does.

    Attributes:
      student: the student.
      teacher: the teacher of the same run, or None.
      teacher_params: its weights.
    """

    student: piflow_jax.Student
    teacher: Teacher | None = None
    teacher_params: Any = None
    _programs: dict = dataclasses.field(default_factory=dict, repr=False)

    @classmethod
    def load(cls, path: str | Path) -> "Drawer":
        """Loads a student, and its teacher where the run has one.

        Args:
          path: what `piflow_jax.load` takes.

        Returns:
          The drawer.

        Raises:
          FileNotFoundError: there is nothing at the path.
          ValueError: the student is told prompts, not classes.
        """
        student = piflow_jax.load(path)
        if student.settings.model.network != "dit":
            raise ValueError("the page shows students of classes; sample others by --mode=sample")
        if not (Path(path) / "teacher" / "checkpoints").is_dir():
            return cls(student)
        return cls(student, *piflow_jax.load_teacher(path))

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
        """Samples of one class.

        Args:
          label: the class.
          seed: of the noise, shared by student and teacher.
          nfe: the student's network evaluations.
          substeps: policy substeps per unit of raw time.
          temperature: of the mixture, in all segments but the last.
          teacher_nfe: the teacher's Euler steps; 0 leaves it out.
          count: samples.

        Returns:
          A picture, `uint8[H, W, 3]` with a row for each system, and a text with their times in
          milliseconds, compilation not counted.

        Raises:
          ValueError: a number is out of range.
        """
        labels = np.full(int(count), int(label))
        options = {"nfe": int(nfe), "substeps": int(substeps), "temperature": float(temperature)}
        systems = {
            f"student, {int(nfe)} NFE": lambda: self.student.sample(int(seed), labels, **options)
        }
        if self.teacher is not None and teacher_nfe:
            systems[f"teacher, {int(teacher_nfe)} NFE"] = lambda: self._teach(
                int(seed), labels, int(teacher_nfe)
            )
        rows, times = [], []
        for name, system in systems.items():
            jax.block_until_ready(system())  # compiles, if it has to
            start = time.perf_counter()
            images = np.asarray(system())
            times.append(f"{name}: {1e3 * (time.perf_counter() - start):.1f} ms")
            rows.append((name, images))
        return np.asarray(draw_grid(rows)), "\n".join(times)

    def _teach(self, seed: int, labels: np.ndarray, steps: int) -> jax.Array:
        if (len(labels), steps) not in self._programs:

            def sample(params, seed, labels):
                keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(
                    jnp.arange(len(labels), dtype=jnp.uint32)
                )
                noise = jax.vmap(lambda key: jax.random.normal(key, self.teacher.shape))(keys)
                warp = piflow_jax.TimeWarp(self.student.settings.train.shift)
                velocity = self.teacher.bind(params, labels)
                return piflow_jax.ode_sample(velocity, noise, steps, warp)

            self._programs[len(labels), steps] = jax.jit(sample)
        return self._programs[len(labels), steps](self.teacher_params, seed, labels)


def make_page(drawer: Drawer) -> Any:
    """The page, a `gradio.Blocks` with one function, `/draw`.

    Args:
      drawer: what draws.

    Returns:
      The page, for `.launch()`.

    Raises:
      ImportError: Gradio is not there; `pip install -e ".[demo]"`.
    """
    import gradio

    settings = drawer.student.settings
    classes = list(range(settings.data.num_classes))
    with gradio.Blocks(title="pi-Flow") as page:
        gradio.Markdown(f"# pi-Flow: a student of {settings.data.name}")
        with gradio.Row():
            with gradio.Column(scale=1):
                label = gradio.Dropdown(classes, value=classes[3 % len(classes)], label="class")
                seed = gradio.Number(0, precision=0, minimum=0, label="seed")
                nfe = gradio.Slider(1, 8, settings.train.nfe, step=1, label="student's NFE")
                substeps = gradio.Slider(8, 512, 128, step=8, label="substeps")
                temperature = gradio.Slider(0.1, 1.0, 1.0, step=0.1, label="policy temperature")
                teacher_nfe = gradio.Slider(0, 128, 32, step=1, label="teacher's NFE")
                button = gradio.Button("Draw", variant="primary")
            with gradio.Column(scale=2):
                picture = gradio.Image(label="samples", format="png", buttons=[])
                times = gradio.Textbox(label="times", lines=2)
        inputs = [label, seed, nfe, substeps, temperature, teacher_nfe]

        def draw(*values):
            try:
                return drawer.draw(*values)
            except ValueError as error:
                raise gradio.Error(str(error)) from error

        button.click(draw, inputs, [picture, times], api_name="draw")
        page.load(draw, inputs, [picture, times], api_name=False)
    return page


def main(arguments: list[str] | None = None) -> None:
    """Serves the page until it is interrupted.

    Args:
      arguments: of the command line, without the program's name.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="what piflow_jax.load takes")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 serves other machines too")
    flags = parser.parse_args(arguments)
    page = make_page(Drawer.load(flags.checkpoint))
    page.launch(server_name=flags.host, server_port=flags.port)


if __name__ == "__main__":
    main()
