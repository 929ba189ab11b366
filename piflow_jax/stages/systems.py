"""Trained systems from checkpoints, as samplers."""

import os
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from piflow_jax.config import Config, ConfigError
from piflow_jax.convert import load_torch_state, open_weights
from piflow_jax.data import load_source
from piflow_jax.evaluation.evaluator import Sampler
from piflow_jax.flow.sampling import few_step_sample, ode_sample
from piflow_jax.flow.schedule import TimeWarp
from piflow_jax.models.dit import DiT
from piflow_jax.parallel import local_mesh, parameter_shardings, replicated, state_shardings
from piflow_jax.training.checkpoint import (
    CheckpointError,
    check_spec,
    read_spec,
    restore_subtree,
)
from piflow_jax.training.loop import checkpoint_dir
from piflow_jax.training.networks import (
    IMAGENET_LATENTS,
    DataShape,
    abstract_params,
    student_network,
    student_settings,
    student_spec,
    teacher_network,
    teacher_spec,
)
from piflow_jax.training.objectives import guided_teacher, make_policy_factory

__all__ = [
    "data_shape",
    "load_student",
    "load_teacher",
    "student_sampler",
    "student_shardings",
    "teacher_sampler",
    "teacher_shardings",
]

# Sizes that official weights show and a configuration has too.
_SIZES = ("patch_size", "in_channels", "hidden", "depth", "mlp_ratio", "num_classes")


def teacher_shardings(config: Config, mesh: Mesh, params: Any) -> Any:
    """Where a teacher's parameters lie while it is imitated; see `config.mesh.teacher`."""
    return parameter_shardings(mesh, params, split=config.mesh.teacher == "split")


def student_shardings(config: Config, mesh: Mesh, state: Any) -> Any:
    """Where a student's state lies; see `config.mesh.student` and `config.mesh.ema`."""
    rules = config.mesh
    return state_shardings(mesh, state, split=rules.student == "split", ema=rules.ema == "split")


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
    if config.data.name != "imagenet":
        return DataShape.of(config.data.name, load_source(config.data.name, config.data.data_dir))
    if config.evaluation.weights:
        return IMAGENET_LATENTS
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
      ConfigError: the official weights contradict the settings.
    """
    module = teacher_network(config.model, data)
    if config.teacher.weights:
        key, form = "config.teacher.weights", config.teacher.weights_format
        return _official(config.teacher.weights, key, form, module, shardings)
    directory = config.teacher.checkpoint or checkpoint_dir(workdir, "teacher")
    return _load(directory, module, teacher_spec(config, data), shardings)


def _placed(module: DiT, shardings: Any) -> Any:
    """Shapes of a network's parameters with the shardings that they get."""
    abstract = abstract_params(module)
    if shardings is None:
        shardings = jax.tree.map(lambda _: replicated(local_mesh()), abstract)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        shardings,
    )


def _official(path: str, key: str, form: str, module: DiT, shardings: Any):
    """Parameters of official weights, if they are this module's."""
    where = flatten_dict(_placed(module, shardings)["params"])

    def place(name, leaf):
        # One that has no place is no parameter of this module, which is said below.
        sharding = where[name].sharding if name in where else None
        return jax.device_put(leaf.astype(np.float32), sharding)

    try:
        loaded, params = load_torch_state(
            open_weights(path),
            form,
            num_heads=module.num_heads,
            sample_size=module.sample_size,
            time_scale=module.time_scale,
            place=place,
            **{size: getattr(module, size) for size in _SIZES},
        )
        if loaded.head != module.head:
            raise ValueError(f"the head is {loaded.head}, the settings are those of {module.head}")
    except ValueError as error:
        raise ConfigError(f"{key} = {path!r}: {error}") from error
    return params


def load_student(
    config: Config,
    data: DataShape,
    workdir: str | os.PathLike,
    shardings: Any = None,
):
    """The student's parameters: official weights, or the average of the run's checkpoint.

    See `load_teacher`.
    """
    module = student_network(config.model, config.policy, data)
    if config.evaluation.weights:
        path, form = config.evaluation.weights, f"{config.policy.kind}_dit"
        return _official(path, "config.evaluation.weights", form, module, shardings)
    return _load(student_dir(config, workdir), module, student_spec(config, data), shardings)


def _load(directory: str | os.PathLike, module: DiT, spec: dict, shardings: Any):
    _, saved, _ = read_spec(directory)
    check_spec(saved, spec, directory)
    return restore_subtree(directory, "ema_params", _placed(module, shardings))


def teacher_sampler(config: Config, data: DataShape, steps: int) -> Sampler:
    """The guided teacher's Euler sampler, `(params, noise, labels) -> x_0`."""
    module = teacher_network(config.model, data)

    def sample(params, noise, labels):
        velocity = guided_teacher(
            lambda *inputs: module.apply(params, *inputs), labels, data.num_classes, config.teacher
        )
        return ode_sample(velocity, noise, steps, TimeWarp(config.train.shift))

    return sample


def student_sampler(config: Config, data: DataShape) -> Sampler:
    """The student's sampler at its trained NFE, `(params, noise, labels) -> x_0`."""
    module = student_network(config.model, config.policy, data)
    factory = make_policy_factory(config.policy, config.train, sampling=True)
    train = config.train

    def sample(params, noise, labels):
        return few_step_sample(
            lambda x, sigma: factory(module.apply(params, x, sigma, labels), x, sigma),
            noise,
            train.nfe,
            TimeWarp(train.shift),
            total_substeps=config.evaluation.substeps,
            final_step_size_scale=train.final_step_size_scale,
            solver=config.evaluation.solver,
        )

    return sample
