"""Bytes of a weight file that each process reads, for FLUX.1 on 1, 4 and 16 processes.

`python -m benchmarks.weights_read` pairs the official names and shapes of FLUX.1 [dev] in bfloat16
with the leaves of the network of `configs/flux.py`, puts these on meshes of simulated devices, four
to a process as on a host of TPUs, and asks the code by which weights are loaded what each process
reads. Nothing is read; the header of a file, which each process reads whole, is not counted. It
prints the table of `docs/scaling.md`.
"""

import argparse
import math
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=64"

import jax
import ml_dtypes
from flax.traverse_util import flatten_dict

from configs import flux
from piflow_jax.config import parse
from piflow_jax.convert.flux import flux_rules
from piflow_jax.loading.routes import route
from piflow_jax.parallel import config_mesh, parameter_shardings
from piflow_jax.safetensors_files import LazyArray
from piflow_jax.systems.networks import NETWORKS, named_variables, teacher_network

PROCESSES, CHIPS = (1, 4, 16), 4


def reads(config, processes: int) -> tuple[str, int, list[tuple[int, int]]]:
    """The mesh, bytes of the network, and of each process bytes and ranges."""
    network = teacher_network(config.model, NETWORKS["flux"].official)
    rules = flux_rules(network.module)
    state = {
        name: LazyArray(rule.torch_shape, ml_dtypes.bfloat16, read=None)
        for rule in rules
        for name in rule.torch_names
    }
    sizes = {name: 2 * math.prod(array.shape) for name, array in state.items()}
    mesh = config_mesh(config, jax.devices()[: processes * CHIPS])
    places = flatten_dict(parameter_shardings(mesh, named_variables(network))["params"])
    found = []
    for process in range(processes):
        devices = jax.devices()[process * CHIPS : (process + 1) * CHIPS]
        lengths = []
        for rule in rules:
            leaf = rule.leaf(state)
            _, axis, runs = route(leaf.shape, leaf.rows, places[rule.path], devices)
            for run in runs:
                index = (*(slice(None),) * axis, slice(run.start, run.stop))
                for name, rows in leaf.reads(index):
                    row = sizes[name] // state[name].shape[0]
                    lengths.append((rows.stop - rows.start) * row)
        found.append((sum(lengths), len(lengths)))
    return f"{mesh.shape['fsdp']} x {mesh.shape['data']}", sum(sizes.values()), found


def main() -> None:
    """Prints the table."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    config = parse(flux.get_config("datafree"), None)
    print("| processes | chips | fsdp x data | GB read by one | share | ranges | GB read by all |")
    print("| ---: " * 7 + "|")
    for processes in PROCESSES:
        mesh, total, found = reads(config, processes)
        most, ranges = max(found)
        print(
            f"| {processes} | {processes * CHIPS} | {mesh} | {most / 1e9:.2f} | {most / total:.2%} "
            f"| {ranges} | {sum(size for size, _ in found) / 1e9:.2f} |"
        )


if __name__ == "__main__":
    main()
