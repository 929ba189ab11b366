"""A page to play with: `python -m piflow_jax.demo --checkpoint=runs/digits`.

Shows samples of a student beside its teacher's from the same noise, with the times that they took.
A student of latents takes their autoencoder, `--vae`. One that reads text takes prompts of a
prepared set, `--prompts`, and its teacher's weights, `--teacher`; its teacher is not drawn.
Students and their samplers are those of arXiv 2510.14974. Needs `pip install -e ".[demo]"`.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable
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
from piflow_jax.models.vae import picture_decoder
from piflow_jax.systems.datasets import DATASETS
from piflow_jax.training.checkpoint import CheckpointError

__all__ = ["Drawer", "main", "make_page"]

# Of a prepared set, in the list to choose from.
_MOST_PROMPTS = 200


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
          vae: weights of the autoencoder of latents, `.safetensors` or a folder; of a student of
            latents, which is any whose samples have neither one nor three channels.
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
        if not (Path(path) / "teacher" / "checkpoints").is_dir():
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
          milliseconds, compilation not counted.

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
    if data.num_classes:  # prepared latents know their own scale; those of prompts go by the file
        module = module.clone(latent_scale=data.latent_scale, latent_shift=data.latent_shift)
    return picture_decoder(module, params)


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
    if drawer.prompts is None:
        name, choices = "class", [(str(i), i) for i in range(settings.data.num_classes)]
    else:
        texts = drawer.prompts.prompts
        name, choices = "prompt", [(texts[i], i) for i in range(min(len(texts), _MOST_PROMPTS))]
    with gradio.Blocks(title="pi-Flow") as page:
        gradio.Markdown(f"# pi-Flow: a student of {settings.data.name}")
        with gradio.Row():
            with gradio.Column(scale=1):
                label = gradio.Dropdown(choices, value=3 % len(choices), label=name)
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
    given = {name: getattr(flags, name) for name in ("teacher", "prompts", "vae", "dtype")}
    try:
        page = make_page(Drawer.load(flags.checkpoint, **given))
    except (CheckpointError, FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    page.launch(server_name=flags.host, server_port=flags.port)


if __name__ == "__main__":
    main()
