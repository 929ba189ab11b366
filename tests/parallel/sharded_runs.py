"""Twenty distillation steps for each job `[precision, name, mesh]`; prints what came of them."""

import collections
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
from piflow_jax.training.networks import (
    DataShape,
    init_params,
    student_network,
    teacher_network,
)
from piflow_jax.training.optimizer import make_optimizer
from piflow_jax.training.state import TrainState
from piflow_jax.training.step import distill_step

DATA = DataShape(name="digits", sample_size=8, channels=1, num_classes=10)
BATCH, STEPS, TOKENS = 16, 20, 16
MOVES = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"


def settings():
    config = base_config()
    config.model.hidden = 32
    config.model.num_heads = 4
    config.model.depth = 2
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


def run(shape, dtype, path):
    mesh = device_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
    config = settings()
    teacher = teacher_network(config.model, DATA).clone(dtype=dtype)
    student = student_network(config.model, config.policy, DATA).clone(dtype=dtype)
    optimizer = make_optimizer(config.train.optimizer, STEPS)

    def fresh(module, seed):
        params = init_params(module, jax.random.key(seed))
        return jax.tree.map(lambda leaf: leaf.astype(dtype), params)

    def init_teacher():
        return jax.tree.map(shift, fresh(teacher, 0))

    def init(teacher_params):
        params = fresh(student, 1)
        params = student_from_teacher(jax.random.key(2), student, params, teacher_params)
        return TrainState.create(params, optimizer)

    where = parameter_shardings(mesh, jax.eval_shape(init_teacher))
    teacher_params = jax.jit(init_teacher, out_shardings=where)()
    shardings = state_shardings(mesh, jax.eval_shape(init, teacher_params))
    state = jax.jit(init, out_shardings=shardings)(teacher_params)
    shares = {
        name: layer["kernel"].addressable_data(0).size / layer["kernel"].size
        for name, layer in state.params["params"]["blocks"].items()
    }

    rng = np.random.default_rng(0)
    batch = {
        "image": rng.uniform(-1, 1, (BATCH, 8, 8, 1)).astype(dtype),
        "label": rng.integers(0, 10, BATCH).astype(np.int32),
    }
    batch = jax.device_put(batch, batch_sharding(mesh))
    root = jax.device_put(jax.random.key(3), replicated(mesh))
    pin = ActivationSharding(mesh)
    step = distill_step(
        student.clone(constrain=pin), teacher.clone(constrain=pin), optimizer, config, DATA
    )
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

    text = compiled.as_text()
    found = re.findall(rf"= \(?\w+\[([\d,]*)\].* ({MOVES})(?:-start)?\(", text)
    gathered = [shape.split(",") for shape, kind in found if kind == "all-gather"]
    batches = {str(BATCH), str(2 * BATCH)}
    return {
        "losses": losses,
        "params": str(path),
        "shares": shares,
        "collectives": collections.Counter(kind for _, kind in found),
        "gathered": {
            "kernels": sum(shape[0] == "32" and len(shape) > 1 for shape in gathered),
            "tokens": [
                shape
                for shape in gathered
                if len(shape) > 2 and shape[0] in batches and shape[1] in (str(TOKENS), "8")
            ],
        },
    }


if __name__ == "__main__":
    folder, jobs = Path(sys.argv[1]), json.loads(sys.argv[2])
    results = {}
    for precision, name, shape in jobs:
        path = folder / f"{precision}_{name}.npz"
        results[f"{precision} {name}"] = run(shape, jnp.dtype(precision), path)
    print(json.dumps(results))
