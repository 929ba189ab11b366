"""Rollouts: fused, by scan, and in scripted PyTorch, against the hardware's bound.

    python -m benchmarks.rollout

times the two cases below on the default device (a CPU or a GPU), prints their tables and keeps them
in `benchmarks/results/rollout.json`. `--rounds` is how often. PyTorch, where it can be used, runs
with as many threads and with an allocator that keeps large blocks, without which it is three times
slower; its end is compared with ours before it is timed.

    latents  K = 32, C = 4, 32 x 32 sites, 128 substeps, from noise to data; a batch of 8, or of 64
             on a GPU: sampling ImageNet's latents with one evaluation
    digits   K = 16, C = 1, 8 x 8 sites, a batch of 32 whose intervals end anywhere: a rollout in
             the training of `configs/digits.py`

The floor of the time is the larger one of two: the mixture once through memory, and one exponential
and `4 C + 4` operations for each component, site and substep, at rates measured in this process.
"""

import argparse
import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness
from piflow_jax.flow.policies import GMFlowPolicy, GMOutput
from piflow_jax.flow.rollout import rollout
from piflow_jax.flow.schedule import TimeWarp

SUBSTEPS = 128
# What is counted by one operation of a chain.
OPERATIONS = {
    "exponentials": (lambda a: jnp.exp(-a), 1),
    "operations": (lambda a: a * 0.5 + 0.25, 2),
}


class Chain(NamedTuple):
    """A loop of elementwise operations, whose body is one pass over an array.

    Attributes:
      length: elements; the array stays in a cache.
      operations: one after the other on an element, in registers: enough that neither the array's
        way from the cache and back nor the start of a pass counts.
      turns: passes in a call, which takes some milliseconds.
    """

    length: int
    operations: int
    turns: int

    @classmethod
    def of(cls, platform: str) -> "Chain":
        """What suits a platform."""
        return cls(2**13, 32, 100) if platform == "cpu" else cls(2**20, 512, 200)

    def program(self, operation: Callable) -> Callable:
        """A loop for each array; they do not depend on each other, and run on different cores."""

        def body(_, values):
            for _ in range(self.operations):
                values = operation(values)
            return values

        return jax.jit(lambda *arrays: [jax.lax.fori_loop(0, self.turns, body, a) for a in arrays])

    def arrays(self, lanes: int) -> list[jax.Array]:
        """What the loops begin with."""
        begin = jnp.linspace(0.1, 0.9, self.length, dtype=jnp.float32)
        return [begin + lane for lane in range(lanes)]


def elementwise_rates() -> dict[str, float]:
    """Exponentials and floating-point operations a second that the arithmetic units do at most."""
    platform = jax.default_backend()
    lanes = harness.machine()["cores"] if platform == "cpu" else 1
    chain = Chain.of(platform)
    arrays, rates = chain.arrays(lanes), {}
    for name, (operation, count) in OPERATIONS.items():
        run = chain.program(operation)
        least = float("inf")
        for _ in range(12):
            start = time.perf_counter()
            harness.settle(run(*arrays))
            least = min(least, time.perf_counter() - start)
        rates[name] = count * lanes * chain.length * chain.turns * chain.operations / least
    return rates


def inputs(batch: int, side: int, components: int, channels: int, ends: np.ndarray):
    """A mixture at noise, the noise, and where its samples end."""
    rng = np.random.default_rng(0)
    sites = (batch, side, side)
    output = GMOutput(
        means=rng.standard_normal((*sites, components, channels), np.float32),
        logweights=rng.standard_normal((*sites, components), np.float32),
        logstd=np.full(batch, np.log(0.05), np.float32),
    )
    x = rng.standard_normal((*sites, channels), np.float32)
    return jax.tree.map(jnp.asarray, (output, x, ends.astype(np.float32)))


def alternatives(output: GMOutput, x: jax.Array, ends: jax.Array) -> dict[str, Callable]:
    """What makes the same rollout, by name; policies are made before, as a sampler has them."""
    one = jnp.ones_like(ends)
    policy = jax.jit(lambda output, x: GMFlowPolicy.create(output, x, one))(output, x)

    def ours(implementation):
        run = jax.jit(
            lambda policy, x, ends: rollout(
                policy,
                x,
                one,
                ends,
                TimeWarp(),
                SUBSTEPS,
                bound="traced",
                implementation=implementation,
            )[0]
        )
        return lambda: run(policy, x, ends)

    builders = {name: functools.partial(ours, name) for name in ("fused", "scan")}
    device = harness.torch_device()
    if device:
        builders["PyTorch, scripted"] = lambda: torch_call(device, output, x, ends, ours("scan"))
    return builders


def torch_call(
    device: str, output: GMOutput, x: jax.Array, ends: jax.Array, reference: Callable
) -> Callable:
    """The rollout in PyTorch, when its end has been compared with the reference's."""
    import torch

    from benchmarks.torch_rollout import rollout as torch_rollout

    if device == "cpu":
        torch.set_num_threads(harness.machine()["cores"])

    def given(values, *axes):
        values = np.moveaxis(np.asarray(values), axes, range(1, len(axes) + 1))
        return torch.tensor(np.ascontiguousarray(values), device=device)

    noise, ones = given(x, -1), torch.ones(len(ends), device=device)
    arguments = (
        noise,
        noise[:, None] - given(output.means, -2, -1),
        given(output.logweights, -1),
        torch.exp(2 * given(output.logstd)),
        noise,
        ones,
        ones,
        given(ends),
        SUBSTEPS,
    )

    def scripted():
        with torch.no_grad():
            return torch_rollout(*arguments)

    expected = np.asarray(reference())
    found = np.moveaxis(scripted().cpu().numpy(), 1, -1)
    assert np.abs(found - expected).max() < 1e-2 * np.abs(expected).max(), "PyTorch's differs"
    return scripted


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--case", choices=("latents", "digits"), help="one of the cases alone")
    options = parser.parse_args()
    harness.tune_allocator()
    rates = elementwise_rates()
    memory = harness.measured_peaks(()).bytes
    latents = 8 if jax.default_backend() == "cpu" else 64
    anywhere = np.random.default_rng(1).uniform(size=32)
    cases = {
        "latents": (latents, 32, 32, 4, np.zeros(latents)),
        "digits": (32, 8, 16, 1, anywhere),
    }
    for name, sizes in cases.items():
        if options.case not in (None, name):
            continue
        batch, side, components, channels, ends = sizes
        sites = batch * side**2
        substeps = np.maximum(np.round((1 - ends) * SUBSTEPS), 1).mean()
        exponentials = sites * components * substeps
        operations = exponentials * (4 * channels + 4)
        seconds = exponentials / rates["exponentials"] + operations / rates["operations"]
        work = harness.Work(
            items=int(sites * substeps),
            unit="sites and substeps",
            flops=exponentials + operations,
            bytes=4 * sites * (components * (channels + 1) + 4 * channels),
            dtype="elementwise",
        )
        peaks = harness.Peaks(bytes=memory, flops={"elementwise": work.flops / seconds})
        case = harness.compare(alternatives(*inputs(*sizes)), work, peaks, rounds=options.rounds)
        about = {"K": components, "C": channels, "side": side, "batch": batch}
        harness.save("rollout", name, case, sizes=about, substeps=SUBSTEPS, rates=rates)


if __name__ == "__main__":
    main()
