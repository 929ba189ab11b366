"""`--mode=train`: the teacher if none is given, then the student, then the report."""

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from etils import epath

from piflow_jax.config import Config, ConfigError, naming
from piflow_jax.data import Source, has_states
from piflow_jax.distillation.grids import grid_rows
from piflow_jax.distillation.sizes import Sizes
from piflow_jax.distillation.stages import (
    check_taught,
    locked,
    run_here,
    student_stage,
    teacher_stage,
)
from piflow_jax.loading.runs import load_initial, load_teacher, spaces_of, student_dir
from piflow_jax.modes.adm import load_reference
from piflow_jax.modes.autoencoder import load_autoencoder
from piflow_jax.modes.evaluate import evaluate
from piflow_jax.modes.header import say_header
from piflow_jax.modes.look import student_look
from piflow_jax.parallel import config_mesh
from piflow_jax.runs.checkpoint import CheckpointError
from piflow_jax.systems.assembly import Systems
from piflow_jax.systems.datasets import dataset, load_source, shape_of
from piflow_jax.systems.judges import (
    described,
    independent,
    is_judge_of,
    load_inception,
    open_judge,
)
from piflow_jax.systems.networks import in_few_bits
from piflow_jax.systems.shapes import DataShape
from piflow_jax.systems.shardings import teacher_shardings
from piflow_jax.systems.spaces import open_space, spaces_with


def train(config: Config, workdir: str | os.PathLike) -> None:
    """Trains what the work directory does not have yet, and evaluates the student.

    Args:
      config: the run's settings.
      workdir: the run's directory: `teacher/` and `student/` with checkpoints and metrics,
        `report.json`, `report.html`, `samples.png`.

    Raises:
      BlockingIOError: another run is working in the directory.
      CheckpointError: a checkpoint is unusable or contradicts the settings.
      ConfigError: a teacher is to be trained on prompts.
      NonFiniteLossError: a loss became NaN or infinite.
      Interrupted: a signal came; the state is saved.
    """
    with locked(workdir, "teacher", "student", "student/best"):
        _train(config, workdir)


def _train(config: Config, workdir: str | os.PathLike) -> None:
    mesh = config_mesh(config)
    row, source = dataset(config), load_source(config.data)
    data, pixels = shape_of(config, source), not row.latents
    systems = Systems.of(config, data, getattr(source, "null", None))
    systems.teacher_network.check()
    systems.student_network.check(systems.teacher_network)
    if row.by_class:
        _check_evaluation(config, source, data, workdir)
    if not (config.train.data_free or has_states(source)):
        raise ConfigError(
            f"{config.data.data_dir} has prompts without latents: set config.train.data_free (the "
            "variant datafree), or prepare the set from a list with images and config.data.vae"
        )
    Sizes(systems, source).check_run()
    given = config.teacher.checkpoint or config.teacher.weights
    stages = f"student ({config.train.steps:,} steps)"
    if not given:
        check_taught(workdir, config.teacher.steps)
        stages = f"teacher ({config.teacher.steps:,} steps), {stages}"
    say_header(systems, workdir, stages + (", figures and samples" if row.by_class else ""))
    start = initial_start(systems)  # what it says of a wrong path comes before anything is made
    judge = None
    if pixels:
        judge = open_judge(source, workdir, config.evaluation, row.features)
    space = open_space(config, source, workdir, row.features)
    systems = dataclasses.replace(systems, space=space)
    spaces = spaces_with(space, start.get("trained_in", ()))
    if judge and is_judge_of(judge, spaces) and config.evaluation.checkpoint == "best":
        raise ConfigError(
            "config.evaluation.checkpoint = 'best' would be chosen by a distance in the features "
            f"that the student is trained in, {described(judge)}: give 'latest'"
        )
    if given:
        logging.info("teacher: given, %s", given)
    elif not row.by_class:
        raise ConfigError(
            "no teacher is trained on prompts: give config.teacher.weights or "
            "config.teacher.checkpoint"
        )
    elif in_few_bits(getattr(config.model.own, "base_dtype", None)):
        own = f"config.model.{config.model.network}.base_dtype"
        raise ConfigError(
            f"{own} is for frozen weights, and this run would train a teacher: give "
            f"config.teacher.weights or config.teacher.checkpoint, such as those of a run with "
            f"{own} = 'float32'"
        )
    else:
        run_here(teacher_stage(systems, source, mesh), config, workdir, mesh)
    shardings = teacher_shardings(config, mesh, systems.teacher_network)
    teacher_params = load_teacher(config, data, workdir, shardings)
    look = None
    if config.evaluation.every:
        look = student_look(config, source, data, independent(judge, spaces))
    stage = student_stage(systems, source, teacher_params, mesh, look=look, **start)
    run_here(stage, config, workdir, mesh)
    if not row.by_class:
        logging.info("trained; --mode=sample draws its pictures, --mode=evaluate measures them")
    elif judge or (row.latents and config.evaluation.features):
        evaluate(config, workdir, header=False)
    elif pixels:
        logging.info("trained; --mode=sample draws its pictures")
    else:
        logging.info(
            "no FID: config.evaluation.features and config.evaluation.reference are not given; "
            "--mode=evaluate says what they are"
        )


def initial_start(systems: Systems) -> dict[str, Any]:
    """How the student starts where `config.train.initial` names another one."""
    path = systems.config.train.initial
    if not path:
        return {}
    with naming(f"config.train.initial = {path!r}", CheckpointError, FileNotFoundError):
        initial, spaces = load_initial(systems), spaces_of(path)
    return {
        "start": lambda key, given: jax.tree.map(jnp.copy, given),
        "initial": initial,
        "trained_in": spaces,
    }


def _check_evaluation(
    config: Config, source: Source, data: DataShape, workdir: str | os.PathLike
) -> None:
    """Opens what looks and the evaluation will need, before days are spent on training."""
    settings, steps = config.evaluation, config.train.steps
    measured = not dataset(config).latents or settings.features or settings.reference
    if settings.every:
        grid_rows(config, source, data)
    if settings.checkpoint == "best" and not epath.Path(student_dir(config, workdir)).exists():
        if not 0 < settings.every <= steps:
            raise ConfigError(
                "config.evaluation.checkpoint = 'best' needs looks at the student while it trains; "
                f"set config.evaluation.every to at most config.train.steps = {steps:,}"
            )
        if not measured:
            raise ConfigError(
                "config.evaluation.checkpoint = 'best' needs looks with figures; set "
                "config.evaluation.features and config.evaluation.reference"
            )
    if not dataset(config).latents:
        return
    if config.data.vae or measured or settings.every:
        load_autoencoder(config, data)
    if measured:
        load_reference(config, load_inception(config.evaluation))
