"""`--mode=export`: the student, and a teacher that was trained here, under official names."""

import json
import os
from pathlib import Path

from absl import logging

from piflow_jax.config import Config, ConfigError
from piflow_jax.convert import to_torch_state, write_safetensors
from piflow_jax.stages.systems import data_shape, load_student, load_teacher
from piflow_jax.training.loop import checkpoint_dir
from piflow_jax.training.networks import (
    student_network,
    student_spec,
    teacher_network,
    teacher_spec,
)


def export(config: Config, workdir: str | os.PathLike) -> list[Path]:
    """Writes `<workdir>/student.safetensors`, and `teacher.safetensors` for a teacher of this run.

    Names and layouts are those of the pi-Flow release, the values are the averaged ones, bit for
    bit. The file's metadata has what the network, the policy and sampling need, under `piflow_jax`.

    Args:
      config: the run's settings.
      workdir: the run's directory.

    Returns:
      The files.

    Raises:
      CheckpointError: there is no student, or it contradicts the settings.
      ConfigError: the student's policy is ArcFlow's, which the release does not have.
    """
    if config.policy.kind == "arc":
        raise ConfigError(
            "config.policy.kind = 'arc' has no official names to be exported under; "
            "piflow_jax.load reads the run's directory"
        )
    data = data_shape(config, workdir)
    student = student_network(config.model, config.policy, data)
    params = load_student(config, data, workdir)
    parts = [("student", student, params, student_spec(config, data))]
    if checkpoint_dir(workdir, "teacher").is_dir():
        teacher = teacher_network(config.model, data)
        params = load_teacher(config, data, workdir)
        parts.append(("teacher", teacher, params, teacher_spec(config, data)))
    paths = []
    for name, module, params, spec in parts:
        path = Path(workdir) / f"{name}.safetensors"
        metadata = {"format": "pt", "piflow_jax": json.dumps(spec)}
        write_safetensors(path, to_torch_state(module, params), metadata)
        logging.info("wrote %s", path)
        paths.append(path)
    return paths
