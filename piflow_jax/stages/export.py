"""`--mode=export`: the student, and a teacher that was trained here, under official names."""

import json
import os
from pathlib import Path
from typing import Any

import jax
from absl import logging

from piflow_jax.config import Config, ConfigError
from piflow_jax.convert import (
    adapter_config,
    export_adapter,
    to_torch_state,
    write_safetensors,
)
from piflow_jax.models.lora import fuse
from piflow_jax.parallel import config_mesh
from piflow_jax.stages.systems import data_shape, load_student, load_teacher
from piflow_jax.training.loop import checkpoint_dir
from piflow_jax.training.networks import (
    DataShape,
    policy_config,
    student_network,
    student_spec,
    teacher_network,
    teacher_spec,
    trained_part,
)

# What official pipelines look for in an adapter's directory.
_ADAPTER = "adapter/diffusion_pytorch_model.safetensors"


def export(config: Config, workdir: str | os.PathLike) -> list[Path]:
    """Writes `<workdir>/student.safetensors`, and `teacher.safetensors` for a teacher of this run.

    Names and layouts are those of the pi-Flow release, the values are the averaged ones, bit for
    bit. The file's metadata has what the network, the policy and sampling need, under `piflow_jax`.

    A student with adapters is written twice: as `adapter/`, what was trained, for official
    pipelines to put on the official network, and as `student.safetensors`, a whole network into
    whose weights the adapters have been added.

    Args:
      config: the run's settings.
      workdir: the run's directory.

    Returns:
      The files.

    Raises:
      CheckpointError: there is no student, or it contradicts the settings.
      ConfigError: the student's policy is ArcFlow's or a polynomial, which the release does not
        have, or there are several processes.
    """
    if config.policy.kind == "arc":
        raise ConfigError(
            "config.policy.kind = 'arc' has no official names to be exported under; "
            "piflow_jax.load reads the run's directory"
        )
    if config.policy.kind == "dx" and config.policy.mode == "polynomial":
        raise ConfigError(
            "config.policy.mode = 'polynomial' has no official names to be exported under: the "
            "head has a skip; piflow_jax.load reads the run's directory"
        )
    if jax.process_count() > 1:
        raise ConfigError(
            "--mode=export runs in one process, which writes whole weights: start it on one host, "
            "without the variables that make it one of several"
        )
    workdir = Path(workdir)
    data = data_shape(config, workdir)
    student = student_network(config.model, config.policy, data)
    # Split, as a large network is whole on no device; it is put together on the host.
    mesh = config_mesh(config)
    params = load_student(config, data, workdir, mesh)
    metadata = _metadata(config, student_spec(config, data))
    paths = []
    if config.model.network != "dit":
        path = workdir / _ADAPTER
        path.parent.mkdir(exist_ok=True)
        state = export_adapter(student, trained_part(student, params))
        paths.append(_written(path, state, metadata))
        beside = path.with_name("config.json")
        beside.write_text(json.dumps(adapter_config(student), indent=2) + "\n", encoding="utf-8")
        paths.append(beside)
        params, student = fuse(params, student.lora.scale), student.clone(lora=None)
    state = to_torch_state(student, params)
    paths.append(_written(workdir / "student.safetensors", state, metadata))
    if checkpoint_dir(workdir, "teacher").is_dir():
        paths.append(_teacher(config, data, workdir))
    return paths


def _teacher(config: Config, data: DataShape, workdir: Path) -> Path:
    state = to_torch_state(teacher_network(config.model, data), load_teacher(config, data, workdir))
    metadata = {"format": "pt", "piflow_jax": json.dumps(teacher_spec(config, data))}
    return _written(workdir / "teacher.safetensors", state, metadata)


def _metadata(config: Config, spec: dict[str, Any]) -> dict[str, str]:
    """What a student's file says of itself, to us and to the official pipelines."""
    return {
        "format": "pt",
        "piflow_jax": json.dumps(spec),
        "policy_config": json.dumps(policy_config(config.policy, config.train)),
    }


def _written(path: Path, state: dict[str, Any], metadata: dict[str, str]) -> Path:
    write_safetensors(path, state, metadata)
    logging.info("wrote %s", path)
    return path
