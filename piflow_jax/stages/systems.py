"""Trained systems from checkpoints, as samplers."""

import os

import jax
import numpy as np

from piflow_jax.config import Config, ConfigError
from piflow_jax.convert import load_torch_state, open_weights
from piflow_jax.evaluation.evaluator import Sampler
from piflow_jax.flow.sampling import few_step_sample, ode_sample
from piflow_jax.flow.schedule import TimeWarp
from piflow_jax.models.dit import DiT
from piflow_jax.parallel import data_mesh, replicated
from piflow_jax.training.checkpoint import check_spec, read_spec, restore_subtree
from piflow_jax.training.loop import checkpoint_dir
from piflow_jax.training.networks import (
    DataShape,
    abstract_params,
    student_network,
    student_spec,
    teacher_network,
    teacher_spec,
)
from piflow_jax.training.objectives import guided_teacher, make_policy_factory

__all__ = ["load_student", "load_teacher", "student_sampler", "teacher_sampler"]


def load_teacher(config: Config, data: DataShape, workdir: str | os.PathLike):
    """The teacher's parameters: official weights, or the average of a checkpoint.

    The checkpoint is the given one or that of the work directory.

    Args:
      config: the run's settings.
      data: what the data looks like.
      workdir: the run's directory.

    Returns:
      Parameters of `teacher_network(config.model, data)`, on every device.

    Raises:
      CheckpointError: there is no checkpoint, it is unusable, or it contradicts the settings.
      ConfigError: the official weights contradict the settings.
    """
    if config.teacher.weights:
        return _official_teacher(config, data)
    directory = config.teacher.checkpoint or checkpoint_dir(workdir, "teacher")
    return _load(directory, teacher_network(config.model, data), teacher_spec(config, data))


def _official_teacher(config: Config, data: DataShape):
    module, path = teacher_network(config.model, data), config.teacher.weights
    sharding = replicated(data_mesh())
    sizes = ("patch_size", "in_channels", "hidden", "depth", "mlp_ratio", "num_classes")
    try:
        _, params = load_torch_state(
            open_weights(path),
            config.teacher.weights_format,
            num_heads=module.num_heads,
            sample_size=module.sample_size,
            time_scale=module.time_scale,
            place=lambda _, leaf: jax.device_put(leaf.astype(np.float32), sharding),
            **{size: getattr(module, size) for size in sizes},
        )
    except ValueError as error:
        raise ConfigError(f"config.teacher.weights = {path!r}: {error}") from error
    return params


def load_student(config: Config, data: DataShape, workdir: str | os.PathLike):
    """The student's averaged parameters from the work directory; see `load_teacher`."""
    directory = checkpoint_dir(workdir, "student")
    module = student_network(config.model, config.policy, data)
    return _load(directory, module, student_spec(config, data))


def _load(directory: str | os.PathLike, module: DiT, spec: dict):
    _, saved, _ = read_spec(directory)
    check_spec(saved, spec, directory)
    sharding = replicated(data_mesh())
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract_params(module),
    )
    return restore_subtree(directory, "ema_params", abstract)


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
        )

    return sample
