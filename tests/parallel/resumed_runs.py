"""Starts a run on eight devices, continues it on others, and prints how far the ends are apart.

Arguments are a folder, a network, and which of `ENDS`.
"""

import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
from absl import logging

from piflow_jax.config import parse
from piflow_jax.distillation.stages import student_stage
from piflow_jax.parallel import device_mesh
from piflow_jax.runs.loop import run_stage
from piflow_jax.systems.assembly import Systems
from piflow_jax.systems.datasets import load_source
from piflow_jax.systems.networks import teacher_network
from piflow_jax.systems.shapes import DataShape
from piflow_jax.systems.shardings import teacher_shardings
from tests import tiny, tiny_text

FIRST, STEPS = 4, 8
# data, fsdp, tensor
START, ENDS = (1, 8, 1), {"four": (2, 2, 1), "two": (1, 1, 2), "one": (1, 1, 1)}


def settings_of(network):
    if network == "dit":
        return tiny.get_config()
    settings = tiny_text.get_config(network)
    settings.model.flux.lora_rank = 8
    return settings


def run(network, workdir, shape, steps):
    settings = settings_of(network)
    settings.train.steps = steps
    settings.train.optimizer.learning_rate = 1e-4
    config = parse(settings, None)
    mesh = device_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
    source = load_source(config.data)
    data = DataShape.of(config.data.name, source)
    network = teacher_network(config.model, data)
    teacher = jax.jit(network.init)(jax.random.key(0))
    teacher = jax.device_put(teacher, teacher_shardings(config, mesh, network))
    stage = student_stage(
        Systems.of(config, data, getattr(source, "null", None)), source, teacher, mesh
    )
    options = {"log_every": 1, "checkpoint_every": 100, "keep_checkpoints": 1}
    state = run_stage(stage, workdir, mesh=mesh, **options)
    flat = jax.tree_util.tree_leaves_with_path((state.params, state.ema_params, state.opt_state))
    lines = (workdir / "student/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    return losses, {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in flat}


def distance(ours, theirs):
    """The largest relative distance of a leaf; biases of keys are rounding alone."""
    found = {}
    for name, values in theirs.items():
        if "['qkv']['bias']" not in name:
            size = max(np.linalg.norm(values), 1e-30)
            found[name] = float(np.linalg.norm(ours[name] - values) / size)
    return max(found.values())


if __name__ == "__main__":
    logging.set_verbosity(logging.ERROR)
    folder, network, wanted = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    losses, whole = run(network, folder / "whole", (1, 1, 1), STEPS)
    run(network, folder / "start", START, FIRST)
    results = {}
    for name in wanted:
        shape = ENDS[name]
        shutil.copytree(folder / "start", folder / name)
        ours, arrays = run(network, folder / name, shape, STEPS)
        results[name] = {
            "steps": len(ours),
            "losses": float(np.max(np.abs(np.divide(ours, losses) - 1))),
            "state": distance(arrays, whole),
        }
    print(json.dumps(results))
