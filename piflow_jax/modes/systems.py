"""Trained systems from checkpoints, as samplers."""

import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from piflow_jax.config import Config, ConfigError
from piflow_jax.convert import load_adapter, load_params, open_weights
from piflow_jax.data import Source, stacked
from piflow_jax.evaluation.evaluator import Sampler
from piflow_jax.flow.sampling import ode_sample
from piflow_jax.flow.schedule import TimeWarp, sampling_times
from piflow_jax.models.dit import Constrain
from piflow_jax.parallel import local_mesh, parameter_shardings, replicated, state_shardings
from piflow_jax.runs.checkpoint import (
    CheckpointError,
    check_spec,
    read_spec,
    restore_subtree,
)
from piflow_jax.runs.loop import checkpoint_dir
from piflow_jax.systems import sampling
from piflow_jax.systems.assembly import Systems
from piflow_jax.systems.conditioning import Condition
from piflow_jax.systems.datasets import dataset, load_source, shape_of
from piflow_jax.systems.networks import (
    Network,
    abstract_variables,
    named_variables,
    network_kind,
    student_network,
    teacher_network,
)
from piflow_jax.systems.shapes import DataShape
from piflow_jax.systems.spec import (
    check_policy_config,
    spec_of,
    student_settings,
    student_spec,
    teacher_spec,
    updated,
)

# Conditions in turn of data without classes.
_MOST_CONDITIONS = 1000

__all__ = [
    "conditions_in_turn",
    "data_shape",
    "load_average",
    "load_student",
    "load_system",
    "load_teacher",
    "student_sampler",
    "student_shardings",
    "system_sampler",
    "teacher_sampler",
    "teacher_shardings",
]


def teacher_shardings(config: Config, mesh: Mesh, teacher: Network) -> Any:
    """Where a teacher's parameters lie while it is imitated; see `config.mesh.teacher`."""
    split = config.mesh.teacher == "split"
    return parameter_shardings(mesh, named_variables(teacher), split=split)


def student_shardings(config: Config, mesh: Mesh, state: Any, student: Network) -> Any:
    """Where a student's state lies; see `config.mesh.student` and `config.mesh.ema`."""
    trained, rules = student.trained(named_variables(student)), config.mesh
    split, ema = rules.student == "split", rules.ema == "split"
    return state_shardings(mesh, state, trained, split=split, ema=ema)


def data_shape(config: Config, workdir: str | os.PathLike) -> DataShape:
    """What a student's samples look like, for which latents themselves need not be at hand.

    Args:
      config: the run's settings.
      workdir: the run's directory, whose student knows the shape of its latents.

    Returns:
      The shape of the data; of latents for official weights, that of Stable Diffusion's.

    Raises:
      CheckpointError: there is no student, or its checkpoint is unusable.
    """
    row = dataset(config)
    if row.bundled or (row.captions and config.data.data_dir):
        return shape_of(config, load_source(config.data))
    of_teacher = config.evaluation.system == "teacher"
    if config.teacher.weights if of_teacher else config.evaluation.weights:
        return network_kind(config.model).official
    _, spec, _ = read_spec(student_dir(config, workdir))
    try:
        return student_settings(spec).data
    except ValueError as error:
        raise CheckpointError(f"{student_dir(config, workdir)}: {error}") from error


def student_dir(config: Config, workdir: str | os.PathLike) -> str:
    """Where the checkpoints of the student lie that `config.evaluation.checkpoint` asks for."""
    stage = "student/best" if config.evaluation.checkpoint == "best" else "student"
    return checkpoint_dir(workdir, stage)


def load_teacher(
    config: Config,
    data: DataShape,
    workdir: str | os.PathLike,
    shardings: Any = None,
):
    """The teacher's parameters: official weights, or the average of a checkpoint.

    The checkpoint is the given one or that of the work directory.

    Args:
      config: the run's settings.
      data: what the data looks like.
      workdir: the run's directory.
      shardings: a tree that says where the parameters go; by default to every device of this
        process.

    Returns:
      Parameters of `teacher_network(config.model, data)`.

    Raises:
      CheckpointError: there is no checkpoint, it is unusable, or it contradicts the settings.
      ConfigError: the official weights contradict the settings, or need PyTorch to be read.
    """
    network, spec = teacher_network(config.model, data), teacher_spec(config, data)
    path = config.teacher.weights
    if path:
        formats = network_kind(config.model).formats
        form = config.teacher.weights_format or formats[0]
        if form not in formats:
            raise ConfigError(
                f"config.teacher.weights_format must be one of {', '.join(formats)} with "
                f"config.model.network = {config.model.network!r}, got {form!r}"
            )

        def read(weights, place):
            return load_params(network.module, weights, form, place)

        like = _placed(abstract_variables(network), shardings)
        return _official(path, "config.teacher.weights", spec, config, read, like)
    directory = config.teacher.checkpoint or checkpoint_dir(workdir, "teacher")
    return load_average(directory, network, spec, shardings)


def _placed(abstract: Any, shardings: Any) -> Any:
    """Shapes of parameters with the shardings that they get."""
    if shardings is None:
        shardings = jax.tree.map(lambda _: replicated(local_mesh()), abstract)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        shardings,
    )


def _put(leaf: np.ndarray, like: jax.ShapeDtypeStruct) -> jax.Array:
    """A leaf on its devices; of several processes, each sends its own devices' parts."""
    array = np.asarray(leaf, like.dtype)
    return jax.make_array_from_callback(array.shape, like.sharding, lambda index: array[index])


def _official(path: str, key: str, spec: Mapping[str, Any], config: Config, read, like):
    """Parameters of a weight file that says nothing else than the settings do.

    `read` makes them of the weights and of what places leaves; `like` has their shapes and places.
    """
    where = flatten_dict(like["params"])

    def place(name, leaf):
        # One that has no place is no parameter of the network, which is said in `read`.
        return _put(leaf, where[name]) if name in where else jax.device_put(leaf)

    try:
        weights = open_weights(path)
        said = spec_of(weights.metadata)
        if said is not None:
            # What is known of data and autoencoder depends on what is at hand.
            known = {k: v for k, v in spec.items() if k not in ("data.name", "data.vae")}
            check_spec(updated(said), known, weights.path)
        elif spec["kind"] == "student":
            policy = weights.metadata.get("policy_config")
            check_policy_config(policy, config.policy, config.train)
        return read(weights, place)
    except (CheckpointError, ImportError, ValueError) as error:
        raise ConfigError(f"{key} = {path!r}: {error}") from error


def load_student(
    config: Config, data: DataShape, workdir: str | os.PathLike, mesh: Mesh | None = None
):
    """The student's parameters: official weights, or the average of the run's checkpoint.

    Those of a student with adapters are the teacher's, see `load_teacher`, with adapters, head and
    last modulation from there.

    Args:
      config: the run's settings.
      data: what the data looks like.
      workdir: the run's directory.
      mesh: devices over which the parameters are split; by default every device of this process has
        all of them.

    Returns:
      Parameters of `student_network(config.model, config.policy, data)`.

    Raises:
      CheckpointError: there is no checkpoint, it is unusable, or it contradicts the settings.
      ConfigError: the official weights contradict the settings, or need PyTorch to be read.
    """
    network = student_network(config.model, config.policy, data)
    trained = network.trained(named_variables(network))
    shardings = None if mesh is None else parameter_shardings(mesh, trained)
    base = _load_teacher_on(mesh, config, data, workdir) if network.adapted else None
    spec = student_spec(config, data)
    if not config.evaluation.weights:
        trained = load_average(student_dir(config, workdir), network, spec, shardings)
    else:

        def read(weights, place):
            if network.adapted:
                return load_adapter(network.module, weights, place=place)
            form = f"{config.policy.kind}_{config.model.network}"
            return load_params(network.module, weights, form, place)

        path, like = config.evaluation.weights, _placed(nn.unbox(trained), shardings)
        trained = _official(path, "config.evaluation.weights", spec, config, read, like)
    return network.with_base(trained, base)


def load_average(
    directory: str | os.PathLike, network: Network, spec: dict[str, Any], shardings: Any = None
) -> Any:
    """The averaged parameters of a checkpoint.

    Args:
      directory: where the checkpoints lie.
      network: the network.
      spec: what the checkpoint must say of itself.
      shardings: see `load_teacher`.

    Returns:
      The parameters; of a network with adapters its trained part.

    Raises:
      CheckpointError: there is no checkpoint, it is unusable, or it contradicts the spec.
    """
    _, saved, _ = read_spec(directory)
    check_spec(updated(saved), spec, directory)
    abstract = network.trained(abstract_variables(network))
    return restore_subtree(directory, "ema_params", _placed(abstract, shardings))


def teacher_sampler(
    config: Config,
    data: DataShape,
    steps: int,
    null: Condition | None = None,
    constrain: Constrain | None = None,
) -> Sampler:
    """The guided teacher's Euler sampler.

    Args:
      config: the run's settings.
      data: what the data looks like.
      steps: Euler steps.
      null: of captions, the example of the empty one; needed for guidance only.
      constrain: see `DiT`; for parameters that are split.

    Returns:
      `(params, noise[B, H, W, C], condition) -> x_0[B, H, W, C]`.
    """
    teacher = Systems.of(config, data, null, constrain).teacher

    def sample(params, noise, condition):
        velocity = teacher.bind(params, condition)
        return ode_sample(velocity, noise, steps, TimeWarp(config.train.shift))

    return sample


def student_sampler(config: Config, data: DataShape, constrain: Constrain | None = None) -> Sampler:
    """The student's sampler, at its trained NFE or that of `config.evaluation.nfe`.

    Args:
      config: the run's settings.
      data: what the data looks like.
      constrain: see `DiT`; for parameters that are split.

    Returns:
      `(params, noise, condition) -> x_0`, see `teacher_sampler`.
    """
    network = Systems.of(config, data, constrain=constrain).student_network
    train, settings = config.train, config.evaluation
    sample = sampling.student_sampler(
        network, config.policy, train, substeps=settings.substeps, solver=settings.solver
    )
    warp = TimeWarp(train.shift)
    times = sampling_times(config.sampling_nfe, warp, train.final_step_size_scale)
    return lambda params, noise, condition: sample(
        params, noise, condition, times, settings.temperature
    )


def load_system(config: Config, data: DataShape, workdir: str | os.PathLike, mesh: Mesh | None):
    """Parameters for `system_sampler`, by `load_student` or `load_teacher`.

    Args:
      config: the run's settings; `config.evaluation.system` says whose.
      data: what the data looks like.
      workdir: the run's directory.
      mesh: see `load_student`.

    Returns:
      The parameters.

    Raises:
      CheckpointError: see `load_student`.
      ConfigError: see `load_student`.
    """
    if config.evaluation.system == "student":
        return load_student(config, data, workdir, mesh)
    return _load_teacher_on(mesh, config, data, workdir)


def _load_teacher_on(
    mesh: Mesh | None, config: Config, data: DataShape, workdir: str | os.PathLike
):
    """The teacher's parameters, split over a mesh's devices as `load_student` splits its own."""
    named = named_variables(teacher_network(config.model, data))
    shardings = None if mesh is None else parameter_shardings(mesh, named)
    return load_teacher(config, data, workdir, shardings)


def system_sampler(
    config: Config,
    data: DataShape,
    null: Condition | None = None,
    constrain: Constrain | None = None,
) -> Sampler:
    """The student's sampler, or the teacher's at the last of `config.evaluation.teacher_steps`.

    Args:
      config: the run's settings; `config.evaluation.system` says whose.
      data: what the data looks like.
      null: see `teacher_sampler`.
      constrain: see `DiT`; for parameters that are split.

    Returns:
      `(params, noise, condition) -> x_0`, see `teacher_sampler`.
    """
    if config.evaluation.system == "student":
        return student_sampler(config, data, constrain)
    return teacher_sampler(config, data, config.evaluation.teacher_steps[-1], null, constrain)


def conditions_in_turn(source: Source, data: DataShape) -> tuple[Condition, np.ndarray]:
    """The conditions that samples of figures have in turn, and their labels.

    Args:
      source: the data.
      data: what networks know of it.

    Returns:
      `(conditions, labels int32[n])`: one of each class; without classes those of the first
      examples, all labelled 0; and a single None without conditions.
    """
    if data.num_classes:
        labels = np.arange(data.num_classes, dtype=np.int32)
        return (source.of_classes() if hasattr(source, "of_classes") else labels), labels
    count = min(len(source), _MOST_CONDITIONS)
    examples = [source[index].get("condition") for index in range(count)]
    labels = np.zeros(count, np.int32)
    return (None if examples[0] is None else stacked(examples)), labels
