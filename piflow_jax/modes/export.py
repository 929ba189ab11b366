"""`--mode=export`: the student, and a teacher that was trained here, under official names."""

import json
import os
from typing import Any

import jax
from absl import logging
from etils import epath

from piflow_jax.config import Config, ConfigError
from piflow_jax.convert import (
    adapter_config,
    export_adapter,
    to_torch_state,
    write_safetensors,
)
from piflow_jax.loading.runs import (
    data_shape,
    load_student,
    load_teacher,
    spaces_of,
    student_dir,
    with_exact_base,
)
from piflow_jax.models.lora import fuse
from piflow_jax.parallel import config_mesh
from piflow_jax.runs.loop import checkpoint_dir
from piflow_jax.runs.steps import latest_step
from piflow_jax.runs.workdir import user_path
from piflow_jax.systems.networks import student_network, teacher_network
from piflow_jax.systems.policies import POLICIES
from piflow_jax.systems.settings import check_ours
from piflow_jax.systems.shapes import DataShape
from piflow_jax.systems.spec import TRAINED_IN, student_spec, teacher_spec

# What official pipelines look for in an adapter's directory.
_ADAPTER = "adapter/diffusion_pytorch_model.safetensors"


def export(config: Config, workdir: str | os.PathLike) -> list[epath.Path]:
    """Writes `<workdir>/student.safetensors`, and `teacher.safetensors` for a teacher of this run.

    Names and layouts are those of the pi-Flow release. The values are the averaged weights, bit for
    bit. The metadata `piflow_jax` holds the settings of the network, the policy and sampling.

    A student with adapters is written twice. `adapter/` has the trained parameters only, which
    official pipelines add to the official network. `student.safetensors` is a whole network, with
    the adapters added to its weights.

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
    row = POLICIES[config.policy.kind]
    refusal = row.unnamed(config.policy)
    if refusal is not None:
        raise ConfigError(refusal)
    check_ours(config, "--mode=export")
    if jax.process_count() > 1:
        raise ConfigError(
            "--mode=export runs in one process, which writes whole weights: start it on one host, "
            "without the variables that make it one of several"
        )
    workdir = user_path(workdir)
    config = with_exact_base(config, workdir)
    data = data_shape(config, workdir)
    student = student_network(config.model, config.policy, data, config.teacher)
    # Split, as a large network is whole on no device; it is put together on the host.
    mesh = config_mesh(config)
    params = load_student(config, data, workdir, mesh)
    # What a student's file says of itself, to us and to the official pipelines.
    metadata = {
        "format": "pt",
        "piflow_jax": json.dumps(student_spec(config, data)),
        "policy_config": json.dumps(row.official(config.policy, config.train)),
    }
    spaces = spaces_of(config.evaluation.weights or student_dir(config, workdir))
    if spaces:
        metadata[TRAINED_IN] = json.dumps(spaces)
    workdir.mkdir(parents=True, exist_ok=True)
    paths = []
    module = student.module
    if student.adapted:
        path = workdir / _ADAPTER
        path.parent.mkdir(parents=True, exist_ok=True)
        state = export_adapter(module, student.trained(params))
        paths.append(_written(path, state, metadata))
        beside = path.with_name("config.json")
        beside.write_text(json.dumps(adapter_config(module), indent=2) + "\n", encoding="utf-8")
        paths.append(beside)
        params, module = fuse(params, module.lora.scale), module.clone(lora=None)
    state = to_torch_state(module, params)
    paths.append(_written(workdir / "student.safetensors", state, metadata))
    if latest_step(checkpoint_dir(workdir, "teacher")) is not None:
        paths.append(_teacher(config, data, workdir))
    return paths


def _teacher(config: Config, data: DataShape, workdir: epath.Path) -> epath.Path:
    module = teacher_network(config.model, data).module
    state = to_torch_state(module, load_teacher(config, data, workdir))
    metadata = {"format": "pt", "piflow_jax": json.dumps(teacher_spec(config, data))}
    return _written(workdir / "teacher.safetensors", state, metadata)


def _written(path: epath.Path, state: dict[str, Any], metadata: dict[str, str]) -> epath.Path:
    write_safetensors(path, state, metadata)
    logging.info("wrote %s", path)
    return path
