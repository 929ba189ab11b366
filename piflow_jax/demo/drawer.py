"""What the page draws: a student next to its teacher, from the same noise.

Students and their samplers are those of arXiv 2510.14974.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Generator, Hashable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import piflow_jax
from piflow_jax.config import DataConfig
from piflow_jax.data import stacked
from piflow_jax.demo.drawings import Batch, Drawing, Row, Trajectory, plural
from piflow_jax.demo.paths import Way, between, follow_policy, step_teacher, teacher_way
from piflow_jax.demo.pictures import decoder_of
from piflow_jax.evaluation import as_pictures
from piflow_jax.flow.schedule import TimeWarp
from piflow_jax.flow.teacher import Teacher
from piflow_jax.keys import index_keys, index_noise, seed_key
from piflow_jax.loading import shipped_names
from piflow_jax.runs.workdir import user_path
from piflow_jax.systems.datasets import DATASETS
from piflow_jax.systems.policies import POLICIES
from piflow_jax.systems.sampling import (
    ROUNDING,
    sampling_cautions,
    student_policy,
    student_times,
)

EACH = -1
"""In place of a class: one sample of each."""

_TILES, _FEW = 12, 4  # samples of a picture, and of one whose samples are large
_LARGE = 64 * 64  # sites
_MORPHED, _MOST_FRAMES = 128, 17
_FRAMES, _FEW_FRAMES = 33, 9  # of a path
_SUBSTEPS = 128  # of a path
_TIMED, _TIMED_SECONDS = 5, 0.3
_PROGRAMS = 16  # no more than students keep, or what is timed might be compiled anew
_kept: dict[Hashable, Callable[..., Any]] = {}


@dataclasses.dataclass(frozen=True, eq=False)
class Drawer:
    """Draws what the page shows. What compiles a program says so before.

    Attributes:
      student: the student.
      teacher: the teacher of the same run, guided as the student was taught, or None.
      teacher_params: its weights.
      prompts: of a student that reads text, a source of prompts with their embeddings.
      decode: latents `[N, H, W, C]` to pictures, where samples are latents.
      name: of the student; by default that of its data.
    """

    student: piflow_jax.Student
    teacher: Teacher | None = None
    teacher_params: Any = None
    prompts: Any = None
    decode: Callable[[jax.Array], jax.Array] | None = None
    name: str = ""

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
          teacher: what `piflow_jax.load_teacher` takes; by default that of the same run, or of the
            same name. Of a student that reads text, see `piflow_jax.load`.
          prompts: directory of prepared prompts, likewise; captioned digits need none.
          vae: weights of the autoencoder, `.safetensors` or a folder, for a student of latents.
            Samples with neither one nor three channels are latents.
          dtype: compute dtype of the student's network, as of `piflow_jax.load`.

        Returns:
          The drawer.

        Raises:
          CheckpointError: the run's student has no checkpoint yet, or an unusable one.
          FileNotFoundError: there is nothing at the path.
          ValueError: prompts, teacher or autoencoder are missing, others' or of no use to the
            student, or it has conditions of its own.
        """
        student = piflow_jax.load(path, dtype=dtype, teacher=teacher)
        data = student.settings.data
        if data.conditions:
            raise ValueError("this student's conditions are arrays of your own: the page has none")
        decode = decoder_of(data, vae)
        if student.network.conditioning.reads_text:
            row = DATASETS[data.name]
            if prompts is None and not row.bundled:
                raise ValueError(
                    "this student reads text: pass --prompts, a directory that --mode=prepare made"
                )
            source = row.load(DataConfig(name=data.name, data_dir=prompts or ""))
            return cls(student, prompts=source, decode=decode)
        if prompts is not None:
            raise ValueError("this student reads no text: leave --prompts out")
        run = (user_path(path) / "teacher" / "checkpoints").is_dir()
        name = str(path) if str(path) in shipped_names() else ""
        if teacher is None and not run and not name:
            return cls(student, decode=decode)
        pair = piflow_jax.load_teacher(teacher or path)
        return cls(student, *pair, decode=decode, name=name)

    @property
    def title(self) -> str:
        """Name of the student in words, such as `fashion mnist`."""
        return (self.name or self.student.settings.data.name).replace("_", " ")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of classes or prompts; empty where there are none."""
        return tuple(self.student.class_names if self.prompts is None else self.prompts.prompts)

    @property
    def nfe(self) -> int:
        """Network evaluations of the student where none are asked for."""
        return self.student.settings.train.nfe

    @property
    def trained(self) -> tuple[int, ...]:
        """Numbers of network evaluations that the student was trained for."""
        return self.student.settings.train.evaluations

    @property
    def tempered(self) -> bool:
        """Whether the policy has a temperature."""
        return POLICIES[self.student.settings.policy.kind].tempered

    @property
    def guidance(self) -> float:
        """The guidance scale that the student takes by default; 0 if it takes none."""
        return self.student.network.conditioning.guidance

    @property
    def guidance_range(self) -> tuple[float, ...]:
        """`(low, high)` of the scales that the student was trained for; empty for a single one."""
        return self.student.network.conditioning.guidance_range

    @property
    def edits(self) -> bool:
        """Whether a picture can be a sample: pixels of a square."""
        data = self.student.settings.data
        return self.decode is None and data.sites is None and data.channels in (1, 3)

    @property
    def edited_from(self) -> tuple[float, int]:
        """Noise level from which the student can take a picture, and evaluations from there.

        That is where a segment in the middle starts. With a single one it was not trained to.
        """
        most = max(self.trained)
        if most == 1:
            return 0.6, 1
        middle = most // 2
        times = student_times(self.student.settings.train, most)
        return round(float(times.src[middle]), 6), most - middle

    def samples(
        self,
        label: int,
        seed: int,
        nfe: int,
        teacher_nfe: int = 0,
        substeps: int = 128,
        temperature: float = 1.0,
        guidance: float | None = None,
        count: int | None = None,
    ) -> Generator[str, None, Drawing]:
        """Samples of one class or prompt, or one of each.

        Args:
          label: the class, or the number of the prompt; or `EACH`.
          seed: of the noise, shared by student and teacher.
          nfe: the student's network evaluations.
          teacher_nfe: the teacher's Euler steps; 0 leaves it out.
          substeps: policy substeps per unit of raw time.
          temperature: of the mixture, in all segments but the last.
          guidance: guidance scale, of a student that takes it; its teacher has the same.
          count: samples; by default as many as fit into a picture.

        Yields:
          Sentences that say what is being compiled.

        Returns:
          The drawing.

        Raises:
          ValueError: a number is out of range.
        """
        batch = self._batch(label, seed, count)
        options = {"substeps": substeps, "temperature": temperature}
        options |= {} if guidance is None else {"guidance": guidance}
        rows = yield from self._rows(batch, nfe, teacher_nfe, options)
        as_trained = None
        if nfe not in self.trained and len(rows) > 1:
            as_trained = yield from self._student(batch, self.nfe, options)
        facts = self._facts(label=label, seed=seed, nfe=nfe, teacher_nfe=teacher_nfe, **options)
        notes = self._cautions(nfe, temperature=temperature, guidance=options.get("guidance", ()))
        return Drawing(batch.names, rows, notes, facts, as_trained)

    def morph(
        self, label: int, seed: int, other_seed: int, nfe: int, teacher_nfe: int = 0
    ) -> Generator[str, None, Drawing]:
        """Samples while the noise turns from that of one seed to that of another.

        Args:
          label: see `samples`.
          seed: of the first noise.
          other_seed: of the last noise.
          nfe: see `samples`.
          teacher_nfe: see `samples`.

        Yields:
          Sentences that say what is being compiled.

        Returns:
          The drawing, whose rows have frames.
        """
        # Of large samples one: all frames are drawn at once.
        count = None if _is_small(self._shape(label)) else 1
        batch, last = (self._batch(label, one, count) for one in (seed, other_seed))
        many, *shape = batch.noise.shape
        frames = min(_MOST_FRAMES, _MORPHED // many) if count is None else _FEW_FRAMES
        noise = np.asarray(between(batch.noise, last.noise, frames)).reshape(-1, *shape)
        condition = jax.tree.map(lambda a: np.repeat(a, frames, axis=0), batch.condition)
        flat = dataclasses.replace(batch, noise=noise, condition=condition)
        rows = yield from self._rows(flat, nfe, teacher_nfe, {})
        rows = tuple(row.folded(many, frames) for row in rows)
        facts = self._facts(
            label=label, seed=seed, other_seed=other_seed, nfe=nfe, teacher_nfe=teacher_nfe
        )
        return Drawing(batch.names, rows, self._cautions(nfe), facts)

    def edit(
        self,
        picture: np.ndarray,
        label: int,
        seed: int,
        start: float,
        nfe: int,
        teacher_nfe: int = 0,
    ) -> Generator[str, None, Drawing]:
        """Image to image: noise is added to a picture and removed again.

        Args:
          picture: `[H, W, C]` in [-1, 1], of the shape of samples.
          label: see `samples`.
          seed: see `samples`.
          start: noise level at which the systems start, in (0, 1].
          nfe: see `samples`.
          teacher_nfe: see `samples`; from a lower start the teacher takes fewer steps.

        Yields:
          Sentences that say what is being compiled.

        Returns:
          The drawing.
        """
        batch = self._batch(label, seed)
        options = {}
        if start < 1:
            options = {"start": start, "x": np.broadcast_to(np.float32(picture), batch.noise.shape)}
        rows = yield from self._rows(batch, nfe, teacher_nfe, options)
        facts = self._facts(label=label, seed=seed, start=start, nfe=nfe, teacher_nfe=teacher_nfe)
        return Drawing(batch.names, rows, self._cautions(nfe, start=start), facts)

    def path(
        self, label: int, seed: int, nfe: int, teacher_nfe: int = 0
    ) -> Generator[str, None, Trajectory]:
        """The way of one sample, the first of its seed.

        Args:
          label: a class, or the number of a prompt.
          seed: see `samples`.
          nfe: see `samples`.
          teacher_nfe: see `samples`.

        Yields:
          Sentences that say what is being compiled.

        Returns:
          The trajectory.
        """
        batch = self._batch(label, seed, 1)
        small = self.decode is None and _is_small(batch.noise.shape[1:])
        taus = np.linspace(1, 0, _FRAMES if small else _FEW_FRAMES)
        student, train, warp = self.student, self.student.settings.train, self._warp

        def follow(params, x, condition):
            predict = student_policy(student.network, student.settings.policy, train)
            return follow_policy(
                lambda x, t: predict(params, x, t, condition),
                x,
                student_times(train, nfe),
                warp,
                taus,
                substeps=_SUBSTEPS,
                solver="multistep",
                rounding=ROUNDING,
            )

        arguments = batch.noise, batch.arrays
        way, _ = yield from self._called(
            ("path", batch.noise.shape, nfe),
            f"the student's path of {plural(nfe)}",
            lambda: functools.partial(jax.jit(follow), student.params),
            *arguments,
        )
        ways = [("student", nfe, self._shown(way))]
        if self.teacher is not None and teacher_nfe:
            (_, states, velocities), _ = yield from self._called(
                ("teacher's path", batch.noise.shape, teacher_nfe),
                f"the teacher's path of {plural(teacher_nfe)}",
                lambda: functools.partial(jax.jit(self._steps), self.teacher_params),
                *arguments,
                self._levels(1.0, teacher_nfe),
            )
            way = teacher_way(states[:, 0], velocities[:, 0], warp, taus)
            ways.append(("teacher", teacher_nfe, self._shown(way)))
        facts = self._facts(label=label, seed=seed, nfe=nfe, teacher_nfe=teacher_nfe)
        return Trajectory(batch.names[0], taus, warp.warp(taus), tuple(ways), facts)

    @property
    def _warp(self) -> TimeWarp:
        return TimeWarp(self.student.settings.train.shift)

    def _shape(self, label: int) -> tuple[int, ...]:
        """Shape `(*sites, C)` of a sample; prompts may have several."""
        if self.prompts is None:
            return self.student.settings.data.shape
        return self.prompts[label]["x"].shape

    def _batch(self, label: int, seed: int, count: int | None = None) -> Batch:
        """Samples that are asked for, and their noise: that of `Student.sample`."""
        names, shape = self.names, self._shape(label)
        count = count or (_TILES if _is_small(shape) else _FEW)
        said, condition = ("",) * count, None
        if self.prompts is not None:
            condition = stacked([self.prompts[label]["condition"]] * count)
        elif names:
            condition = np.full(count, label)
            if label == EACH:
                some = np.rint(np.linspace(0, len(names) - 1, min(len(names), count)))
                condition = np.repeat(some.astype(int), max(count // len(some), 1))
            said = tuple(names[one] for one in condition)
        keys = (seed_key(int(seed)), len(said), tuple(shape))
        return Batch(said, condition, np.asarray(_noise(*keys)))

    def _rows(
        self, batch: Batch, nfe: int, teacher_nfe: int, options: dict[str, Any]
    ) -> Generator[str, None, tuple[Row, ...]]:
        """Both systems' samples of a batch."""
        student = yield from self._student(batch, nfe, options)
        if self.teacher is None or not teacher_nfe:
            return (student,)
        start, noise = options.get("start", 1.0), batch.noise
        own = self.guidance if self.guidance_range else self.teacher.guidance_scale
        scale = options.get("guidance", own)
        if start < 1:
            teacher_nfe = max(round(teacher_nfe * float(self._warp.unwarp(start))), 1)
            noise = (1 - start) * options["x"] + start * noise
        (samples, pictures), seconds = yield from self._called(
            ("teacher", noise.shape, teacher_nfe),
            f"the teacher of {plural(teacher_nfe)}",
            lambda: self._drawing(jax.jit(lambda *given: self._steps(*given)[0])),
            self.teacher_params,
            noise,
            batch.arrays,
            self._levels(start, teacher_nfe),
            *([np.float32(scale)] if self.guidance_range else []),
        )
        return student, Row("teacher", teacher_nfe, samples, pictures, seconds, scale)

    def _student(
        self, batch: Batch, nfe: int, options: dict[str, Any]
    ) -> Generator[str, None, Row]:
        condition = len(batch.noise) if batch.condition is None else batch.condition
        size = batch.noise.shape[1:3] if self.prompts is not None else None

        def sample(**options):
            return self.student.sample(0, condition, noise=batch.noise, size=size, **options)

        options = {"nfe": nfe, **options}
        (samples, pictures), seconds = yield from self._called(
            ("student", batch.noise.shape, nfe, options.get("substeps"), "x" in options),
            f"the student of {plural(nfe)}",
            lambda: self._drawing(lambda sample, options: sample(**options)),
            sample,
            options,
        )
        return Row("student", nfe, samples, pictures, seconds)

    def _steps(self, params: Any, noise: Any, condition: Any, levels: Any, *scale: Any) -> Any:
        guided = {"guidance_scale": scale[0]} if scale else {}
        teacher = dataclasses.replace(self.teacher, **guided)
        return step_teacher(teacher.bind(params, condition), noise, levels)

    def _levels(self, start: float, steps: int) -> np.ndarray:
        taus = np.linspace(float(self._warp.unwarp(start)), 0, steps + 1)
        return np.float32(self._warp.warp(taus))

    def _drawing(self, sample: Callable[..., jax.Array]) -> Callable[..., Any]:
        """Samples as they are and as pictures."""

        def draw(*arguments):
            samples = sample(*arguments)
            return samples, self._pictures(samples)

        return draw

    def _called(
        self,
        key: Hashable,
        said: str,
        make: Callable[[], Callable[..., Any]],
        *arguments: Any,
    ) -> Generator[str, None, tuple[Any, float]]:
        """The arrays that a program makes, and the seconds that it takes once it is compiled.

        The programs that were used last are kept, of all drawers together, as of all students.
        """
        program = _kept.pop((self, key), None)
        if program is None:
            yield f"Compiling {said}, which takes up to a minute, once."
            program = make()
            jax.block_until_ready(program(*arguments))
        _kept[self, key] = program
        if len(_kept) > _PROGRAMS:
            _kept.pop(next(iter(_kept)), None)
        seconds = []
        # The least of a few: other work on the machine only adds.
        while len(seconds) < _TIMED and sum(seconds) < _TIMED_SECONDS:
            begin = time.perf_counter()
            found = jax.tree.map(np.asarray, program(*arguments))
            seconds.append(time.perf_counter() - begin)
        return found, min(seconds)

    def _pictures(self, samples: Any) -> np.ndarray:
        if self.decode is not None:
            samples = self.decode(jnp.asarray(samples))
        return as_pictures(samples)

    def _shown(self, way: Way) -> Way:
        """A way whose states are pictures."""
        return way._replace(states=self._pictures(way.states), x0=self._pictures(way.x0))

    def _cautions(self, nfe: int, **options: Any) -> tuple[str, ...]:
        train, scales = self.student.settings.train, self.guidance_range
        return tuple(sampling_cautions(train, nfe, guidance_range=scales, **options))

    def _facts(self, **facts: Any) -> dict[str, Any]:
        """What a drawing was made of, for its file."""
        made = {"student": self.title.replace(" ", "_"), "version": piflow_jax.__version__}
        guided = {"guidance": self.guidance} if self.guidance else {}
        return made | guided | facts


def _is_small(shape: tuple[int, ...]) -> bool:
    return np.prod(shape[:-1]) <= _LARGE


@functools.partial(jax.jit, static_argnums=(1, 2))
def _noise(key: jax.Array, count: int, shape: tuple[int, ...]) -> jax.Array:
    return index_noise(index_keys(key, jnp.arange(count, dtype=jnp.uint32)), shape)
