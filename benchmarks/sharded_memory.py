"""What a device holds of a distillation's state, and needs while a step runs, by `fsdp`.

`python -m benchmarks.sharded_memory` makes the state of a student of DiT-S/2's size (33 million
parameters) on 8 simulated devices, with `fsdp` from 1 to 8 and the rest `data`, adds up the bytes
that one device really holds, and compiles the step of ImageNet's recipe with 4 examples on each
device. It prints a Markdown table and writes `benchmarks/results/sharded_memory.json`.
"""

import argparse
import json
import os
from pathlib import Path

from piflow_jax.systems.assembly import Systems

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp

from configs import imagenet
from piflow_jax.config import parse
from piflow_jax.parallel import (
    ActivationSharding,
    batch_sharding,
    device_mesh,
    parameter_shardings,
    replicated,
    state_shardings,
)
from piflow_jax.runs.monitor import step_memory
from piflow_jax.systems.network import abstract_variables
from piflow_jax.systems.networks import NETWORKS, named_variables
from piflow_jax.training.optimizer import make_optimizer
from piflow_jax.training.state import TrainState
from piflow_jax.training.step import distill_step

RESULT = Path(__file__).parent / "results" / "sharded_memory.json"
DEVICES, BATCH = 8, 32


def device_bytes(tree) -> int:
    """Bytes of a tree's arrays that lie on the first device."""
    device = jax.devices()[0]
    shards = (s for leaf in jax.tree.leaves(tree) for s in leaf.addressable_shards)
    return sum(shard.data.nbytes for shard in shards if shard.device == device)


def measure(fsdp: int) -> dict[str, int]:
    """Bytes on a device for one mesh."""
    settings = imagenet.get_config("gm_repa")
    own = settings.model.dit
    own.hidden, own.depth, own.num_heads = 384, 12, 6
    settings.train.batch_size = BATCH
    settings.train.microbatches = 1
    config = parse(settings, None)
    mesh = device_mesh(DEVICES // fsdp, fsdp)
    pin = ActivationSharding(mesh)
    data = NETWORKS["dit"].official
    systems = Systems.of(config, data, constrain=pin)
    student, teacher = systems.student_network, systems.teacher_network
    optimizer = make_optimizer(config.train.optimizer, config.train.steps)

    def init():
        return TrainState.create(student.init(jax.random.key(0)), optimizer)

    shardings = state_shardings(mesh, jax.eval_shape(init), named_variables(student))
    state = jax.jit(init, out_shardings=shardings)()
    held = {
        "parameters": device_bytes(state.params),
        "average": device_bytes(state.ema_params),
        "optimizer": device_bytes(state.opt_state),
    }
    teacher_params = abstract_variables(teacher)
    size = data.sample_size
    batch = {
        "x": jax.ShapeDtypeStruct((BATCH, size, size, 4), jnp.float32),
        "condition": jax.ShapeDtypeStruct((BATCH,), jnp.int32),
    }
    inputs = (
        shardings,
        parameter_shardings(mesh, named_variables(teacher)),
        replicated(mesh),
        batch_sharding(mesh),
    )
    step = jax.jit(
        distill_step(student, systems.teacher, optimizer, config, data.channels),
        donate_argnums=0,
        in_shardings=inputs,
        out_shardings=(shardings, replicated(mesh)),
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    compiled = step.lower(jax.eval_shape(init), teacher_params, key, batch).compile()
    return held | {"temporary": step_memory(compiled)["temporary"]}


def main() -> None:
    """Runs the benchmark."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    rows = {fsdp: measure(fsdp) for fsdp in (1, 2, 4, 8)}
    names = ("parameters", "average", "optimizer", "temporary")
    print(f"| fsdp | {' | '.join(f'{name}, MiB' for name in names)} |")
    print("| ---: " * (len(names) + 1) + "|")
    for fsdp, row in rows.items():
        cells = [f"{row[n] / 2**20:.1f} ({rows[1][n] / row[n]:.2f})" for n in names]
        print(f"| {fsdp} | {' | '.join(cells)} |")
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({"jax": jax.__version__, "fsdp": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
