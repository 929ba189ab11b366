"""`--mode=evaluate`: teacher, student and data side by side."""

import os
from pathlib import Path

import jax
from absl import logging

from piflow_jax.config import Config
from piflow_jax.evaluation import Report, as_pictures, save_grid
from piflow_jax.evaluation.adm import AdmFigures
from piflow_jax.loading.runs import load_student, load_teacher
from piflow_jax.modes.adm import config_judge, evaluate_latents
from piflow_jax.modes.measuring import Bench
from piflow_jax.modes.sizes import Sizes
from piflow_jax.systems.assembly import Systems
from piflow_jax.systems.datasets import dataset, load_source, shape_of


def evaluate(config: Config, workdir: str | os.PathLike) -> Report | AdmFigures | None:
    """Measures the averaged weights of teacher and student on the same noise and labels.

    Of latents, it measures the student alone as ADM does; see `evaluate_latents`.

    Args:
      config: the run's settings.
      workdir: the run's directory; `report.json` and `samples.png` are written there.

    Returns:
      The report, which is also printed as a table.

    Raises:
      CheckpointError: a checkpoint is missing, unusable or contradicts the settings.
      ConfigError: settings that are for other data.
    """
    row = dataset(config)
    if row.latents:
        return evaluate_latents(config, workdir)
    settings, workdir = config.evaluation, Path(workdir)
    source = load_source(config.data)
    data = shape_of(config, source)
    systems = Systems.of(config, data, getattr(source, "null", None))
    Sizes(systems, source).check_evaluation()
    bench = Bench(config, source, data, config_judge(config, source, workdir))
    logging.info("evaluation: %d samples per system", settings.num_samples)

    teacher = load_teacher(config, data, workdir)
    most = settings.teacher_steps[-1]

    def of_teacher(steps):
        return bench.sample(systems.teacher_sampler(steps), teacher)

    reference, reference_seconds = of_teacher(most)
    rows, pictures = [], {most: reference}
    for steps in settings.teacher_steps[:-1]:
        samples, seconds = of_teacher(steps)
        pictures[steps] = samples
        rows.append(bench.row("teacher", steps, samples, seconds, reference))
    rows.append(bench.row("teacher", most, reference, reference_seconds, None))
    nfe = config.sampling_nfe
    student = load_student(config, data, workdir)
    samples, seconds = bench.sample(systems.student_sampler(), student)
    rows.append(bench.row("student", nfe, samples, seconds, reference))

    report = Report(rows=rows, **bench.of_data(), protocol=bench.protocol())
    if jax.process_index() == 0:
        report.write(workdir / "report.json")
        shown = [(f"teacher, {most} NFE", most), (f"teacher, {nfe} NFE", nfe)]
        grid = [(name, pictures[key]) for name, key in shown if key in pictures]
        grid.append((f"student, {nfe} NFE", samples))
        count = settings.grid_samples
        rows = [(name, as_pictures(images[:count])) for name, images in grid]
        save_grid(workdir / "samples.png", rows)
        logging.info("\n%s\n", report.table())
        logging.info("wrote %s and %s", workdir / "report.json", workdir / "samples.png")
    return report
