"""What each of two processes does for `test_processes.py`.

Arguments are what to do and a folder: of `load` a work directory, whose student and teacher come to
the sums that are printed; of `train` the place for the states; of `read` one with weights and a
list of meshes (sizes of `data`, `fsdp` and `tensor`), for each of which the bytes that were read of
the weights are printed.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path

import jax
import numpy as np

import piflow_jax
from piflow_jax import safetensors_files
from piflow_jax.config import ProcessesConfig, parse
from piflow_jax.convert import open_weights
from piflow_jax.distillation.stages import student_stage
from piflow_jax.loading.weights import converted
from piflow_jax.models.flux import Flux
from piflow_jax.parallel import (
    device_mesh,
    gathered,
    global_batch,
    parameter_shardings,
    processes,
    replicated,
)
from piflow_jax.systems.assembly import Systems
from piflow_jax.systems.built_in import BuiltIn
from piflow_jax.systems.conditioning import Text
from piflow_jax.systems.datasets import load_source
from piflow_jax.systems.networks import named_variables, teacher_network
from piflow_jax.systems.shapes import DataShape
from tests import tiny

STEPS = 3


def loaded(workdir):
    """Sums of a student's samples and of its teacher's velocities."""
    labels = np.arange(4)
    teacher, params = piflow_jax.load_teacher(workdir)
    x = np.ones((4, *teacher.shape), np.float32)
    velocity = jax.jit(teacher.velocity)(params, x, np.full(4, 0.5, np.float32), labels)
    samples = piflow_jax.load(workdir).sample(0, labels, substeps=8)
    return [float(abs(values).sum()) for values in (samples, velocity)]


def trained(mesh):
    """The state after some steps in float64, in which orders of sums hardly show."""
    settings = tiny.get_config()
    settings.train.num_states = 1
    config = parse(settings)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="float64"))
    source = load_source(config.data)
    data = DataShape.of(config.data.name, source)

    def double(tree):
        is_float = lambda x: np.issubdtype(x.dtype, np.floating)  # noqa: E731
        return jax.tree.map(lambda x: x.astype(np.float64) if is_float(x) else x, tree)

    network = teacher_network(config.model, data)
    whole = replicated(mesh)
    teacher = jax.jit(lambda: double(network.init(jax.random.key(0))), out_shardings=whole)
    stage = student_stage(Systems.of(config, data), source, teacher(), mesh)
    init = jax.jit(lambda *given: double(stage.init(*given)), out_shardings=whole)
    state = init(*stage.init_arguments)
    step = jax.jit(stage.step, out_shardings=whole)
    for _ in range(STEPS):
        with jax.set_mesh(mesh):
            state, _ = step(state, *stage.constants, global_batch(next(stage.data), mesh))
    leaves = jax.tree_util.tree_leaves_with_path(gathered(state, mesh))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def load(workdir):
    """The second process loads without the first, then the first without the second."""
    done = workdir / "loaded"
    deadline = time.monotonic() + 100
    while jax.process_index() == 0 and not done.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    found = loaded(workdir)
    done.touch()
    print(json.dumps(found))


def train(folder):
    """On two devices of two processes; then on two of the first process, and on one."""
    jax.config.update("jax_enable_x64", True)
    here = jax.process_index()
    meshes = {"processes": [jax.local_devices(process_index=index)[0] for index in range(2)]}
    if here == 0:
        meshes |= {"devices": jax.local_devices(), "device": jax.local_devices()[:1]}
    for name, devices in meshes.items():
        np.savez(folder / f"{name}_{here}", **trained(device_mesh(devices=devices)))


def network():
    """A FLUX.1 whose arrays four devices can share."""
    sizes = {"hidden": 32, "num_heads": 2, "text_features": 12, "axes_dims_rope": (4, 6, 6)}
    module = Flux(in_channels=4, double_depth=1, single_depth=3, pooled_features=12, **sizes)
    return BuiltIn(module, Text(pooled=True))


def read(folder):
    """Weights on meshes of both processes' devices are those of one device."""
    counted = []

    def counting(path, opened=safetensors_files._bytes_of):
        size, fetch = opened(path)

        def count(first, last):
            counted.append(last - first)
            return fetch(first, last)

        return size, count

    safetensors_files._bytes_of = counting
    ours = network()
    for path in json.loads((folder / "paths.json").read_text()):
        expected = converted(open_weights(path), ours, "flux")
        for sizes in json.loads((folder / "meshes.json").read_text()):
            mesh = device_mesh(*sizes)
            shardings = parameter_shardings(mesh, named_variables(ours))
            weights = open_weights(path)
            counted.clear()
            found = converted(weights, ours, "flux", shardings)
            print("read", sum(counted), "bytes")
            assert jax.tree.map(lambda leaf: leaf.sharding, found) == shardings
            jax.tree.map(np.testing.assert_array_equal, gathered(found, mesh), expected)


if __name__ == "__main__":
    processes.start(ProcessesConfig(start_seconds=100))
    {"load": load, "train": train, "read": read}[sys.argv[1]](Path(sys.argv[2]))
    sys.exit(processes.end(0))
