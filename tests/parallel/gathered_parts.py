"""Bytes by collective of products with a split matrix, compiled for slices; prints them.

`python gathered_parts.py v5e:8x8@16 v5e:8x16@64`: for `fsdp = 16` and 64, of a width of 1152.
"""

import json
import sys

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from piflow_jax.parallel import batch_sharding, device_mesh
from piflow_jax.parallel.collectives import collective_bytes
from piflow_jax.parallel.topology import gather_weights_whole, topology_devices

WIDTH, LAYERS, TOKENS = 1152, 4, 1024


def moved(fsdp, devices):
    mesh = device_mesh(fsdp=fsdp, devices=devices)
    split = batch_sharding(mesh)

    def layers(kernels, x):
        def layer(x, kernel):
            x = x + jax.nn.gelu(x @ kernel.astype(x.dtype))
            return jax.lax.with_sharding_constraint(x, split), None

        return jax.lax.scan(layer, x, kernels)[0]

    kernels = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32)
    x = jax.ShapeDtypeStruct((TOKENS * len(devices), WIDTH), jnp.bfloat16)
    rows = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    program = jax.jit(layers, in_shardings=(rows, split), out_shardings=split)
    return collective_bytes(program.lower(kernels, x).compile().as_text())


if __name__ == "__main__":
    gather_weights_whole()  # as in a run
    found = {}
    for name in sys.argv[1:]:
        topology, _, size = name.partition("@")
        found[name] = moved(int(size), topology_devices(topology))
    print(json.dumps(found))
