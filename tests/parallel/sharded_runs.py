"""Twenty distillation steps for each job `[precision, name, mesh]`; prints what came of them."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from piflow_jax.config import base_config, parse
from piflow_jax.models import student_from_teacher
from piflow_jax.parallel import (
    ActivationSharding,
    batch_sharding,
    device_mesh,
    parameter_shardings,
    replicated,
    state_shardings,
)
from piflow_jax.parallel.program import parse_program
from piflow_jax.systems.assembly import Systems
from piflow_jax.systems.networks import named_variables
from piflow_jax.systems.shapes import DataShape
from piflow_jax.training.optimizer import make_optimizer
from piflow_jax.training.state import TrainState
from tests.steps import step_of

DATA = DataShape(name="digits", sample_size=8, channels=1, num_classes=10)
BATCH, STEPS = 16, 20
MOVES = {"all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"}


def settings():
    config = base_config()
    config.model.dit.hidden = 32
    config.model.dit.num_heads = 4
    config.model.dit.depth = 2
    config.policy.num_components = 4
    config.policy.logstd_hidden = 16
    config.train.batch_size = BATCH
    config.train.total_substeps = 8
    config.train.optimizer.learning_rate = 5e-5
    config.train.optimizer.warmup_steps = 2
    config.teacher.guidance_scale = 2.0
    return parse(config)


def shift(leaf):
    """A little of everything: fresh modulations are zero, under which blocks do nothing."""
    noise = jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape)
    return leaf + 0.05 * noise


def moves(text):
    """What a program moves: `[kind, where it comes from, type, shape]` of each array.

    One collective may move several arrays, and what stands in a loop is there once.
    """
    found = []
    for computation in parse_program(text).computations.values():
        for instruction in computation.instructions.values():
            kind = instruction.opcode.removesuffix("-start")
            if kind not in MOVES:
                continue
            arrays = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", instruction.shape)
            if instruction.opcode in ("all-gather-start", "collective-permute-start"):
                arrays = arrays[len(instruction.operands) :][: len(instruction.operands)]
            for dtype, sizes in arrays:
                shape = [int(size) for size in sizes.split(",") if size]
                found.append([kind, instruction.op_name, dtype, shape])
    return found


def run(shape, dtype, path):
    mesh = device_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
    config = settings()
    systems = Systems.of(config, DATA)
    teacher, student = (
        dataclasses.replace(network, module=network.module.clone(dtype=dtype))
        for network in (systems.teacher_network, systems.student_network)
    )
    optimizer = make_optimizer(config.train.optimizer, STEPS)

    def fresh(module, seed):
        params = module.init(jax.random.key(seed))
        return jax.tree.map(lambda leaf: leaf.astype(dtype), params)

    def init_teacher():
        return jax.tree.map(shift, fresh(teacher, 0))

    def init(teacher_params):
        params = fresh(student, 1)
        params = student_from_teacher(jax.random.key(2), student.module, params, teacher_params)
        return TrainState.create(params, optimizer)

    where = parameter_shardings(mesh, named_variables(teacher))
    teacher_params = jax.jit(init_teacher, out_shardings=where)()
    named = named_variables(student)
    shardings = state_shardings(mesh, jax.eval_shape(init, teacher_params), named)
    state = jax.jit(init, out_shardings=shardings)(teacher_params)
    shares = {
        name: layer["kernel"].addressable_data(0).size / layer["kernel"].size
        for name, layer in state.params["params"]["blocks"].items()
    }

    rng = np.random.default_rng(0)
    batch = {
        "x": rng.uniform(-1, 1, (BATCH, 8, 8, 1)).astype(dtype),
        "condition": rng.integers(0, 10, BATCH).astype(np.int32),
    }
    batch = jax.device_put(batch, batch_sharding(mesh))
    root = jax.device_put(jax.random.key(3), replicated(mesh))
    pin = ActivationSharding(mesh)
    step = step_of(config, DATA, optimizer, student.constrained(pin), teacher.constrained(pin))
    compiled = (
        jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))
        .lower(state, teacher_params, root, batch)
        .compile()
    )
    losses = []
    for _ in range(STEPS):
        state, metrics = compiled(state, teacher_params, root, batch)
        losses.append(float(metrics["loss"]))
    flat = jax.tree_util.tree_leaves_with_path(state.params)
    np.savez(path, **{jax.tree_util.keystr(name): np.asarray(leaf) for name, leaf in flat})

    return {
        "losses": losses,
        "params": str(path),
        "shares": shares,
        "moves": moves(compiled.as_text()),
    }


if __name__ == "__main__":
    folder, jobs = Path(sys.argv[1]), json.loads(sys.argv[2])
    results = {}
    for precision, name, shape in jobs:
        path = folder / f"{precision}_{name}.npz"
        results[f"{precision} {name}"] = run(shape, jnp.dtype(precision), path)
    print(json.dumps(results))
