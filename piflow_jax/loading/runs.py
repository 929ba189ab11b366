"""The systems of a run: weights from the checkpoints and files that its settings name."""

import contextlib
import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from etils import epath
from jax.sharding import Mesh

from piflow_jax.arguments import lora_strengths, prefixed
from piflow_jax.config import Config, ConfigError
from piflow_jax.convert import open_weights
from piflow_jax.loading.loras import fine_tuned
from piflow_jax.loading.shipped import located_weights, weights_path
from piflow_jax.loading.weights import averaged, converted, find_checkpoint, saved_base_dtype
from piflow_jax.parallel import local_mesh, parameter_shardings, processes, replicated
from piflow_jax.runs.checkpoint import CheckpointError, check_spec, read_spec
from piflow_jax.runs.loop import checkpoint_dir
from piflow_jax.runs.steps import latest_step
from piflow_jax.runs.workdir import user_path
from piflow_jax.systems.assembly import Systems
from piflow_jax.systems.datasets import dataset, load_source, shape_of
from piflow_jax.systems.network import Network
from piflow_jax.systems.networks import (
    in_few_bits,
    named_variables,
    network_kind,
    official_data,
    student_network,
    teacher_network,
)
from piflow_jax.systems.shapes import DataShape
from piflow_jax.systems.spec import (
    TRAINED_IN,
    check_policy_config,
    config_keys,
    spaces_in,
    spec_of,
    student_settings,
    student_spec,
    teacher_settings,
    teacher_spec,
    updated,
)


def data_shape(config: Config, workdir: str | os.PathLike) -> DataShape:
    """The shape of a student's samples; latents need not be on this machine for it.

    Args:
      config: the run's settings.
      workdir: the run's directory. The checkpoint of its student has the shape of its latents. If
        the teacher is sampled and there is no student yet, the teacher's checkpoint has it.

    Returns:
      The shape of the data. For official weights, see `official_data`.

    Raises:
      CheckpointError: there is no student, or its checkpoint is unusable.
    """
    row = dataset(config)
    if row.bundled or (row.captions and config.data.data_dir):
        return shape_of(config, load_source(config.data))
    of_teacher = config.evaluation.system == "teacher"
    if config.teacher.weights if of_teacher else config.evaluation.weights:
        return official_data(config)
    directory, alone = student_dir(config, workdir), False
    if of_teacher and latest_step(epath.Path(directory)) is None:
        directory, alone = _teacher_dir(config, workdir), True
    _, spec, _ = read_spec(directory)
    with prefixed(directory, to=CheckpointError):
        return teacher_settings(spec)[1] if alone else student_settings(spec).data


def _teacher_dir(config: Config, workdir: str | os.PathLike) -> str | os.PathLike:
    """Where the checkpoints of a teacher lie that is not given as weights."""
    given = config.teacher.checkpoint
    if not given:
        return checkpoint_dir(workdir, "teacher")
    with _given_teacher(config):
        return find_checkpoint(user_path(given), "teacher")[0]


def _given_teacher(config: Config) -> contextlib.AbstractContextManager:
    """Names the key in errors of the checkpoint that `config.teacher.checkpoint` gives."""
    given = f"config.teacher.checkpoint = {config.teacher.checkpoint!r}"
    named = prefixed(given, CheckpointError, CheckpointError)
    return named if config.teacher.checkpoint else contextlib.nullcontext()


def with_exact_base(config: Config, workdir: str | os.PathLike) -> Config:
    """Replaces a `base_dtype` in few bits by the dtype of the checkpoint or weights.

    Args:
      config: the run's settings.
      workdir: the run's directory.

    Returns:
      The settings.

    Raises:
      CheckpointError: there is no teacher, or its checkpoint is unusable.
    """
    model, own = config.model, config.model.own
    if not in_few_bits(getattr(own, "base_dtype", None)):
        return config
    dtype = "bfloat16"
    if not config.teacher.weights:
        _, _, settings = read_spec(_teacher_dir(config, workdir))
        dtype = saved_base_dtype(settings) or "float32"
    own = dataclasses.replace(own, base_dtype=dtype)
    return dataclasses.replace(config, model=dataclasses.replace(model, **{model.network: own}))


def student_dir(config: Config, workdir: str | os.PathLike) -> str:
    """Where the checkpoints of the student lie that `config.evaluation.checkpoint` asks for."""
    stage = "student/best" if config.evaluation.checkpoint == "best" else "student"
    return checkpoint_dir(workdir, stage)


def load_teacher(
    config: Config,
    data: DataShape,
    workdir: str | os.PathLike,
    shardings: Any = None,
    *,
    sampled: str = "",
) -> Any:
    """The teacher's parameters: official weights, or the average of a checkpoint.

    The checkpoint is the one in `config.teacher.checkpoint`, or that of the work directory. LoRA
    files of `config.teacher.loras` are added to official weights.

    Args:
      config: the run's settings.
      data: shape and conditions of the data.
      workdir: the run's directory.
      shardings: see `averaged`; by default every device of this process has all parameters.
      sampled: the system that will sample with them, `student` or `teacher`. Then the LoRA files of
        `config.evaluation.loras` are added as well.

    Returns:
      Parameters of `teacher_network(config.model, data)`.

    Raises:
      CheckpointError: there is no checkpoint, it is unusable, or it contradicts the settings.
      ConfigError: the official weights contradict the settings, or need PyTorch to be read.
    """
    network, spec = teacher_network(config.model, data), teacher_spec(config, data)
    if not config.teacher.weights:
        directory = _teacher_dir(config, workdir)
        with _given_teacher(config):
            return load_average(directory, network, spec, shardings)
    formats = network_kind(config.model).formats
    form = config.teacher.weights_format or formats[0]
    if form not in formats:
        raise ConfigError(
            f"config.teacher.weights_format must be one of {', '.join(formats)} with "
            f"config.model.network = {config.model.network!r}, got {form!r}"
        )
    loras = config.teacher.loras + (config.evaluation.loras if sampled else ())
    added = {"loras": loras, "of_student": sampled == "student"}
    return _official(config, "teacher", network, spec, form, shardings, **added)


def load_student(
    config: Config, data: DataShape, workdir: str | os.PathLike, mesh: Mesh | None = None
) -> Any:
    """The student's parameters: official weights, or the average of the run's checkpoint.

    A student with adapters has the teacher's parameters, see `load_teacher`. Its adapters, head and
    last modulation come from its own weights.

    Args:
      config: the run's settings.
      data: shape and conditions of the data.
      workdir: the run's directory.
      mesh: devices over which the parameters are split; by default every device of this process has
        all of them.

    Returns:
      Parameters of the run's `student_network`.

    Raises:
      CheckpointError: there is no checkpoint, it is unusable, or it contradicts the settings.
      ConfigError: the official weights contradict the settings, or need PyTorch to be read.
    """
    network = student_network(config.model, config.policy, data, config.teacher)
    spec = student_spec(config, data)
    base = _teacher_on(mesh, config, data, workdir, "student") if network.adapted else None
    shardings = _split(mesh, network)
    if config.evaluation.weights:
        form = f"{config.policy.kind}_{config.model.network}"
        trained = _official(config, "evaluation", network, spec, form, shardings)
    else:
        trained = load_average(student_dir(config, workdir), network, spec, shardings)
    return network.with_base(trained, base) if network.adapted else trained


def load_initial(systems: Systems) -> Any:
    """The trained part of the student in `config.train.initial`, where a new student starts.

    Its network and policy have to be the same; evaluations, shift and substeps need not.

    Args:
      systems: the systems of the new student.

    Returns:
      The trained part of `systems.student_network`.

    Raises:
      CheckpointError: there is no such student, or it has another network or policy.
      ImportError: PyTorch is needed to read its weights.
      ValueError: its weights belong to another network, or are damaged.
    """
    config, network = systems.config, systems.student_network
    spec = student_spec(config, systems.data).items()
    of_network = {key: value for key, value in spec if not key.startswith("train.")}
    path, is_weights = located_weights(config.train.initial, "student")
    if is_weights:
        form = f"{config.policy.kind}_{config.model.network}"
        weights = _from_file(path, config, network, of_network, form)
    else:
        directory, step, saved, _ = find_checkpoint(path, "student")
        _check_spec(saved, of_network, directory)
        weights = averaged(directory, network, step, replicated(local_mesh()))
    return weights if network.adapted else network.trained(weights)


def spaces_of(path: str | os.PathLike) -> tuple[str, ...]:
    """Feature spaces in which a student was trained.

    Args:
      path: where its checkpoints lie, or the work directory of a run, or a weight file.

    Returns:
      Their names, for students that were trained by a distance of features.

    Raises:
      CheckpointError: there is no checkpoint, or it is unusable.
      ValueError: the file is damaged.
    """
    path, is_weights = located_weights(path, "student")
    if is_weights:
        return spaces_in(open_weights(path).metadata)
    _, _, _, settings = find_checkpoint(path, "student")
    return tuple(settings.get(TRAINED_IN, ()))


def load_system(
    config: Config, data: DataShape, workdir: str | os.PathLike, mesh: Mesh | None = None
) -> Any:
    """Parameters of the system that `config.evaluation.system` names; see `load_student`."""
    if config.evaluation.system == "student":
        return load_student(config, data, workdir, mesh)
    return _teacher_on(mesh, config, data, workdir, "teacher")


def load_average(
    directory: str | os.PathLike, network: Network, spec: dict[str, Any], shardings: Any = None
) -> Any:
    """The averaged parameters of a checkpoint.

    Args:
      directory: the directory of the checkpoints.
      network: the network.
      spec: the spec that the checkpoint must have.
      shardings: see `load_teacher`.

    Returns:
      The parameters; for a network with adapters, its trained part.

    Raises:
      CheckpointError: there is no checkpoint, it is unusable, or it contradicts the spec.
    """
    step, saved, _ = read_spec(directory)
    _check_spec(saved, spec, directory)
    return averaged(directory, network, step, shardings or replicated(local_mesh()))


def _check_spec(
    saved: Mapping[str, Any], wanted: Mapping[str, Any], path: str | os.PathLike
) -> None:
    """Refuses settings that contradict a spec of any age, by the names that users give them."""
    check_spec(updated(saved), wanted, path, config_keys(wanted))


def _split(mesh: Mesh | None, network: Network) -> Any:
    """Shardings of a network, of an adapted one those of its trained part; None without a mesh."""
    if mesh is None:
        return None
    named = named_variables(network)
    return parameter_shardings(mesh, network.trained(named) if network.adapted else named)


def _teacher_on(
    mesh: Mesh | None, config: Config, data: DataShape, workdir: str | os.PathLike, sampled: str
) -> Any:
    """The teacher's parameters, split over a mesh's devices as `load_student` splits its own."""
    shardings = _split(mesh, teacher_network(config.model, data))
    return load_teacher(config, data, workdir, shardings, sampled=sampled)


def _official(
    config: Config,
    group: str,
    network: Network,
    spec: dict[str, Any],
    form: str,
    shardings: Any,
    *,
    loras: tuple[str, ...] = (),
    of_student: bool = False,
) -> Any:
    """Parameters of a group's weight file that says nothing else than the settings do."""
    given = getattr(config, group).weights
    try:
        path, loras = weights_path(given, spec["kind"]), lora_strengths(loras)
        return _from_file(
            path, config, network, spec, form, shardings, loras=loras, of_student=of_student
        )
    except (CheckpointError, FileNotFoundError, ImportError, ValueError) as error:
        if processes.lost(error):  # another one has refused its part, and says why
            raise
        raise ConfigError(f"config.{group}.weights = {given!r}: {error}") from error


def _from_file(
    path: epath.Path,
    config: Config,
    network: Network,
    spec: dict[str, Any],
    form: str,
    shardings: Any = None,
    *,
    loras: dict[str, float] | None = None,
    of_student: bool = False,
) -> Any:
    """Parameters of a weight file that says nothing else than a spec does."""
    weights = open_weights(path)
    said = spec_of(weights.metadata)
    if said is not None:
        # Data and autoencoder are known only as far as their files are here.
        unknown = {"data.name", "data.vae"}
        if config.data.latents:
            unknown |= {"data.latent_scale", "data.latent_shift"}
        known = {k: v for k, v in spec.items() if k not in unknown}
        _check_spec(said, known, weights.path)
    elif spec["kind"] == "student":
        policy = weights.metadata.get("policy_config")
        check_policy_config(policy, config.policy, config.train)
    weights = fine_tuned(weights, network, form, loras or {}, of_student=of_student)
    return converted(weights, network, form, shardings or replicated(local_mesh()))
