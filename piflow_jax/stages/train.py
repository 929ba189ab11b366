"""`--mode=train`: the teacher if none is given, then the student, then the report."""

import dataclasses
import os
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh

from piflow_jax.config import Config, ConfigError
from piflow_jax.data import batches, load_source
from piflow_jax.evaluation import FEATURE_SPACES
from piflow_jax.parallel import ActivationSharding, config_mesh, gathered, local_rows
from piflow_jax.stages.adm import load_inception, load_reference
from piflow_jax.stages.autoencoder import check_autoencoder, load_autoencoder
from piflow_jax.stages.evaluate import evaluate
from piflow_jax.stages.look import student_look
from piflow_jax.stages.systems import load_teacher, student_shardings, teacher_shardings
from piflow_jax.training.fingerprints import tree_fingerprint
from piflow_jax.training.loop import Stage, run_stage
from piflow_jax.training.networks import (
    DataShape,
    abstract_params,
    init_params,
    initial_student,
    student_network,
    student_spec,
    teacher_network,
    teacher_spec,
    with_base,
)
from piflow_jax.training.optimizer import make_optimizer
from piflow_jax.training.run_lock import RunLock
from piflow_jax.training.state import TrainState
from piflow_jax.training.step import distill_step, teacher_step

# Streams of randomness, folded into the seed, so that no two uses share numbers.
TEACHER_INIT, TEACHER_STEPS, STUDENT_INIT, STUDENT_STEPS, STUDENT_DATA, PAIRS = range(6)


def train(config: Config, workdir: str | os.PathLike) -> None:
    """Trains what the work directory does not have yet, and evaluates the student.

    Args:
      config: the run's settings.
      workdir: the run's directory: `teacher/` and `student/` with checkpoints and metrics,
        `report.json`, `samples.png`.

    Raises:
      BlockingIOError: another run is at work in the directory.
      CheckpointError: a checkpoint is unusable or contradicts the settings.
      ConfigError: a teacher is to be trained on prompts.
      NonFiniteLossError: a loss became NaN or infinite.
      Interrupted: a signal came; the state is saved.
    """
    with RunLock(workdir):
        _train(config, workdir)


def _train(config: Config, workdir: str | os.PathLike) -> None:
    mesh = config_mesh(config)
    source = load_source(config.data.name, config.data.data_dir or None)
    data = DataShape.of(config.data.name, source)
    if config.data.name == "imagenet":
        _check_evaluation(config, data)
    if config.data.name == "prompts" and not (config.train.data_free or source.latent_channels):
        raise ConfigError(
            f"{config.data.data_dir} has prompts without latents: set config.train.data_free (the "
            "variant datafree), or prepare the set from a list with images and config.data.vae"
        )
    given = config.teacher.checkpoint or config.teacher.weights
    if given:
        logging.info("teacher: given, %s", given)
    elif config.data.name == "prompts":
        raise ConfigError(
            "prompts are for students: give config.teacher.weights or config.teacher.checkpoint"
        )
    else:
        run_here(teacher_stage(config, source, data, mesh), config, workdir, mesh)
    abstract = abstract_params(teacher_network(config.model, data))
    shardings = teacher_shardings(config, mesh, abstract)
    teacher_params = load_teacher(config, data, workdir, shardings)
    run_here(student_stage(config, source, data, teacher_params, mesh), config, workdir, mesh)
    if config.data.name == "prompts":
        logging.info("trained; --mode=sample draws its pictures, --mode=evaluate measures them")
    elif config.data.name in FEATURE_SPACES or config.evaluation.features:
        evaluate(config, workdir)
    else:
        logging.info(
            "no FID: config.evaluation.features and config.evaluation.reference are not given; "
            "--mode=evaluate says what they are"
        )


def _check_evaluation(config: Config, data: DataShape) -> None:
    """Opens what looks and the evaluation will need, before days are spent on training."""
    settings = config.evaluation
    measured = settings.features or settings.reference
    if config.data.vae or measured or settings.every:
        check_autoencoder(load_autoencoder(config), data)
    if measured:
        load_reference(config, load_inception(config))


def run_here(stage: Stage, config: Config, workdir: str | os.PathLike, mesh: Mesh) -> TrainState:
    """Runs a stage of training as the settings say; returns its last state."""
    return run_stage(
        stage,
        workdir,
        log_every=config.log_every,
        checkpoint_every=config.checkpoint_every,
        look_every=config.evaluation.every,
        mesh=mesh,
        keep_checkpoints=config.keep_checkpoints,
        profile=config.profile,
        peak_flops=config.peak_flops,
    )


def stream_key(config: Config, stream: int) -> jax.Array:
    """The key of one of the streams of randomness of a run's seed."""
    return jax.random.fold_in(jax.random.key(config.seed), stream)


def flat_settings(groups: dict[str, Any]) -> dict[str, Any]:
    """Settings as flat JSON values by dotted key."""
    flat = {}
    for name, value in groups.items():
        if dataclasses.is_dataclass(value):
            value = dataclasses.asdict(value)
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": entry for key, entry in flat_settings(value).items()}
        else:
            flat[name] = list(value) if isinstance(value, tuple) else value
    return flat


# How networks are computed, not what.
_COMPUTED_BY = ("model.remat", "model.attention", "model.scan_unroll")
# What a teacher's parameters come of, and the identity that they give a student.
_TEACHER = "teacher.parameters"
_TEACHER_MADE_BY = tuple(
    f"teacher.{key}"
    for key in ("checkpoint", "weights", "steps", "batch_size", "label_dropout", "optimizer.")
)


def _extensible(stage: str, decay: str) -> tuple[str, ...]:
    """A run may be made longer, unless its learning rate depends on its length."""
    return _COMPUTED_BY + ((f"{stage}.steps",) if decay == "constant" else ())


def teacher_stage(config: Config, source, data: DataShape, mesh: Mesh) -> Stage:
    """Training of the teacher by flow matching."""
    module = teacher_network(config.model, data).clone(constrain=ActivationSharding(mesh))
    settings = config.teacher
    optimizer = make_optimizer(settings.optimizer, settings.steps)
    step = teacher_step(module, optimizer, config, data, getattr(source, "null", None))
    own = {
        key: getattr(settings, key) for key in ("steps", "batch_size", "label_dropout", "optimizer")
    }
    return Stage(
        name="teacher",
        init=lambda: TrainState.create(
            init_params(module, stream_key(config, TEACHER_INIT)), optimizer
        ),
        step=step,
        constants=(stream_key(config, TEACHER_STEPS),),
        data=stage_batches(mesh, source, settings.batch_size, config.seed),
        steps=settings.steps,
        batch_size=settings.batch_size,
        config=flat_settings(
            {
                "seed": config.seed,
                "data.name": config.data.name,
                "model": config.model,
                "teacher": own,
                "train.shift": config.train.shift,
            }
        ),
        extensible=_extensible("teacher", settings.optimizer.decay),
        spec=teacher_spec(config, data),
        shardings=lambda state: student_shardings(config, mesh, state),
    )


def student_stage(config: Config, source, data: DataShape, teacher_params, mesh: Mesh) -> Stage:
    """Training of the student by pi-ID."""
    constrain = ActivationSharding(mesh)
    teacher = teacher_network(config.model, data).clone(constrain=constrain)
    student = student_network(config.model, config.policy, data).clone(constrain=constrain)
    settings = config.train
    optimizer = make_optimizer(settings.optimizer, settings.steps)
    distil = distill_step(student, teacher, optimizer, config, data, getattr(source, "null", None))

    def init(teacher_params):
        key = stream_key(config, STUDENT_INIT)
        return TrainState.create(initial_student(key, student, teacher, teacher_params), optimizer)

    look = student_look(config, source, data) if config.evaluation.every else None

    def look_at(trained):
        # Of the base too one copy on this process's devices: the teacher lies on the mesh.
        base = None if config.model.network == "dit" else gathered(teacher_params, mesh)
        return look(with_base(student, trained, base))

    groups = {"seed": config.seed, "data.name": config.data.name}
    groups |= {name: getattr(config, name) for name in ("model", "teacher", "policy", "train")}
    flat = flat_settings(groups)
    made_by = tuple(key for key in flat if key.startswith(_TEACHER_MADE_BY))
    extensible = _extensible("train", settings.optimizer.decay)
    # Each part has a key of its own for the dropout of adapters.
    if config.model.network == "dit" or not config.model.lora_dropout:
        extensible += ("train.microbatches",)
    return Stage(
        name="student",
        init=init,
        step=distil,
        constants=(teacher_params, stream_key(config, STUDENT_STEPS)),
        data=stage_batches(mesh, source, settings.batch_size, config.seed + STUDENT_DATA),
        steps=settings.steps,
        batch_size=settings.batch_size,
        config=flat | {_TEACHER: f"fingerprint {tree_fingerprint(teacher_params)}"},
        extensible=extensible,
        identified={_TEACHER: made_by},
        spec=student_spec(config, data),
        init_arguments=(teacher_params,),
        shardings=lambda state: student_shardings(config, mesh, state),
        look=look and look_at,
    )


def stage_batches(mesh: Mesh, source, batch_size: int, seed: int):
    """Endless batches of a source, of each the rows that this process's devices need."""
    return batches(source, batch_size=batch_size, seed=seed, rows=local_rows(mesh, batch_size))
