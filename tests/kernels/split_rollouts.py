"""A fused rollout of a batch on eight devices; prints what moves between them and its error."""

import collections
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from piflow_jax.flow.policies import GMFlowPolicy, GMOutput
from piflow_jax.flow.rollout import rollout
from piflow_jax.flow.schedule import TimeWarp

BATCH, SITES, COMPONENTS, CHANNELS = 16, 6, 3, 2
MOVES = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"


def run(output, x, ends):
    """A rollout from noise, as many samples as there are."""
    one = jnp.ones(x.shape[0])
    policy = GMFlowPolicy.create(output, x, one)
    return rollout(policy, x, one, ends, TimeWarp(), 8, bound="traced", implementation="fused")[0]


if __name__ == "__main__":
    axes = ("data", "fsdp")
    devices = np.asarray(jax.devices()).reshape(2, 4)
    mesh = Mesh(devices, axes, axis_types=(AxisType.Auto,) * 2)
    split = NamedSharding(mesh, P(axes))
    rng = np.random.default_rng(0)
    output = GMOutput(
        rng.normal(size=(BATCH, SITES, COMPONENTS, CHANNELS)),
        rng.normal(size=(BATCH, SITES, COMPONENTS)),
        np.full(BATCH, -1.0),
    )
    arrays = (output, rng.normal(size=(BATCH, SITES, CHANNELS)), np.linspace(0, 0.9, BATCH))
    arrays = jax.tree.map(lambda a: a.astype(np.float32), arrays)
    expected = jax.jit(run)(*arrays)
    by_jit = jax.jit(run, in_shardings=split).lower(*arrays).compile()
    moved = re.findall(rf"= \(?\w+\[[\d,]*\].* ({MOVES})(?:-start)?\(", by_jit.as_text())
    end = by_jit(*jax.device_put(arrays, split))
    by_map = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=P(axes), out_specs=P(axes)))
    found = {
        "moved": collections.Counter(moved),
        "split": end.sharding.is_equivalent_to(split, end.ndim),
        "jit": float(jnp.max(jnp.abs(end - expected))),
        "shard_map": float(jnp.max(jnp.abs(by_map(*arrays) - expected))),
    }
    print(json.dumps(found))
