"""Training of teacher and student as stages: their initial state, steps and checkpoints.

The command line's modes and `piflow_jax.distill` share these two stages.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from absl import logging
from etils import epath
from jax.sharding import Mesh

from piflow_jax.config import Config
from piflow_jax.data import Source, batches
from piflow_jax.keys import seed_key
from piflow_jax.parallel import ActivationSharding, gathered, local_rows
from piflow_jax.runs.checkpoint import CheckpointError, read_spec
from piflow_jax.runs.fingerprints import tree_fingerprint
from piflow_jax.runs.loop import Look, Stage, checkpoint_dir, run_stage
from piflow_jax.runs.metrics import OnMetrics
from piflow_jax.runs.run_lock import RunLock
from piflow_jax.runs.steps import latest_step
from piflow_jax.runs.workdir import check_writable, user_path
from piflow_jax.systems.assembly import Systems
from piflow_jax.systems.sampling import measured_with
from piflow_jax.systems.shardings import student_shardings
from piflow_jax.systems.spaces import Space, spaces_with
from piflow_jax.systems.spec import (
    TRAINED_IN,
    model_settings,
    student_spec,
    teacher_spec,
    updated_settings,
)
from piflow_jax.training.optimizer import make_optimizer
from piflow_jax.training.state import TrainState
from piflow_jax.training.step import distill_step, first_student_state, teacher_step

# Random streams, folded into the seed, so that no two uses share numbers.
TEACHER_INIT, TEACHER_STEPS, STUDENT_INIT, STUDENT_STEPS, STUDENT_DATA, PAIRS = range(6)


def run_here(
    stage: Stage,
    config: Config,
    workdir: str | os.PathLike,
    mesh: Mesh,
    on_metrics: OnMetrics | None = None,
) -> TrainState:
    """Runs a stage of training with the run's settings; returns its last state."""
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
        on_metrics=on_metrics,
    )


@contextlib.contextmanager
def locked(workdir: str | os.PathLike, *stages: str) -> Iterator[epath.Path]:
    """Locks the run's directory against other runs and checks that it can be written."""
    workdir = user_path(workdir)
    with RunLock(workdir):
        places = [checkpoint_dir(workdir, stage) for stage in stages]
        check_writable(*places, *(place.parent for place in places))
        yield workdir


def check_taught(workdir: str | os.PathLike, steps: int) -> None:
    """Refuses to train a teacher with which the student that is there could not go on.

    Args:
      workdir: the run's directory.
      steps: where the teacher's training is going to end.

    Raises:
      CheckpointError: the student was taught by another one, or by the same after fewer steps.
    """
    teacher, student = (checkpoint_dir(workdir, stage) for stage in ("teacher", "student"))
    step = latest_step(teacher, writing=True)
    if (step or 0) >= steps or latest_step(student, writing=True) is None:
        return
    _, _, saved = read_spec(student)
    for key in _GIVEN:
        if saved.get(key):
            raise CheckpointError(
                f"the student in {student.parent} was taught by config.{key} = {saved[key]!r}, and "
                "this run would train a teacher of its own; give that one again, or pass another "
                "--workdir"
            )
    if step is not None:
        raise CheckpointError(
            f"the student in {student.parent} was taught by the teacher at step {step}, which more "
            f"steps would change; take config.teacher.steps = {step}, delete {student.parent}, or "
            f"copy {teacher.parent} into another --workdir and train there"
        )


def warn_of_another_teacher(directory: str | os.PathLike, teacher_params: Any) -> None:
    """Warns if a student was taught by other parameters than those that it is compared with.

    Args:
      directory: the student's checkpoints; older ones do not say who taught them.
      teacher_params: the teacher's parameters.
    """
    _, _, saved = read_spec(directory)
    found = f"fingerprint {tree_fingerprint(teacher_params)}"
    if saved.get(_TEACHER, found) != found:
        logging.warning(
            "%s: this student was taught by another teacher than that of this report, which is "
            "config.teacher.checkpoint, config.teacher.weights or the work directory's",
            directory,
        )


def stream_key(config: Config, stream: int) -> jax.Array:
    """The key of one of the random streams of a run's seed."""
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


# Settings that change how networks are computed, but not their result.
_COMPUTED_BY = ("model.remat", "model.attention", "model.scan_unroll")
# The identity of a teacher's parameters in a student's run.
_TEACHER = "teacher.parameters"
# Identities of a caller's own teacher, and of the parameters at which training starts. Checkpoints
# of older runs lack both.
DESCRIPTION = "teacher.description"
INITIAL = "initial_params"
# Settings that name a teacher which is not trained in the run.
_GIVEN = ("teacher.checkpoint", "teacher.weights")
# Settings that made a teacher's parameters.
_TEACHER_MADE_BY = tuple(
    f"teacher.{key}"
    for key in (
        *("checkpoint", "weights", "loras"),
        *("steps", "batch_size", "label_dropout", "optimizer."),
    )
)


_CORRECTOR = "train.corrector."
# Optimiser settings that may change when a stage continues.
_TUNABLE = ("learning_rate", "warmup_steps", "grad_clip")


def _tunable(stage: str) -> tuple[str, ...]:
    return tuple(f"{stage}.optimizer.{key}" for key in _TUNABLE)


def _extensible(stage: str, *decays: str) -> tuple[str, ...]:
    """Settings that may change: the number of steps too, unless a learning rate depends on it."""
    return _COMPUTED_BY + ((f"{stage}.steps",) if {*decays} == {"constant"} else ())


def teacher_stage(
    systems: Systems,
    source: Source,
    mesh: Mesh,
    *,
    start: Callable[[jax.Array, Any], Any] | None = None,
    initial: Any = None,
    identity: Mapping[str, Any] | None = None,
) -> Stage:
    """Training of the teacher by flow matching.

    Args:
      systems: the teacher to train, and its settings.
      source: data.
      mesh: the devices.
      start: `(key, initial) -> trained`, the trained part of the first variables; by default fresh.
      initial: where training starts.
      identity: values that a continued run must find unchanged, in addition to the settings.

    Returns:
      The stage.
    """
    systems = systems.constrained(ActivationSharding(mesh))
    config, network = systems.config, systems.teacher_network
    settings = config.teacher
    optimizer = make_optimizer(settings.optimizer, settings.steps)

    def init(initial):
        key = stream_key(config, TEACHER_INIT)
        variables = network.init(key)
        trained = start(key, initial) if start else network.trained(variables)
        return TrainState.create(trained, optimizer, network.carried(variables))

    own = {
        key: getattr(settings, key) for key in ("steps", "batch_size", "label_dropout", "optimizer")
    }
    groups = _of_data(systems) | {
        "model": model_settings(config.model),
        "teacher": own,
        "train.shift": config.train.shift,
    }
    return Stage(
        name="teacher",
        init=init,
        step=teacher_step(network, optimizer, config, systems.null, _draw(source)),
        constants=(stream_key(config, TEACHER_STEPS),),
        data=stage_batches(mesh, source, settings.batch_size, config.seed),
        steps=settings.steps,
        batch_size=settings.batch_size,
        config=flat_settings(groups) | dict(identity or {}),
        extensible=_extensible("teacher", settings.optimizer.decay),
        tunable=_tunable("teacher"),
        identified={INITIAL: ()},
        updated=updated_settings,
        spec=teacher_spec(config, systems.data),
        init_arguments=(initial,),
        shardings=lambda state: student_shardings(config, mesh, state, network),
    )


def student_stage(
    systems: Systems,
    source: Source,
    teacher_params: Any,
    mesh: Mesh,
    *,
    look: Callable[[Any], Look] | None = None,
    start: Callable[[jax.Array, Any], Any] | None = None,
    initial: Any = None,
    identity: Mapping[str, Any] | None = None,
    trained_in: Sequence[str] = (),
) -> Stage:
    """Training of the student by pi-ID.

    Args:
      systems: the student and its teacher.
      source: data, or shapes of samples for training without data.
      teacher_params: the teacher's parameters.
      mesh: the devices.
      look: looks at the student's averaged variables during training; see `student_look`.
      start: `(key, initial) -> trained`, the trained part of the student's first variables; by
        default the student starts at its teacher.
      initial: where the student starts; by default the teacher's parameters.
      identity: values that a continued run must find unchanged, in addition to the settings.
      trained_in: feature spaces in which the student was trained before it starts here.

    Returns:
      The stage. Its settings name the spaces of its own training too.
    """
    systems = systems.constrained(ActivationSharding(mesh))
    config, student, teacher = systems.config, systems.student_network, systems.teacher_network
    settings = config.train
    optimizer = make_optimizer(settings.optimizer, settings.steps)
    if start is None:
        initial = teacher_params

        def start(key, params):
            return student.start(key, teacher, params)

    def init(initial, teacher_params=None):
        key = stream_key(config, STUDENT_INIT)
        carried = student.carried(student.init(key)) if student.carries else ()
        trained = start(key, initial)
        of_critic = jax.random.fold_in(key, 1)
        return first_student_state(
            of_critic, config, student, trained, teacher_params, carried, systems.space
        )

    def look_at(trained, carried):
        # One copy of the base on this process's devices: the teacher's parameters lie on the mesh.
        base = gathered(teacher_params, mesh) if student.adapted else carried
        return look(student.with_base(trained, base))

    groups = _of_data(systems)
    groups["model"] = model_settings(config.model)
    groups |= {name: getattr(config, name) for name in ("teacher", "policy", "train")}
    flat = flat_settings(groups)
    corrected = bool(settings.corrector.kind)
    if not corrected:  # older runs do not have its keys
        flat = {key: value for key, value in flat.items() if not key.startswith(_CORRECTOR)}
    made_by = tuple(key for key in flat if key.startswith(_TEACHER_MADE_BY))
    decays = [settings.optimizer.decay]
    if corrected:  # correctors without an optimizer have the default's, which is constant
        decays.append(settings.corrector.optimizer.decay)
    extensible = _extensible("train", *decays)
    # Each microbatch has its own key for the dropout of adapters, and its own averages.
    if not (student.drops or student.carries):
        extensible += ("train.microbatches",)
    step = distill_step(
        student,
        systems.teacher,
        optimizer,
        config,
        systems.data.channels,
        _draw(source),
        systems.space,
    )
    return Stage(
        name="student",
        init=init,
        step=step,
        constants=(teacher_params, stream_key(config, STUDENT_STEPS)),
        data=stage_batches(mesh, source, settings.batch_size, config.seed + STUDENT_DATA),
        steps=settings.steps,
        batch_size=settings.batch_size,
        config=flat
        | {_TEACHER: f"fingerprint {tree_fingerprint(teacher_params)}"}
        | _of_space(systems.space, trained_in)
        | dict(identity or {}),
        extensible=extensible,
        tunable=_tunable("train"),
        identified={_TEACHER: made_by, DESCRIPTION: (), INITIAL: ()},
        updated=updated_settings,
        spec=student_spec(config, systems.data) | student.spec,
        init_arguments=(initial, teacher_params) if corrected else (initial,),
        shardings=lambda state: student_shardings(config, mesh, state, student),
        look=look and look_at,
        measured=measured_with(config),
    )


def _of_space(space: Space | None, trained_in: Sequence[str]) -> dict[str, Any]:
    """Entries of students that were trained in feature spaces; others have none."""
    spaces = [*spaces_with(space, trained_in)]
    entries: dict[str, Any] = {TRAINED_IN: spaces} if spaces else {}
    if space is not None:
        measured = tree_fingerprint((space.mean, space.covariance))
        entries[f"{_CORRECTOR}data"] = f"fingerprint {measured}"
    return entries


def _of_data(systems: Systems) -> dict[str, Any]:
    """Entries that both stages record about their data."""
    config = systems.config
    groups = {"seed": config.seed, "data.name": systems.data.name}
    # Older runs do not have the key, nor do runs with other data.
    return groups | ({"data.mirror": True} if config.data.mirror else {})


def stage_batches(mesh: Mesh, source, batch_size: int, seed: int):
    """Endless batches of a source, with only the rows that this process's devices need."""
    return batches(source, batch_size=batch_size, seed=seed, rows=local_rows(mesh, batch_size))


def _draw(source: Source) -> Any:
    return getattr(source, "draw", None)
