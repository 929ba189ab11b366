"""A split rollout under a run's `config.compilation_cache`; prints hits, its text and its end."""

import json
import re
import sys

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from piflow_jax.config import parse
from piflow_jax.flow.policies import GMOutput
from piflow_jax.modes import command
from tests import tiny
from tests.kernels.split_rollouts import run

if __name__ == "__main__":
    workdir = sys.argv[1]
    config = tiny.get_config()
    config.compilation_cache = f"{workdir}/compiled"
    command._start(parse(config), command.MODES["train"], workdir)
    events = []
    jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
    mesh = Mesh(np.asarray(jax.devices()), ("data",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, P("data"))
    rng = np.random.default_rng(0)
    arrays = (
        GMOutput(rng.normal(size=(4, 3, 2, 1)), rng.normal(size=(4, 3, 2)), np.full(4, -1.0)),
        rng.normal(size=(4, 3, 1)),
        np.linspace(0, 0.9, 4),
    )
    arrays = jax.tree.map(lambda a: a.astype(np.float32), arrays)
    lowered = jax.jit(run, in_shardings=split).lower(*arrays)
    compiled = lowered.compile()
    text = lowered.as_text()
    found = {
        "hits": events.count("/jax/compilation_cache/cache_hits"),
        "by_address": text.count("CustomSPMDPartitioning"),
        "names": sorted(set(re.findall(r"@(mixture_rollout_\w+)", text))),
        "end": np.asarray(compiled(*jax.device_put(arrays, split))).tolist(),
    }
    print(json.dumps(found))
