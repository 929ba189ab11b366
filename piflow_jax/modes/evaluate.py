"""`--mode=evaluate`: teacher, student and data side by side."""

import os

from piflow_jax.config import Config
from piflow_jax.distillation.bench import Bench, compare
from piflow_jax.distillation.sizes import Sizes
from piflow_jax.distillation.stages import warn_of_another_teacher
from piflow_jax.evaluation import Report
from piflow_jax.evaluation.adm import AdmFigures
from piflow_jax.loading.runs import load_student, load_teacher, spaces_of, student_dir
from piflow_jax.modes.adm import evaluate_latents
from piflow_jax.modes.header import say_header, say_next
from piflow_jax.systems.assembly import Systems
from piflow_jax.systems.datasets import dataset, load_source, shape_of
from piflow_jax.systems.judges import config_judge


def evaluate(
    config: Config, workdir: str | os.PathLike, *, header: bool = True
) -> Report | AdmFigures | None:
    """Measures the averaged weights of teacher and student on the same noise and labels.

    For latents, it measures one system as ADM does; see `evaluate_latents`.

    Args:
      config: the run's settings.
      workdir: the run's directory; `report.html`, `report.json` and `samples.png` are written
        there, and the teacher's samples for the next evaluation, `teacher_samples.npz`.
      header: whether to log the header of the run; training has already done so.

    Returns:
      The report, which is also printed as a table.

    Raises:
      CheckpointError: a checkpoint is missing, unusable or contradicts the settings.
      ConfigError: settings do not fit the data.
    """
    row = dataset(config)
    if row.latents:
        return evaluate_latents(config, workdir)
    source = load_source(config.data)
    data = shape_of(config, source)
    systems = Systems.of(config, data, getattr(source, "null", None))
    Sizes(systems, source).check_evaluation()
    if header:
        say_header(systems, workdir, "report.html, report.json, samples.png")
    teacher = load_teacher(config, data, workdir)
    student = load_student(config, data, workdir)
    warn_of_another_teacher(student_dir(config, workdir), teacher)
    judge, spaces = config_judge(config, source, workdir), spaces_of(student_dir(config, workdir))
    bench = Bench(config, source, data, judge, spaces)
    report = compare(bench, systems, teacher, student, workdir, keep=True)
    say_next(workdir, "report.html")
    return report
