"""Comparison of systems on the same noise, labels and features."""

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from piflow_jax import __version__
from piflow_jax.config import Config
from piflow_jax.data import ArraySource, Source
from piflow_jax.data.source import source_digest
from piflow_jax.distillation.grids import class_names, index_sampler
from piflow_jax.distillation.looks import Measure
from piflow_jax.distillation.page import write_page
from piflow_jax.evaluation import (
    Report,
    Row,
    as_pictures,
    class_diversity,
    frechet_distance,
    half_split_floor,
    measure,
    nearest_images,
    save_grid,
)
from piflow_jax.evaluation.kept import read_kept
from piflow_jax.origin import commit
from piflow_jax.runs.fingerprints import tree_fingerprint
from piflow_jax.runs.loop import checkpoint_dir
from piflow_jax.runs.steps import latest_step
from piflow_jax.runs.workdir import user_path
from piflow_jax.systems.assembly import Systems
from piflow_jax.systems.judges import (
    Judge,
    described,
    is_judge_of,
    real_batches,
    real_features,
    second_judge,
)
from piflow_jax.systems.sampling import (
    TEACHER_SOLVERS,
    conditions_in_turn,
    sampling_guidance,
    sampling_record,
    teacher_record,
)
from piflow_jax.systems.shapes import DataShape
from piflow_jax.systems.spec import teacher_spec
from piflow_jax.whole_files import replacing


def judged(source: Source, judge: Judge | None) -> Measure | None:
    """Measures the figures of a look in a feature space; None without one."""
    if judge is None:
        return None
    real, _ = real_features(source, judge)

    def of_samples(sampler, params, labels):
        return dataclasses.asdict(measure(sampler(params, len(labels)), labels, real, judge))

    return Measure(of_samples, described(judge))


class Bench:
    """Samples systems on the same noise and conditions, and measures them in one feature space.

    Args:
      config: the run's settings.
      source: real data.
      data: shape and conditions of the data.
      judge: the feature space.
      trained_in: feature spaces that the student was trained in.
    """

    def __init__(
        self,
        config: Config,
        source: Source,
        data: DataShape,
        judge: Judge,
        trained_in: Sequence[str] = (),
    ):
        self._config, self.source, self._data, self._judge = config, source, data, judge
        self._trained_in = trained_in
        self._conditions, labels = conditions_in_turn(source, data)
        self._real, self._real_labels = real_features(source, judge)
        self._pixels = second_judge(source, judge)
        self._real_pixels = self._pixels and real_features(source, self._pixels)[0]
        self._labels = labels[np.arange(config.evaluation.num_samples) % len(labels)]

    def sample(self, sampler: Callable, params, name: str) -> tuple[np.ndarray, float]:
        """A system's samples `[N, *sites, C]` and the seconds that sampling took."""
        number, conditions = self._config.evaluation.num_samples, self._conditions
        by_index = index_sampler(self._config, self._data, sampler, conditions, number, name)
        return by_index(params, number), by_index.seconds

    def sample_once(
        self, sampler: Callable, params: Any, name: str, path: epath.Path, made: dict[str, Any]
    ) -> tuple[np.ndarray, float]:
        """Like `sample`, but reuses an earlier evaluation's samples if they were made the same way.

        Args:
          sampler: the system's sampler.
          params: its parameters.
          name: the system's name, for the progress line.
          path: file for the samples. Several processes share the work instead.
          made: values that the samples depend on in addition to weights, noise and machine, as
            JSON.

        Returns:
          The samples, and the seconds that making them took.

        Raises:
          KeptFileError: the file is damaged.
        """
        if jax.process_count() > 1:
            return self.sample(sampler, params, name)
        settings = self._config.evaluation
        made = made | {
            "weights": tree_fingerprint(params),
            "noise": [settings.seed, settings.num_samples],
            "machine": [jax.__version__, jax.devices()[0].device_kind],
        }
        # As JSON stores them, with lists for tuples.
        made = json.loads(json.dumps(made))
        if path.exists():
            kept, samples, seconds = read_kept(path, _read_samples)
            if kept == made:
                logging.info("evaluation: took the samples in %s", path)
                return samples, seconds
        samples, seconds = self.sample(sampler, params, name)
        with replacing(path) as under_way, under_way.open("wb") as file:
            np.savez(file, made=json.dumps(made), samples=samples, seconds=seconds)
        return samples, seconds

    def row(
        self,
        system: str,
        nfe: int,
        samples: np.ndarray,
        seconds: float,
        reference: np.ndarray | None,
        labels: np.ndarray | None = None,
    ) -> Row:
        """Figures of samples; `reference` are the endpoints to compare with, if there are any.

        `labels` are those of the samples if their classes do not come in turn.
        """
        mse = None if reference is None else float(np.mean(np.square(samples - reference)))
        labels = self._labels if labels is None else labels
        by_pixels = None
        if self._pixels is not None:
            by_pixels = frechet_distance(self._pixels.extract(samples), self._real_pixels)
        return Row(
            system=system,
            nfe=nfe,
            figures=measure(samples, labels, self._real, self._judge),
            endpoint_mse=mse,
            seconds=seconds,
            pixel_frechet=by_pixels,
        )

    def of_training_data(self) -> list[Row]:
        """Figures of training images if the real images are test images: a system's floor."""
        if getattr(self.source, "test", None) is None:
            return []
        batches = real_batches(self.source, self._config.evaluation.num_samples)
        images, labels = map(np.concatenate, zip(*batches, strict=True))
        return [self.row("training images", 0, images, 0.0, None, labels)]

    @property
    def training_images(self) -> np.ndarray | None:
        """All images `[N, *sites, C]` that training sees; None where they are not in memory."""
        return self.source.x if isinstance(self.source, ArraySource) else None

    def of_data(self) -> dict[str, Any]:
        """The real data's own diversity, and one half of the data against the other."""
        return {
            "data_diversity": class_diversity(self._real, self._real_labels),
            "floor": half_split_floor(self._real),
        }

    def protocol(self) -> dict[str, Any]:
        """All settings that the figures depend on."""
        config, settings = self._config, self._config.evaluation
        record, trained = sampling_record(config), {}
        if self._trained_in:
            spaces = [*self._trained_in]
            judges = {"frechet": self._judge, "pixel_frechet": self._pixels}
            known = [name for name, it in judges.items() if it and is_judge_of(it, spaces)]
            trained = {"trained_in": spaces, "trained_on": known}
        return trained | {
            "data": self.source.name,
            "network": config.model.network,
            "real_images": len(self._real),
            "real_split": "test" if getattr(self.source, "test", None) else "train",
            "samples": settings.num_samples,
            "noise_seed": record["seed"],
            "labels": "index modulo classes",
            "features": self._judge.name,
            "features_sha256": self._judge.digest,
            "comparable": "figures of equal features_sha256",
            "clipping": "samples clipped to [-1, 1] for features, not for endpoints",
            "weights": "EMA",
            "teacher_solver": settings.teacher_solver,
            "guidance": [sampling_guidance(config), *config.teacher.guidance_interval],
            **{key: record[key] for key in ("substeps", "solver", "rounding", "temperature")},
            "checkpoint": settings.checkpoint,
            "dtype": record["dtype"],
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "version": __version__,
            "commit": commit(),
            "seed": config.seed,
        }


def compare(
    bench: Bench,
    systems: Systems,
    teacher_params: Any,
    student_params: Any,
    workdir: str | os.PathLike,
    *,
    keep: bool = False,
) -> Report:
    """Measures teacher and student on the same noise and writes a report.

    Args:
      bench: noise, conditions and the feature space.
      systems: teacher and student.
      teacher_params: the teacher's parameters.
      student_params: the student's.
      workdir: the run's directory; process 0 writes `report.html`, `report.json` and
        `samples.png` there, and `nearest.png` of training images in memory.
      keep: the teacher's samples at most evaluations are stored in `teacher_samples.npz` for the
        next comparison, because making them takes most of its time. For teachers that the settings
        describe.

    Returns:
      The report, which is also printed as a table.
    """
    config, settings, workdir = systems.config, systems.config.evaluation, user_path(workdir)
    trained = _steps(config, workdir)  # before a run that still trains goes on
    count = len(settings.teacher_steps) + len(config.sampling_nfes)
    logging.info("evaluation: %d systems, %s samples each", count, f"{settings.num_samples:,}")
    most = settings.teacher_steps[-1]

    solver = TEACHER_SOLVERS[settings.teacher_solver]

    def of_teacher(steps):
        name = _named("teacher", steps * solver.evaluations)
        return bench.sample(systems.teacher_sampler(steps), teacher_params, name)

    if keep:
        teacher = config.teacher
        made = (
            teacher_spec(config, systems.data)
            | {
                "source": source_digest(bench.source),
                "steps": most,
                "shift": config.train.shift,
                "dtype": config.model.dtype,
                "guidance": [
                    *(sampling_guidance(config), *teacher.guidance_interval),
                    teacher.orthogonal_guidance,
                ],
            }
            | teacher_record(config)
        )
        path = workdir / "teacher_samples.npz"
        reference, reference_seconds = bench.sample_once(
            systems.teacher_sampler(most),
            teacher_params,
            _named("teacher", most * solver.evaluations),
            path,
            made,
        )
    else:
        reference, reference_seconds = of_teacher(most)
    # Ends of other paths than the student's are nothing to compare its own with.
    ends = reference if solver.follows_flow else None
    rows, pictures = [], {most * solver.evaluations: reference}
    for steps in settings.teacher_steps[:-1]:
        nfe = steps * solver.evaluations
        pictures[nfe], seconds = of_teacher(steps)
        rows.append(bench.row("teacher", nfe, pictures[nfe], seconds, ends))
    rows.append(bench.row("teacher", most * solver.evaluations, reference, reference_seconds, None))
    of_student = {}
    for nfe in config.sampling_nfes:
        sampler, name = systems.student_sampler(nfe), _named("student", nfe)
        of_student[name], seconds = bench.sample(sampler, student_params, name)
        rows.append(bench.row("student", nfe, of_student[name], seconds, ends))

    rows += bench.of_training_data()
    protocol = bench.protocol() | {"steps": trained}
    report = Report(rows=rows, **bench.of_data(), protocol=protocol)
    if jax.process_index() == 0:
        report.write(workdir / "report.json")
        shown = [
            (_named("teacher", nfe), nfe)
            for nfe in (most * solver.evaluations, config.sampling_nfe)
            if nfe in pictures
        ]
        grid = [*((name, pictures[steps]) for name, steps in shown), *of_student.items()]
        count = settings.grid_samples
        rows = [(name, as_pictures(images[:count])) for name, images in grid]
        save_grid(workdir / "samples.png", rows, columns=_in_turn(bench.source, systems, count))
        if bench.training_images is not None:
            name, samples = next(iter(of_student.items()))
            found = bench.training_images[nearest_images(samples[:count], bench.training_images)]
            pairs = [(name, samples[:count]), ("nearest in training", found)]
            save_grid(workdir / "nearest.png", [(name, as_pictures(one)) for name, one in pairs])
        logging.info("\n%s\n", report.table())
        write_page(config, workdir, report)
        logging.info("wrote report.html, report.json and samples.png to %s", workdir)
    return report


def draw(
    systems: Systems,
    source: Source,
    teacher_params: Any,
    student_params: Any,
    workdir: str | os.PathLike,
) -> None:
    """Draws teacher and student from the same noise as `samples.png`, without figures.

    Args:
      systems: teacher and student.
      source: data, for its conditions.
      teacher_params: the teacher's parameters.
      student_params: the student's.
      workdir: the run's directory.
    """
    config, settings = systems.config, systems.config.evaluation
    conditions, _ = conditions_in_turn(source, systems.data)

    def samples(sampler, params, name):
        number = settings.grid_samples
        by_index = index_sampler(config, systems.data, sampler, conditions, number, name)
        return name, as_pictures(by_index(params, number))

    most = settings.teacher_steps[-1]
    name = _named("teacher", most * TEACHER_SOLVERS[settings.teacher_solver].evaluations)
    rows = [samples(systems.teacher_sampler(most), teacher_params, name)]
    rows += [
        samples(systems.student_sampler(nfe), student_params, _named("student", nfe))
        for nfe in config.sampling_nfes
    ]
    if jax.process_index() == 0:
        path = user_path(workdir) / "samples.png"
        save_grid(path, rows, columns=_in_turn(source, systems, settings.grid_samples))
        logging.info("wrote %s and %s", path, write_page(config, workdir, None))


def _steps(config: Config, workdir: epath.Path) -> dict[str, int | None]:
    """Steps of training of what was measured; None of a stage of another run."""
    student = "student/best" if config.evaluation.checkpoint == "best" else "student"
    steps = {"teacher": None, "student": latest_step(checkpoint_dir(workdir, student))}
    if not (config.teacher.checkpoint or config.teacher.weights):
        steps["teacher"] = latest_step(checkpoint_dir(workdir, "teacher"))
    return steps


def _named(system: str, nfe: int) -> str:
    return f"{system}, {nfe} NFE"


def _read_samples(path: Path) -> tuple[dict[str, Any], np.ndarray, float]:
    with np.load(path, allow_pickle=False) as archive:
        made, samples = json.loads(str(archive["made"])), archive["samples"]
        if not np.isfinite(samples).all():
            raise ValueError("its samples are not finite")
        return made, samples, float(archive["seconds"])


def _in_turn(source: Source, systems: Systems, count: int) -> list[str]:
    """Class names of the first samples; empty without classes."""
    names = class_names(source, systems.data)
    return [names[index % len(names)] for index in range(count)] if names else []
