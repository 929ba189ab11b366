"""Splash attention on a mesh of eight devices; prints its errors and what moves between devices."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from piflow_jax.models import attention

MOVES = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"

if __name__ == "__main__":
    axes = ("data", "fsdp", "tensor")
    devices = np.asarray(jax.devices()).reshape(2, 2, 2)
    mesh = Mesh(devices, axes, axis_types=(AxisType.Auto,) * 3)
    split = functools.partial(
        attention._over_mesh, functools.partial(attention.splash, interpret=True)
    )
    found = {}
    # Batch and heads that the mesh divides, and such that it does not divide.
    for name, batch, heads in (("divided", 4, 2), ("whole", 3, 3)):
        rng = np.random.default_rng(0)
        q, k, v = rng.standard_normal((3, batch, 100, heads, 8)).astype(np.float32)
        mask = rng.random((batch, 100)) > 0.2
        expected = attention.attend(q, k, v, key_mask=mask)
        if name == "divided":
            tokens = NamedSharding(mesh, P(("data", "fsdp"), None, "tensor"))
            q, k, v = (jax.device_put(x, tokens) for x in (q, k, v))
            mask = jax.device_put(mask, NamedSharding(mesh, P(("data", "fsdp"))))
        with jax.set_mesh(mesh):
            program = jax.jit(split).lower(q, k, v, mask).compile()
        out = program(q, k, v, mask)
        found[name] = {
            "error": float(jnp.abs(np.asarray(out) - np.asarray(expected)).max()),
            "moves": len(re.findall(MOVES, program.as_text())),
            "part": out.sharding.shard_shape(out.shape),
        }
    print(json.dumps(found))
