"""The rollout as a kernel compiled for TPU slices that need not be attached; a bound of its cycles.

    python -m benchmarks.rollout_tpu v5e:2x2 v5p:2x2x1 v6e:2x4

compiles a rollout of 8 samples on each chip (K = 32, C = 4, 32 x 32 sites, 128 substeps), the batch
split by `jit` under `jax.set_mesh` as in training, and keeps what came of it in
`benchmarks/results/rollout_tpu.json`. XLA has no estimate of a kernel's cycles. The bound is the
vector operations of a substep, counted in its program, over the four that a core starts in a cycle:
the kernel takes no less. Beside it is the least that the arithmetic of a sample's network
evaluations takes, at the maker's peak rate and 1.5 GHz on a v5e: of DiT-XL/2's one, and of FLUX.1's
and Qwen-Image's four at 1024x1024. Without slices only the bounds are made.
"""

import argparse
import json
import os
import re
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from benchmarks import harness
from piflow_jax.flow.policies import GMFlowPolicy, GMOutput
from piflow_jax.flow.rollout import rollout
from piflow_jax.flow.schedule import TimeWarp
from piflow_jax.kernels.recurrence import COLUMNS, Recurrence
from piflow_jax.kernels.substep import Component, substep
from piflow_jax.parallel.topology import CHIPS, topology_devices

BATCH, SIDE, COMPONENTS, CHANNELS, SUBSTEPS = 8, 32, 32, 4, 128
SITES_OF_A_REGISTER = 1024
STARTED_IN_A_CYCLE = 4
V5E_CLOCK = 1.5e9
REPORTS = Path(__file__).parents[1] / "docs" / "results" / "text_to_image"
NO_ARITHMETIC = {"broadcast_in_dim", "convert_element_type", "reshape", "squeeze"}


def operations_of_a_substep(components: int, channels: int) -> int:
    """Vector operations of one substep of 1,024 sites, by its program."""
    block = jax.ShapeDtypeStruct((8, 128), jnp.float32)
    by_channel = [block] * channels
    mixture = [Component(by_channel, block, block)] * components
    numbers = Recurrence(*[jax.ShapeDtypeStruct((), jnp.float32)] * COLUMNS)

    def run(of, y, previous, src, center, mixture):
        return substep(of, y, previous, src, center, mixture.__getitem__, components)

    program = jax.make_jaxpr(run)(numbers, *[by_channel] * 4, mixture)
    return sum(
        equation.outvars[0].aval.shape == block.shape
        and equation.primitive.name not in NO_ARITHMETIC
        for equation in program.eqns
    )


def flops_of_a_sample(network: str) -> float:
    """Those of a sample's network evaluations, by the compiled sampler's report."""
    report = json.loads((REPORTS / f"{network}-sampling-v5e_2x2.json").read_text())
    return report["flops"]["per_example"]


def bound(components: int, channels: int, sites: int, flops: float) -> dict:
    """The least that a sample's rollout takes, and its share of what the network does at least."""
    operations = operations_of_a_substep(components, channels)
    cycles = operations * sites / SITES_OF_A_REGISTER * SUBSTEPS / STARTED_IN_A_CYCLE
    network = flops / CHIPS["v5e"].flops * V5E_CLOCK
    return {
        "operations_of_a_substep": operations,
        "cycles_of_a_sample": cycles,
        "cycles_of_the_network": network,
        "share": cycles / network,
        "share_at_64_substeps": cycles / network * 64 / SUBSTEPS,
    }


def compile_for(topology: str) -> dict:
    """Compiles the rollout for one slice."""
    devices = topology_devices(topology)
    mesh = Mesh(np.asarray(devices), ("data",), axis_types=(AxisType.Auto,))
    batch, spec = BATCH * len(devices), PartitionSpec("data")

    def shape(*axes):
        return jax.ShapeDtypeStruct((batch, *axes), jnp.float32)

    def run(output, x, end):
        one = jnp.ones_like(end)
        policy = GMFlowPolicy.create(output, x, one)
        return rollout(policy, x, one, end, TimeWarp(), SUBSTEPS, bound="traced")[0]

    output = GMOutput(
        shape(SIDE, SIDE, COMPONENTS, CHANNELS), shape(SIDE, SIDE, COMPONENTS), shape()
    )
    start = time.perf_counter()
    jitted = jax.jit(run, in_shardings=NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        lowered = jitted.lower(output, shape(SIDE, SIDE, CHANNELS), shape())
    compiled = lowered.compile()
    text = compiled.as_text()
    return {
        "chips": len(devices),
        "kernels": text.count('custom_call_target="tpu_custom_call"'),
        "collectives": len(re.findall(r"= \S+ (?:all-|reduce-scatter|collective-)", text)),
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "compile_seconds": time.perf_counter() - start,
    }


def main() -> None:
    """Compiles, counts and keeps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("slices", nargs="*")
    slices = parser.parse_args().slices
    path = harness.RESULTS / "rollout_tpu.json"
    kept = json.loads(path.read_text()) if path.exists() else {"slices": {}}
    # DiT's paper gives 118.6 G multiply-adds for DiT-XL/2 and a latent of 32 x 32.
    kept["bound"] = {"imagenet": bound(COMPONENTS, CHANNELS, SIDE**2, 2 * 118.6e9)}
    for network in ("flux", "qwen_image"):
        kept["bound"][network] = bound(8, 16, 128**2, flops_of_a_sample(network))
    path.write_text(json.dumps(kept, indent=1) + "\n")
    for topology in slices:
        kept["slices"][topology] = compile_for(topology)
        path.write_text(json.dumps(kept, indent=1) + "\n")
        print(topology, kept["slices"][topology])
    print(json.dumps(kept["bound"], indent=1))


if __name__ == "__main__":
    main()
