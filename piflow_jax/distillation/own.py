"""`piflow_jax.distill` and `piflow_jax.train_teacher`: runs with a caller's own networks and data.

They use the command line's machinery: checkpoints, exact continuation, meshes, several processes,
metrics, grids during training and a report. Networks, teachers and sources are the caller's values.
Distillation follows pi-Flow, arXiv 2510.14974, Alg. 2 and Sec. 3.4.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from piflow_jax.config import Config, ConfigError, base_config, parse
from piflow_jax.data import Source, as_source, has_states
from piflow_jax.data.source import check_source, source_digest
from piflow_jax.diagnostics.teacher import check_teacher
from piflow_jax.distillation.bench import Bench, compare, draw, judged
from piflow_jax.distillation.looks import look_by
from piflow_jax.distillation.sizes import Sizes
from piflow_jax.distillation.stages import (
    DESCRIPTION,
    INITIAL,
    check_taught,
    flat_settings,
    locked,
    run_here,
    student_stage,
    teacher_stage,
)
from piflow_jax.flow.teacher import Teacher
from piflow_jax.parallel import (
    config_mesh,
    gathered,
    local_mesh,
    parameter_shardings,
    replicated,
)
from piflow_jax.runs.fingerprints import tree_fingerprint
from piflow_jax.runs.loop import checkpoint_dir
from piflow_jax.runs.metrics import OnMetrics
from piflow_jax.runs.steps import latest_step
from piflow_jax.student import Student
from piflow_jax.systems.assembly import Systems
from piflow_jax.systems.conditioning import described
from piflow_jax.systems.judges import Judge, independent, open_judge
from piflow_jax.systems.own import OwnNetwork, own_network
from piflow_jax.systems.settings import check_choices
from piflow_jax.systems.shapes import DataShape
from piflow_jax.systems.spaces import open_space, spaces_with
from piflow_jax.systems.spec import StudentSettings

__all__ = ["distill", "train_teacher"]

_OF_BOTH = (
    *("seed", "mesh.", "log_every", "checkpoint_every", "keep_checkpoints"),
    *("profile", "peak_flops", "train.shift"),
)
_OF_TEACHER = tuple(
    f"teacher.{key}" for key in ("steps", "batch_size", "label_dropout", "optimizer.")
)
_OF_STUDENT = (
    *("policy.", "train."),
    *(
        f"evaluation.{key}"
        for key in (
            *(
                "num_samples",
                "batch_size",
                "teacher_steps",
                "teacher_solver",
                "substeps",
                "nfe",
                "temperature",
            ),
            *("solver", "seed", "grid_samples", "grid_classes", "every", "every_samples"),
            "features",
        )
    ),
)


def distill(
    config: ConfigDict,
    workdir: str | os.PathLike,
    *,
    teacher: Teacher,
    teacher_params: Any,
    network: Any,
    source: Any = None,
    test_source: Any = None,
    initial_params: Any = None,
    on_metrics: OnMetrics | None = None,
) -> Student:
    """Distils a teacher into a student that needs only one or a few evaluations.

    Another call with the same arguments continues where the last one stopped. The result is the
    same, bit for bit, as without the interruption.

    Args:
      config: settings: `base_config()` with changes to `policy`, `train`, `evaluation`, `mesh`,
        `seed`, `log_every`, `checkpoint_every`, `keep_checkpoints`, `profile` and `peak_flops`. A
        change to any other key is refused.
      workdir: the run's directory. It receives `student/` with checkpoints and metrics,
        `samples.png`, `report.html`, and `report.json` if figures can be measured.
      teacher: the network's prediction, its diffusion and its guidance.
      teacher_params: its parameters, as `teacher.predict` takes them.
      network: the student's network: a `flax.linen.Module`, a `flax.nnx.Module`, a pair `(init,
        apply)`, or a function `(outputs, shape, num_classes)` that makes one of these. It is called
        with `(x[B, *sites, C], t[B], labels[B])`, with the arrays of a mapping as keywords, or with
        `(x, t)` alone. It returns `[B, *sites, policy_outputs(config, C)]`; for a mixture these are
        `K` means `(K, C)` and then `K` logits. With NNX only `nnx.Param` is trained and averaged;
        other state is carried along and saved.
      source: data: a `piflow_jax.data.Source`, arrays `x[N, *sites, C]`, or `(x, condition)`. None
        with `config.train.data_free` and a teacher without conditions.
      test_source: data for figures; by default `source`.
      initial_params: parameters at which the student starts. If they are the teacher's, the student
        takes the teacher's own input and time, and its means are converted like the teacher's
        predictions, so that its first policy is the teacher. A `Student` starts where that student
        ended. By default the network has fresh parameters and takes `(x, t)`.
      on_metrics: `(stage, step, scalars) -> None`, called in process 0 with the scalars of the
        metrics file.

    Returns:
      The student with the averaged weights; `piflow_jax.load(workdir, network=network)` loads it
      later.

    Raises:
      BlockingIOError: another run is working in the directory.
      CheckpointError: a checkpoint is unusable, or comes from other settings, networks or data.
      ConfigError: settings, networks or data do not fit together; raised before any training.
      Interrupted: a signal arrived; the state is saved.
      NonFiniteLossError: the loss became NaN or infinite.
      ValueError: `source` or `test_source` is no such thing; the message names the example.
    """
    parsed = _parsed(config, (*_OF_BOTH, *_OF_STUDENT))
    source = _source(source, teacher, parsed)
    test = source if test_source is None else _test_source(test_source, source)
    parsed, systems, first = _student_systems(parsed, source, teacher, network, initial_params)
    params = jax.tree.map(_as_array, teacher_params)
    own_start = first is not None and not isinstance(initial_params, Student)
    if own_start and not teacher.is_plain:
        student = systems.student_network
        if _same(first, student.functions.parameters_of(params)):
            student = dataclasses.replace(student, asked=teacher.as_asked())
            systems = dataclasses.replace(systems, student_network=student)
        else:
            logging.warning(
                "initial_params are not teacher_params, so the student takes (x, t) and predicts "
                "velocities, unlike the teacher; its first policy is not the teacher's"
            )
    systems.student_network.check_start(first)
    mesh = config_mesh(parsed)
    with locked(workdir, "student", "student/best") as workdir:
        if latest_step(checkpoint_dir(workdir, "student")) is None and has_states(source):
            report = check_teacher(teacher, params, source)
            if report.problem:
                remedy = "describe the teacher as it is, with data as in its training"
                raise ConfigError(f"{report.problem}; {remedy}")
        judge = open_judge(test, workdir, parsed.evaluation) if has_states(test) else None
        space = open_space(parsed, source, workdir, test_source=test)
        systems = dataclasses.replace(systems, space=space)
        before = initial_params.settings.trained_in if isinstance(initial_params, Student) else ()
        spaces = spaces_with(space, before)
        Sizes(systems, test, teacher=params).check_distillation(judge is not None)
        network = systems.student_network
        stage = student_stage(
            systems,
            source,
            _placed(params, mesh, split=parsed.mesh.teacher == "split"),
            mesh,
            look=_look(systems, test, judge, spaces) if parsed.evaluation.every else None,
            start=functools.partial(_start, network),
            initial=None if first is None else _placed(first, mesh, split=False),
            identity=_identity(network, source) | _description(teacher) | _initial(first),
            trained_in=before,
        )
        state = run_here(stage, parsed, workdir, mesh, on_metrics)
        variables = network.with_base(*gathered((state.ema_params, state.carried), mesh))
        both = jax.device_put(
            (gathered(stage.constants[0], mesh), variables), replicated(local_mesh())
        )
        if judge is None:
            draw(systems, test, *both, workdir)
        else:
            bench = Bench(parsed, test, systems.data, judge, spaces)
            compare(bench, systems, *both, workdir)
    asked = {key.removeprefix("asked."): value for key, value in network.spec.items()}
    settings = StudentSettings.of(parsed, systems.data, asked=asked, trained_in=spaces)
    return Student(network, variables, settings)


def train_teacher(
    config: ConfigDict,
    workdir: str | os.PathLike,
    *,
    network: Any,
    source: Any,
    initial_params: Any = None,
    on_metrics: OnMetrics | None = None,
) -> tuple[Teacher, Any]:
    """Trains a teacher by flow matching; `distill` takes the result.

    Args:
      config: settings: `base_config()` with changes to `teacher`, `train.shift`, `mesh`, `seed`,
        `log_every`, `checkpoint_every`, `keep_checkpoints`, `profile` and `peak_flops`.
      workdir: the run's directory. It receives `teacher/` with checkpoints and metrics.
      network: see `distill`. It returns `[B, *sites, C]`, the velocity `eps - x_0` at `(1 - t) x_0
        + t eps`. For data with classes, label `num_classes` is the null label.
      source: data, see `distill`.
      initial_params: parameters of this network at which training starts, such as those of a model
        that is trained further; by default fresh ones. Other variables, such as running averages,
        always start afresh.
      on_metrics: see `distill`.

    Returns:
      The teacher, without guidance (`dataclasses.replace(teacher, guidance_scale=...)` adds it),
      and its averaged parameters. `piflow_jax.load_teacher(workdir, network=network)` loads them
      later.

    Raises:
      BlockingIOError: see `distill`.
      CheckpointError: see `distill`; or a student is there that could not go on with this teacher.
      ConfigError: see `distill`.
      Interrupted: see `distill`.
      NonFiniteLossError: see `distill`.
      ValueError: see `distill`.
    """
    parsed, source = _parsed(config, (*_OF_BOTH, *_OF_TEACHER)), as_source(source)
    check_source(source)
    if not has_states(source):
        raise ConfigError(f"{source.name} has no states to train on")
    data = _shape_of(source)
    parsed = _named(parsed, network)
    check_choices(parsed)
    own = own_network("the network", network, data, None)
    given = None if initial_params is None else own.functions.parameters_of(initial_params)
    first = jax.tree.map(_as_array, given)
    own.check_start(first)
    null = own.conditioning.null(data, getattr(source, "null", None))
    teacher = Teacher(predict=own.apply, shape=data.shape, null_cond=null)
    systems = Systems(
        config=parsed,
        data=data,
        teacher=teacher,
        student_network=None,
        teacher_network=own,
        null=null,
    )
    mesh = config_mesh(parsed)
    with locked(workdir, "teacher") as workdir:
        check_taught(workdir, parsed.teacher.steps)
        Sizes(systems, source).check_teacher_training()
        start = {}
        if first is not None:
            start = {"start": own.start_at, "initial": _placed(first, mesh, split=False)}
        identity = _identity(own, source) | _initial(first)
        stage = teacher_stage(systems, source, mesh, identity=identity, **start)
        state = run_here(stage, parsed, workdir, mesh, on_metrics)
    return teacher, own.with_base(*gathered((state.ema_params, state.carried), mesh))


class _NoData:
    """The shape of samples, for training without data and without conditions."""

    name = "no data"

    def __init__(self, shape: tuple[int, ...]):
        self.shape = shape

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self.gather(index)

    def gather(self, indices: Any) -> dict[str, np.ndarray]:
        return {"x": np.zeros((*np.shape(indices), *self.shape[:-1], 0), np.float32)}


def _parsed(config: ConfigDict, applies: tuple[str, ...]) -> Config:
    """Parses settings and refuses changes to keys that do not apply."""
    parsed = parse(config, jax.device_count())
    base = flat_settings(base_config().to_dict())
    given = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
    changed = [key for key, value in flat_settings(given).items() if base.get(key) != value]
    # The command line has a path for `initial_params`.
    strange = [key for key in changed if not key.startswith(applies) or key == "train.initial"]
    if strange:
        raise ConfigError(
            f"{', '.join(f'config.{key}' for key in strange)} has no meaning here: "
            "take back its default"
        )
    return parsed


def _source(given: Any, teacher: Teacher, config: Config) -> Source:
    if given is None:
        if not config.train.data_free or teacher.shape is None:
            raise ConfigError(
                "without source, set config.train.data_free and give the Teacher a shape"
            )
        return _NoData(tuple(teacher.shape))
    source = as_source(given)
    check_source(source)
    if not (config.train.data_free or has_states(source)):
        raise ConfigError(f"{source.name} has no states: set config.train.data_free")
    if teacher.shape is not None and tuple(source.shape) != tuple(teacher.shape):
        theirs = list(teacher.shape)
        raise ConfigError(
            f"samples of {source.name} are {list(source.shape)}, the teacher's {theirs}"
        )
    return source


def _test_source(given: Any, source: Source) -> Source:
    test = as_source(given, "test")
    check_source(test)
    if tuple(test.shape) != tuple(source.shape):
        theirs = list(source.shape)
        raise ConfigError(
            f"samples of {test.name} are {list(test.shape)}, those of {source.name} {theirs}"
        )
    # Samples with classes have all of them in turn; others have the conditions of the test data.
    has, needs = _conditions_of(test), _conditions_of(source)
    if has != needs and not _shape_of(source).num_classes:
        raise ConfigError(
            f"examples of {test.name} have {has or 'no conditions'}, those of {source.name} "
            f"{needs or 'none'}: samples for figures have the conditions of {test.name}"
        )
    return test


def _conditions_of(source: Source) -> dict[str, list[int]]:
    """Shapes of the arrays of one condition, by name; empty without conditions."""
    condition = source[0].get("condition")
    if condition is None:
        return {}
    arrays = condition if isinstance(condition, Mapping) else {"condition": condition}
    return {name: list(np.shape(array)) for name, array in arrays.items()}


def _shape_of(source: Source) -> DataShape:
    """The shape of a source, its conditions included."""
    data, condition = DataShape.of(source.name, source), source[0].get("condition")
    if condition is None:
        return dataclasses.replace(data, num_classes=0)
    if data.num_classes and not isinstance(condition, Mapping) and not np.ndim(condition):
        return data
    return dataclasses.replace(data, conditions=described(condition))


def _student_systems(
    config: Config, source: Source, teacher: Teacher, network: Any, initial: Any
) -> tuple[Config, Systems, Any]:
    """Settings, teacher and student, and the parameters where the student starts."""
    data = _shape_of(source)
    guidance = dataclasses.replace(
        config.teacher,
        guidance_scale=float(teacher.guidance_scale),
        guidance_interval=tuple(map(float, teacher.guidance_interval)),
        orthogonal_guidance=float(teacher.orthogonal_guidance),
    )
    config = dataclasses.replace(_named(config, network), teacher=guidance)
    check_choices(config)
    student = own_network("the network", network, data, config.policy)
    if isinstance(initial, Student):
        if not isinstance(initial.network, OwnNetwork):
            raise ConfigError(
                "initial_params is a student of this package's networks, not of yours"
            )
        student = dataclasses.replace(student, asked=initial.network.asked)
        first = initial.network.trained(initial.params)
    else:
        given = None if initial is None else student.functions.parameters_of(initial)
        first = jax.tree.map(_as_array, given)
    systems = Systems(config=config, data=data, teacher=teacher, student_network=student)
    return config, systems, first


def _named(config: Config, network: Any) -> Config:
    """Adds the network's name to the settings, as in checkpoints."""
    one = network[-1] if isinstance(network, tuple) else network
    kind = one if hasattr(one, "__qualname__") else type(one)
    name = f"{kind.__module__}:{kind.__qualname__}"
    return dataclasses.replace(config, model=dataclasses.replace(config.model, network=name))


def _as_array(leaf: Any) -> Any:
    return leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)


def _placed(params: Any, mesh: Any, split: bool) -> Any:
    """Places parameters on the devices of a mesh, of all processes."""

    def put(leaf, sharding):
        if sharding.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        array = np.asarray(leaf)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(put, params, parameter_shardings(mesh, params, split=split))


def _start(network: OwnNetwork, key: jax.Array, initial: Any) -> Any:
    return network.trained(network.init(key)) if initial is None else network.start_at(key, initial)


def _same(first: Any, params: Any) -> bool:
    """Whether two trees have the same paths and values, in any dtypes that have them."""
    if jax.tree.structure(first) != jax.tree.structure(params):
        return False
    return tree_fingerprint(jax.tree.map(_widened, first, params)) == tree_fingerprint(
        jax.tree.map(_widened, params, first)
    )


def _widened(leaf: jax.Array, other: jax.Array) -> jax.Array:
    same = leaf.dtype == other.dtype
    return leaf if same else leaf.astype(jnp.promote_types(leaf.dtype, other.dtype))


def _identity(network: OwnNetwork, source: Source) -> dict[str, Any]:
    """Values that a continued run must find unchanged, in addition to its checkpoint's tree."""
    return {
        "source": f"digest {source_digest(source)}",
        "asked": f"digest {_digest(network.spec)}",
    }


def _description(teacher: Teacher) -> dict[str, Any]:
    """The same for a teacher, without its parameters and its guidance scale."""
    schedule, null = teacher.schedule, teacher.null_cond
    null = None if callable(null) else tree_fingerprint(jax.tree.map(np.asarray, null))
    made_by, scale, levels = schedule.made_by, schedule.time_scale, schedule.levels
    description = [teacher.prediction, made_by, scale, levels, null]
    return {DESCRIPTION: f"digest {_digest(description)}"}


def _initial(params: Any) -> dict[str, Any]:
    """The same for what training starts at."""
    return {INITIAL: "none" if params is None else f"fingerprint {tree_fingerprint(params)}"}


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _look(systems: Systems, test: Source, judge: Judge | None, spaces: tuple[str, ...]):
    sampler = systems.student_sampler()
    measure = judged(test, independent(judge, spaces))
    return look_by(systems.config, test, systems.data, sampler, measure)
