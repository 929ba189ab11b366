"""`--mode=compile`: the student's step, compiled for a TPU slice that need not be attached."""

import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from piflow_jax.config import Config, ConfigError
from piflow_jax.data import load_source
from piflow_jax.models.flops import forward_flops, traced_flops
from piflow_jax.parallel import batch_sharding, replicated
from piflow_jax.parallel.topology import CHIPS, fully_sharded, topology_mesh
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
from piflow_jax.training.step import distill_step

GIB = 2**30


def compile_step(config: Config, workdir: str | os.PathLike) -> dict[str, Any]:
    """Compiles the distillation step of a configuration and says what it takes.

    State and teacher are fully sharded over the slice, the batch is split over it. No weights and,
    for ImageNet, no data are needed.

    Args:
      config: the run's settings; `config.topology` names the slice.
      workdir: `compile_<topology>.json` is written there.

    Returns:
      What is written: memory by device in bytes, FLOPs of a step, seconds.

    Raises:
      ConfigError: `config.topology` is unknown, or the batch does not divide.
    """
    try:
        mesh = topology_mesh(config.topology)
    except ValueError as error:
        raise ConfigError(f"config.topology: {error}") from error
    parts = config.train.microbatches * mesh.size
    if config.train.batch_size % parts:
        raise ConfigError(
            f"config.train.microbatches times the {mesh.size} devices of {config.topology} must "
            f"divide config.train.batch_size, got {config.train.batch_size}"
        )
    if config.data.name == "imagenet":
        data = IMAGENET_LATENTS
    else:
        data = DataShape.of(config.data.name, load_source(config.data.name))
    teacher = teacher_network(config.model, data)
    student = student_network(config.model, config.policy, data)
    optimizer = make_optimizer(config.train.optimizer, config.train.steps)
    step = distill_step(student, teacher, optimizer, config, data.num_classes)

    def init():
        return TrainState.create(init_params(student, jax.random.key(0)), optimizer)

    size, batch_size = data.sample_size, config.train.batch_size
    state, teacher_params = jax.eval_shape(init), abstract_params(teacher)
    image = (batch_size, size, size, data.channels)
    batch = {
        "image": jax.ShapeDtypeStruct(image, jnp.float32),
        "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    }
    arguments = (state, teacher_params, jax.eval_shape(lambda: jax.random.key(0)), batch)
    whole, rows = replicated(mesh), batch_sharding(mesh)
    shardings = fully_sharded(mesh, state), fully_sharded(mesh, teacher_params), whole, rows

    logging.info("compiling for %s, %d devices", config.topology, mesh.size)
    start = time.perf_counter()
    compiled = (
        jax.jit(
            step,
            donate_argnums=0,
            in_shardings=shardings,
            out_shardings=(shardings[0], whole),
        )
        .lower(*arguments)
        .compile()
    )
    seconds = time.perf_counter() - start

    memory = compiled.memory_analysis()
    # Donated arguments and the outputs that take their place are counted once.
    peak = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
    queries = config.train.num_states * (1 if config.teacher.guidance_scale == 1 else 2)
    segments = config.train.nfe if config.train.data_free else 1
    of_student = segments * batch_size * 3 * forward_flops(student, size, size)
    of_teacher = segments * batch_size * queries * forward_flops(teacher, size, size)
    counted = traced_flops(step, *arguments)
    report = {
        "topology": config.topology,
        "devices": mesh.size,
        "batch_per_device": batch_size // mesh.size,
        "microbatches": config.train.microbatches,
        "remat": config.model.remat,
        "dtype": config.model.dtype,
        "memory_bytes": {
            "arguments": memory.argument_size_in_bytes,
            "temporary": memory.temp_size_in_bytes,
            "peak": peak,
            "chip": CHIPS[config.topology.split(":")[0]].memory,
        },
        "flops": {
            "counted": counted,
            "minimum": of_student + of_teacher,
            "ratio": counted / (of_student + of_teacher),
            "teacher_share": of_teacher / (of_student + of_teacher),
        },
        "compile_seconds": seconds,
        "jax": jax.__version__,
    }
    path = Path(workdir) / f"compile_{config.topology.replace(':', '_')}.json"
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    logging.info("%s", _summary(report))
    logging.info("wrote %s", path)
    return report


def _summary(report: dict[str, Any]) -> str:
    memory, flops = report["memory_bytes"], report["flops"]
    fits = "fits" if memory["peak"] <= memory["chip"] else "does NOT fit"
    return (
        f"{report['topology']}: {report['batch_per_device']} examples per device in "
        f"{report['microbatches']} microbatches, remat {report['remat']}\n"
        f"memory per device: {memory['peak'] / GIB:.2f} GiB of {memory['chip'] / GIB:.0f}, {fits} "
        f"(state and inputs {memory['arguments'] / GIB:.2f}, temporary "
        f"{memory['temporary'] / GIB:.2f})\n"
        f"FLOPs per step: {flops['counted']:.3e}, {flops['ratio']:.3f} times the minimum; "
        f"the teacher's share of the minimum is {flops['teacher_share']:.0%}\n"
        f"compiled in {report['compile_seconds']:.0f} s"
    )
