"""`--mode=train`: the teacher if none is given, then the student, then the report."""

import dataclasses
import os
from typing import Any

import jax
from absl import logging
from etils import epath
from jax.sharding import Mesh

from piflow_jax.config import Config, ConfigError
from piflow_jax.data import Source, batches
from piflow_jax.keys import seed_key
from piflow_jax.loading.runs import load_teacher, student_dir
from piflow_jax.modes.adm import config_judge, load_inception, load_reference
from piflow_jax.modes.autoencoder import check_autoencoder, load_autoencoder
from piflow_jax.modes.evaluate import evaluate
from piflow_jax.modes.look import student_look
from piflow_jax.modes.sample import grid_rows
from piflow_jax.modes.sizes import Sizes
from piflow_jax.parallel import ActivationSharding, config_mesh, gathered, local_rows
from piflow_jax.runs.fingerprints import tree_fingerprint
from piflow_jax.runs.loop import Stage, checkpoint_dir, run_stage
from piflow_jax.runs.run_lock import RunLock
from piflow_jax.runs.workdir import check_writable
from piflow_jax.systems.assembly import Systems
from piflow_jax.systems.datasets import dataset, load_source, shape_of
from piflow_jax.systems.judges import Judge
from piflow_jax.systems.networks import Network, teacher_network
from piflow_jax.systems.shapes import DataShape
from piflow_jax.systems.shardings import student_shardings, teacher_shardings
from piflow_jax.systems.spec import (
    model_settings,
    student_spec,
    teacher_spec,
    updated_settings,
)
from piflow_jax.training.optimizer import make_optimizer
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
        steps = [checkpoint_dir(workdir, stage) for stage in ("teacher", "student", "student/best")]
        check_writable(*steps, *(directory.parent for directory in steps))
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
    if given:
        logging.info("teacher: given, %s", given)
    elif not row.by_class:
        raise ConfigError(
            "prompts are for students: give config.teacher.weights or config.teacher.checkpoint"
        )
    else:
        run_here(teacher_stage(config, source, data, mesh), config, workdir, mesh)
    shardings = teacher_shardings(config, mesh, teacher_network(config.model, data))
    teacher_params = load_teacher(config, data, workdir, shardings)
    judge = config_judge(config, source, workdir) if pixels and config.evaluation.every else None
    stage = student_stage(config, source, data, teacher_params, mesh, judge)
    run_here(stage, config, workdir, mesh)
    if not row.by_class:
        logging.info("trained; --mode=sample draws its pictures, --mode=evaluate measures them")
    elif pixels or config.evaluation.features:
        evaluate(config, workdir)
    else:
        logging.info(
            "no FID: config.evaluation.features and config.evaluation.reference are not given; "
            "--mode=evaluate says what they are"
        )


def _check_evaluation(
    config: Config, source: Source, data: DataShape, workdir: str | os.PathLike
) -> None:
    """Opens what looks and the evaluation will need, before days are spent on training."""
    settings = config.evaluation
    if settings.every:
        grid_rows(config, source, data)
    elif settings.checkpoint == "best" and not epath.Path(student_dir(config, workdir)).exists():
        raise ConfigError(
            "config.evaluation.checkpoint = 'best' needs looks at the student while it trains; set "
            "config.evaluation.every"
        )
    if not dataset(config).latents:
        return
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
    return jax.random.fold_in(seed_key(config.seed), stream)


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


# Settings of an optimiser that may change while a stage goes on.
_TUNABLE = ("learning_rate", "warmup_steps", "grad_clip")


def _tunable(stage: str) -> tuple[str, ...]:
    return tuple(f"{stage}.optimizer.{key}" for key in _TUNABLE)


def _extensible(stage: str, decay: str) -> tuple[str, ...]:
    """A run may be made longer, unless its learning rate depends on its length."""
    return _COMPUTED_BY + ((f"{stage}.steps",) if decay == "constant" else ())


def teacher_stage(config: Config, source, data: DataShape, mesh: Mesh) -> Stage:
    """Training of the teacher by flow matching."""
    caption = getattr(source, "null", None)
    systems = Systems.of(config, data, caption, ActivationSharding(mesh))
    network, settings = systems.teacher_network, config.teacher
    optimizer = make_optimizer(settings.optimizer, settings.steps)
    draw = getattr(source, "draw", None)
    own = {
        key: getattr(settings, key) for key in ("steps", "batch_size", "label_dropout", "optimizer")
    }
    return Stage(
        name="teacher",
        init=lambda: first_state(
            network, network.init(stream_key(config, TEACHER_INIT)), optimizer
        ),
        step=teacher_step(network, optimizer, config, systems.null, draw),
        constants=(stream_key(config, TEACHER_STEPS),),
        data=stage_batches(mesh, source, settings.batch_size, config.seed),
        steps=settings.steps,
        batch_size=settings.batch_size,
        config=flat_settings(
            {
                "seed": config.seed,
                "data.name": config.data.name,
                "model": model_settings(config.model),
                "teacher": own,
                "train.shift": config.train.shift,
            }
        ),
        extensible=_extensible("teacher", settings.optimizer.decay),
        tunable=_tunable("teacher"),
        updated=updated_settings,
        spec=teacher_spec(config, data),
        shardings=lambda state: student_shardings(config, mesh, state, network),
    )


def student_stage(
    config: Config,
    source: Source,
    data: DataShape,
    teacher_params: Any,
    mesh: Mesh,
    judge: Judge | None = None,
) -> Stage:
    """Training of the student by pi-ID; `judge` measures it on the way, see `student_look`."""
    caption, draw = getattr(source, "null", None), getattr(source, "draw", None)
    systems = Systems.of(config, data, caption, ActivationSharding(mesh))
    student, teacher, settings = systems.student_network, systems.teacher_network, config.train
    optimizer = make_optimizer(settings.optimizer, settings.steps)

    def init(teacher_params):
        key = stream_key(config, STUDENT_INIT)
        return TrainState.create(student.start(key, teacher, teacher_params), optimizer)

    look = student_look(config, source, data, judge) if config.evaluation.every else None

    def look_at(trained):
        # Of the base too one copy on this process's devices: the teacher lies on the mesh.
        base = gathered(teacher_params, mesh) if student.adapted else None
        return look(student.with_base(trained, base))

    groups = {"seed": config.seed, "data.name": config.data.name}
    groups["model"] = model_settings(config.model)
    groups |= {name: getattr(config, name) for name in ("teacher", "policy", "train")}
    flat = flat_settings(groups)
    made_by = tuple(key for key in flat if key.startswith(_TEACHER_MADE_BY))
    extensible = _extensible("train", settings.optimizer.decay)
    # Each part has a key of its own for the dropout of adapters.
    if not student.drops:
        extensible += ("train.microbatches",)
    return Stage(
        name="student",
        init=init,
        step=distill_step(student, systems.teacher, optimizer, config, data.channels, draw),
        constants=(teacher_params, stream_key(config, STUDENT_STEPS)),
        data=stage_batches(mesh, source, settings.batch_size, config.seed + STUDENT_DATA),
        steps=settings.steps,
        batch_size=settings.batch_size,
        config=flat | {_TEACHER: f"fingerprint {tree_fingerprint(teacher_params)}"},
        extensible=extensible,
        tunable=_tunable("train"),
        identified={_TEACHER: made_by},
        updated=updated_settings,
        spec=student_spec(config, data),
        init_arguments=(teacher_params,),
        shardings=lambda state: student_shardings(config, mesh, state, student),
        look=look and look_at,
    )


def first_state(network: Network, variables: Any, optimizer) -> TrainState:
    """The state before the first step of a network that starts at variables of its own."""
    return TrainState.create(network.trained(variables), optimizer, network.carried(variables))


def has_states(source: Source) -> bool:
    """Whether examples have states, and not the shape of one alone."""
    x = source[0]["x"]
    return bool(jax.tree.leaves(x)[0].size)


def stage_batches(mesh: Mesh, source, batch_size: int, seed: int):
    """Endless batches of a source, of each the rows that this process's devices need."""
    return batches(source, batch_size=batch_size, seed=seed, rows=local_rows(mesh, batch_size))
