"""`--mode=compile`: the student's step, compiled for a TPU slice that need not be attached."""

import dataclasses
import importlib.metadata
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import Mesh

from piflow_jax.config import Config, ConfigError, check_devices
from piflow_jax.data import load_source
from piflow_jax.models.dit import DiT
from piflow_jax.models.flops import traced_flops
from piflow_jax.parallel import ActivationSharding, batch_sharding, device_mesh, replicated
from piflow_jax.parallel.collectives import collective_bytes
from piflow_jax.parallel.cycles import estimated_cycles
from piflow_jax.parallel.topology import CHIPS, Chip, topology_devices
from piflow_jax.stages.systems import student_shardings, teacher_shardings
from piflow_jax.training.monitor import step_memory
from piflow_jax.training.networks import (
    IMAGENET_LATENTS,
    DataShape,
    abstract_params,
    init_params,
    student_network,
    teacher_network,
)
from piflow_jax.training.optimizer import make_optimizer
from piflow_jax.training.state import TrainState
from piflow_jax.training.step import StepFn, distill_flops, distill_step

GIB = 2**30
# Named scopes of the step whose shares of the estimated cycles are reported.
SCOPES = ("teacher", "student", "policy", "optimizer")


def compile_step(config: Config, workdir: str | os.PathLike) -> dict[str, Any]:
    """Compiles the distillation step of a configuration and says what it takes.

    State, teacher and batch lie on the slice as `config.mesh` says. No weights and, for ImageNet,
    no data are needed.

    Args:
      config: the run's settings; `config.topology` names the slice.
      workdir: `compile_<topology>.json` is written there.

    Returns:
      What is written: memory by device in bytes, FLOPs of a step, the compiler's estimate of cycles
      by device and step with each part's share, seconds. The policy's rollouts end when the
      farthest sample of the batch has arrived; each is counted at `train.total_substeps`, the most
      that there can be.

    Raises:
      ConfigError: `config.topology` is unknown, the batch does not divide, or the step does not
        fit the devices' memory.
    """
    try:
        devices = topology_devices(config.topology)
    except ValueError as error:
        raise ConfigError(f"config.topology: {error}") from error
    mesh = device_mesh(**check_devices(config, len(devices)), devices=devices)
    program = _program(config, mesh)

    logging.info("compiling for %s, %d devices", config.topology, mesh.size)
    start = time.perf_counter()
    compiled = program.compile(config.topology)
    seconds = time.perf_counter() - start

    report = {
        "topology": config.topology,
        "devices": mesh.size,
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "batch_size": config.train.batch_size,
        "batch_per_device": config.train.batch_size // mesh.size,
        "microbatches": config.train.microbatches,
        "remat": config.model.remat,
        "dtype": config.model.dtype,
        "moment_dtype": config.train.optimizer.moment_dtype,
        "memory_bytes": dict(step_memory(compiled)) | {"chip": _chip(config).memory},
        "flops": _flops(config, program),
        "cycles": _cycles(config, compiled),
        "collective_bytes": collective_bytes(
            compiled.as_text(), SCOPES, {"policy": config.train.total_substeps}
        ),
        "compile_seconds": seconds,
        "jax": jax.__version__,
        "libtpu": importlib.metadata.version("libtpu"),
        "libtpu_flags": os.environ.get("LIBTPU_INIT_ARGS", ""),
    }
    name = re.sub(r"\W", "_", config.topology)
    path = Path(workdir) / f"compile_{name}.json"
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    logging.info("%s", _summary(report))
    logging.info("wrote %s", path)
    return report


@dataclasses.dataclass(frozen=True)
class _Program:
    """The step, what it takes and where that lies."""

    step: StepFn
    arguments: tuple[Any, ...]
    shardings: tuple[Any, ...]
    student: DiT
    teacher: DiT
    data: DataShape

    def compile(self, topology: str) -> jax.stages.Compiled:
        whole = self.shardings[2]
        step = jax.jit(
            self.step,
            donate_argnums=0,
            in_shardings=self.shardings,
            out_shardings=(self.shardings[0], whole),
        )
        lowered = step.lower(*self.arguments)
        try:
            return lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"the step does not fit {topology}; raise config.train.microbatches, set "
                f"config.model.remat or split the state over config.mesh.fsdp ({reason})"
            ) from error


def _program(config: Config, mesh: Mesh) -> _Program:
    if config.data.name == "imagenet":
        data = IMAGENET_LATENTS
    else:
        data = DataShape.of(config.data.name, load_source(config.data.name))
    constrain = ActivationSharding(mesh)
    teacher = teacher_network(config.model, data).clone(constrain=constrain)
    student = student_network(config.model, config.policy, data).clone(constrain=constrain)
    optimizer = make_optimizer(config.train.optimizer, config.train.steps)

    def init():
        return TrainState.create(init_params(student, jax.random.key(0)), optimizer)

    size, batch_size = data.sample_size, config.train.batch_size
    state, teacher_params = jax.eval_shape(init), abstract_params(teacher)
    image = (batch_size, size, size, data.channels)
    batch = {
        "image": jax.ShapeDtypeStruct(image, jnp.float32),
        "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    }
    return _Program(
        step=distill_step(student, teacher, optimizer, config, data),
        arguments=(state, teacher_params, jax.eval_shape(lambda: jax.random.key(0)), batch),
        shardings=(
            student_shardings(config, mesh, state),
            teacher_shardings(config, mesh, teacher_params),
            replicated(mesh),
            batch_sharding(mesh),
        ),
        student=student,
        teacher=teacher,
        data=data,
    )


def _chip(config: Config) -> Chip:
    return CHIPS[config.topology.split(":")[0]]


def _flops(config: Config, program: _Program) -> dict[str, Any]:
    """FLOPs of a step on all devices, and the least that the method can do with."""
    counted = traced_flops(program.step, *program.arguments)
    of_student, of_teacher = (
        config.train.batch_size * flops
        for flops in distill_flops(program.student, program.teacher, config, program.data)
    )
    minimum = of_student + of_teacher
    return {
        "counted": counted,
        "minimum": minimum,
        "ratio": counted / minimum,
        "teacher_share": of_teacher / minimum,
    }


def _cycles(config: Config, compiled) -> dict[str, Any]:
    """The compiler's estimate for a step on one device, and what each part of it takes."""
    substeps = config.train.total_substeps
    cycles = estimated_cycles(compiled.as_text(), SCOPES, {"policy": substeps})
    return {
        "total": cycles.total,
        "shares": cycles.shares,
        "rollouts": len(cycles.traced),
        "substeps": substeps,
    }


def _summary(report: dict[str, Any]) -> str:
    memory, flops, cycles = report["memory_bytes"], report["flops"], report["cycles"]
    shares = ", ".join(f"{scope} {share:.1%}" for scope, share in cycles["shares"].items())
    fits = "fits" if memory["peak"] <= memory["chip"] else "does NOT fit"
    return (
        f"{report['topology']}: {report['batch_per_device']} examples per device in "
        f"{report['microbatches']} microbatches, remat {report['remat']}\n"
        f"memory per device: {memory['peak'] / GIB:.2f} GiB of {memory['chip'] / GIB:.0f}, {fits} "
        f"(state and inputs {memory['arguments'] / GIB:.2f}, temporary "
        f"{memory['temporary'] / GIB:.2f})\n"
        f"FLOPs per step: {flops['counted']:.3e}, {flops['ratio']:.3f} times the minimum; "
        f"the teacher's share of the minimum is {flops['teacher_share']:.0%}\n"
        f"estimated cycles per step and device: {cycles['total']:.3e}, rollouts at "
        f"{cycles['substeps']} substeps; {shares}\n"
        f"compiled in {report['compile_seconds']:.0f} s"
    )
