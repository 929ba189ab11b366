"""`--mode=compile` and `--mode=compile_sampling`: for a TPU slice that need not be attached."""

import dataclasses
import functools
import importlib.metadata
import os
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh, SingleDeviceSharding
from jax.typing import DTypeLike

from piflow_jax.config import Config, ConfigError, naming
from piflow_jax.distillation.sizes import Machine, Sizes
from piflow_jax.keys import seed_key
from piflow_jax.parallel import (
    ActivationSharding,
    batch_sharding,
    config_mesh,
    parameter_shardings,
    replicated,
)
from piflow_jax.parallel.collectives import collective_bytes
from piflow_jax.parallel.cycles import estimated_cycles
from piflow_jax.parallel.flops import flops
from piflow_jax.parallel.topology import CHIPS, Chip, topology_devices
from piflow_jax.runs.monitor import step_memory
from piflow_jax.runs.workdir import user_path
from piflow_jax.systems.assembly import Systems
from piflow_jax.systems.correctors import corrector_kind
from piflow_jax.systems.datasets import dataset, load_source, shape_of
from piflow_jax.systems.network import abstract_variables
from piflow_jax.systems.networks import named_variables, official_data
from piflow_jax.systems.sampling import student_substeps
from piflow_jax.systems.segments import longest_segment
from piflow_jax.systems.settings import check_ours
from piflow_jax.systems.shapes import DataShape
from piflow_jax.systems.shardings import student_shardings, teacher_shardings
from piflow_jax.systems.spaces import open_space
from piflow_jax.training.optimizer import make_optimizer
from piflow_jax.training.step import distill_step, first_student_state
from piflow_jax.whole_files import write_json

GIB = 2**30
# Tokens of a caption in the recipes of text to image.
_TEXT_LENGTH = 512
# Named scopes of the step whose shares of the estimated cycles are reported.
SCOPES = ("teacher", "student", "policy", "optimizer")


def compile_step(config: Config, workdir: str | os.PathLike) -> dict[str, Any]:
    """Compiles the distillation step of a configuration and reports its memory and FLOPs.

    State, teacher and batch lie on the slice as `config.mesh` says. No weights and, for latents
    and prompts, no data are needed.

    Args:
      config: the run's settings; `config.topology` names the slice.
      workdir: `compile_<topology>.json` is written there.

    Returns:
      The content of the file: memory per device in bytes, FLOPs of a step, the compiler's estimate
      of cycles per device and step with the share of each part, and seconds. `cycles.minimum` is
      what the networks' FLOPs without recomputation would take at the rate that the compiler
      expects of a large matrix product. A rollout that is a loop ends when the last sample of the
      batch has arrived. The estimate assumes the maximum, the substeps of the longest segment. The
      compiler has no estimate for kernels, which are rollouts and splash attention: their number is
      given, and they are left out of the cycles.

    Raises:
      ConfigError: `config.topology` is unknown, the batch does not divide, or the step does not
        fit the devices' memory.
    """
    make = functools.partial(_step_program, workdir=workdir)
    return _compiled(config, workdir, "compile", "train", make)


def compile_sampling(config: Config, workdir: str | os.PathLike) -> dict[str, Any]:
    """Compiles the student's sampler, without a decoder, as `compile_step` does the step.

    The program makes `config.evaluation.batch_size` samples at a time. Parameters are split as
    `config.mesh` says.

    Args:
      config: the run's settings; `config.topology` names the slice.
      workdir: `compile_sampling_<topology>.json` is written there.

    Returns:
      What is written, see `compile_step`.

    Raises:
      ConfigError: see `compile_step`.
    """
    return _compiled(config, workdir, "compile_sampling", "evaluation", _sampling_program)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Program:
    """A program, what it takes and where that lies.

    Attributes:
      function: what is compiled.
      arguments: shapes of its arguments.
      shardings: of the arguments.
      results: shardings of its results.
      substeps: of the longest rollout of a policy.
      remedy: what to do if it does not fit.
      settings: what the report says of it.
      donated: numbers of arguments that are.
    """

    function: Callable
    arguments: tuple[Any, ...]
    shardings: tuple[Any, ...]
    results: Any
    substeps: int
    remedy: str
    settings: dict[str, Any]
    donated: tuple[int, ...] = ()

    def compile(self, mesh: Mesh) -> jax.stages.Compiled:
        jitted = jax.jit(
            self.function,
            donate_argnums=self.donated,
            in_shardings=self.shardings,
            out_shardings=self.results,
        )
        with jax.set_mesh(mesh):  # as in training
            lowered = jitted.lower(*self.arguments)
        try:
            return lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            reason = str(error).splitlines()[0]
            raise ConfigError(f"{self.remedy} ({reason})") from error


def _compiled(
    config: Config,
    workdir: str | os.PathLike,
    name: str,
    group: str,
    make: Callable[[Config, Mesh], _Program],
) -> dict[str, Any]:
    """Compiles a program whose batches are those of a group of settings, and reports."""
    with naming("config.topology"):
        devices = topology_devices(config.topology)
    mesh = config_mesh(config, devices, groups=(group,))
    program, batch_size = make(config, mesh), getattr(config, group).batch_size
    logging.info("compiling for %s, %d devices", config.topology, mesh.size)
    start = time.perf_counter()
    compiled = program.compile(mesh)
    seconds = time.perf_counter() - start
    text = compiled.as_text()
    substeps = {"policy": program.substeps}
    flops_of_run = _flops(program, batch_size)
    rate = mesh.size * product_rate(devices[0], config.model.dtype)
    report = {
        "topology": config.topology,
        "devices": mesh.size,
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "batch_size": batch_size,
        "batch_per_device": batch_size / mesh.size,
        **program.settings,
        "dtype": config.model.dtype,
        "attention": config.model.attention,
        "base_dtype": getattr(config.model.own, "base_dtype", "float32"),
        "memory_bytes": dict(step_memory(compiled)) | {"chip": _chip(config).memory},
        "flops": flops_of_run,
        "cycles": _cycles(text, program.substeps) | {"minimum": flops_of_run["minimum"] / rate},
        "collective_bytes": collective_bytes(text, SCOPES, substeps),
        "compile_seconds": seconds,
        "jax": jax.__version__,
        "libtpu": importlib.metadata.version("libtpu"),
        "libtpu_flags": os.environ.get("LIBTPU_INIT_ARGS", ""),
    }
    path = user_path(workdir) / f"{name}_{re.sub(r'[^A-Za-z0-9_]', '_', config.topology)}.json"
    write_json(path, report)
    logging.info("%s", _summary(report))
    logging.info("wrote %s", path)
    return report


def _data(config: Config) -> DataShape:
    """The shape of the data; of latents that of official weights, at the size of the images."""
    if not dataset(config).latents:
        return shape_of(config, load_source(config.data))
    check_ours(config, f"--mode=compile of config.data.name = {config.data.name!r}")
    official = official_data(config)
    return dataclasses.replace(official, sample_size=config.data.image_size // official.stride)


def _batch(config: Config, systems: Systems, batch_size: int) -> dict[str, Any]:
    """Shapes of a batch of training; without data, captions have the size of samples alone."""
    data, conditioning = systems.data, systems.teacher_network.conditioning
    channels = 0 if conditioning.reads_text and config.train.data_free else data.channels
    length = config.data.text_length or _TEXT_LENGTH
    return {
        "x": jax.ShapeDtypeStruct((batch_size, *data.shape[:-1], channels), jnp.float32),
        "condition": conditioning.example(data, batch_size, length),
    }


def _systems(config: Config, mesh: Mesh) -> Systems:
    data = _data(config)
    # Of the example of an empty caption, the shapes alone matter here.
    caption = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape[1:], leaf.dtype),
        _batch(config, Systems.of(config, data), 1)["condition"],
    )
    return Systems.of(config, data, caption, ActivationSharding(mesh))


def _sizes(config: Config, mesh: Mesh, systems: Systems) -> Sizes:
    return Sizes(systems, machine=Machine.of_chips(_chip(config), mesh.size))


def _step_program(config: Config, mesh: Mesh, workdir: str | os.PathLike) -> _Program:
    systems, train = _systems(config, mesh), config.train
    student, teacher = systems.student_network, systems.teacher_network
    _sizes(config, mesh, systems).check_student_training()
    space, row = None, corrector_kind(config)
    if row and row.of_data:
        space = open_space(config, load_source(config.data), workdir, dataset(config).features)
    optimizer = make_optimizer(train.optimizer, train.steps)
    teacher_params = abstract_variables(teacher)
    first = functools.partial(first_student_state, seed_key(0), config, student, space=space)
    state = jax.eval_shape(first, student.trained(abstract_variables(student)), teacher_params)
    batch = _batch(config, systems, train.batch_size)
    of_state = student_shardings(config, mesh, state, student)
    return _Program(
        function=distill_step(
            student, systems.teacher, optimizer, config, systems.data.channels, space=space
        ),
        arguments=(state, teacher_params, jax.eval_shape(lambda: seed_key(0)), batch),
        shardings=(
            of_state,
            teacher_shardings(config, mesh, teacher),
            replicated(mesh),
            batch_sharding(mesh),
        ),
        results=(of_state, replicated(mesh)),
        donated=(0,),
        substeps=max(round(longest_segment(train) * train.total_substeps), 1),
        remedy=f"the step does not fit {config.topology}; raise config.train.microbatches, set "
        "config.model.remat or split the state over config.mesh.fsdp",
        settings={
            "microbatches": train.microbatches,
            "remat": config.model.remat,
            "moment_dtype": train.optimizer.moment_dtype,
        },
    )


def _sampling_program(config: Config, mesh: Mesh) -> _Program:
    systems, settings = _systems(config, mesh), config.evaluation
    student = systems.student_network
    _sizes(config, mesh, systems).check_sampling(settings.batch_size)
    params = abstract_variables(student)
    batch = _batch(config, systems, settings.batch_size)
    noise = jax.ShapeDtypeStruct((settings.batch_size, *systems.data.shape), jnp.float32)
    nfe = config.sampling_nfe
    split = batch_sharding(mesh)
    return _Program(
        function=systems.student_sampler(),
        arguments=(params, noise, batch["condition"]),
        shardings=(parameter_shardings(mesh, named_variables(student)), split, split),
        results=split,
        substeps=int(student_substeps(config.train, nfe, settings.substeps).max()),
        remedy=f"the sampler does not fit {config.topology}; lower config.evaluation.batch_size or "
        "split the parameters over config.mesh.fsdp",
        settings={"nfe": nfe},
    )


def _chip(config: Config) -> Chip:
    return CHIPS[config.topology.split(":")[0]]


def _flops(program: _Program, examples: int) -> dict[str, Any]:
    """FLOPs of a run on all devices, and those of the networks without what is recomputed."""
    counted = flops(program.function, *program.arguments, scopes=SCOPES)
    networks = {scope: counted.by_scope[scope] for scope in ("teacher", "student")}
    minimum = sum(networks.values())
    return {
        "counted": counted.total,
        "minimum": minimum,
        "ratio": counted.total / minimum,
        "teacher_share": networks["teacher"] / minimum,
        "per_example": counted.total / examples,
    }


def product_rate(device: jax.Device, dtype: DTypeLike) -> float:
    """FLOPs per cycle that the compiler expects of a product of two matrices of 8,192 squared."""
    side = 8192
    matrix = jax.ShapeDtypeStruct((side, side), dtype, sharding=SingleDeviceSharding(device))
    program = jax.jit(jnp.matmul).lower(matrix, matrix).compile()
    return 2 * side**3 / estimated_cycles(program.as_text(), ()).total


def _cycles(text: str, substeps: int) -> dict[str, Any]:
    """The compiler's estimate for a run on one device, and what each part of it takes."""
    cycles = estimated_cycles(text, SCOPES, {"policy": substeps})
    return {
        "total": cycles.total,
        "shares": cycles.shares,
        "rollouts": len(cycles.traced),
        "kernels": text.count('custom_call_target="tpu_custom_call"'),
        "substeps": substeps,
    }


def _summary(report: dict[str, Any]) -> str:
    memory, flops, cycles = report["memory_bytes"], report["flops"], report["cycles"]
    shares = ", ".join(f"{scope} {share:.1%}" for scope, share in cycles["shares"].items())
    fits = "fits" if memory["peak"] <= memory["chip"] else "does NOT fit"
    parts = f" in {report['microbatches']} microbatches" if "microbatches" in report else ""
    return (
        f"{report['topology']}: {report['batch_per_device']:g} examples per device{parts}\n"
        f"memory per device: {memory['peak'] / GIB:.2f} GiB of {memory['chip'] / GIB:.0f}, {fits} "
        f"(state and inputs {memory['arguments'] / GIB:.2f}, temporary "
        f"{memory['temporary'] / GIB:.2f})\n"
        f"FLOPs of a run: {flops['counted']:.3e}, {flops['ratio']:.3f} times the minimum; "
        f"the teacher's share of the minimum is {flops['teacher_share']:.0%}\n"
        f"estimated cycles by device: {cycles['total']:.3e}, "
        f"{cycles['total'] / cycles['minimum']:.2f} times those of the minimum in large products; "
        f"rollouts at {cycles['substeps']} substeps, {cycles['kernels']} kernels, of which the "
        f"compiler has no estimate; {shares}\n"
        f"compiled in {report['compile_seconds']:.0f} s"
    )
