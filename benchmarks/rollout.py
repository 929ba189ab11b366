"""Rollouts: fused, by scan, and in scripted PyTorch, beside what the hardware can do at most.

    python -m benchmarks.rollout

times the two cases below on the default device (a CPU or a GPU), prints their tables and keeps them
in `benchmarks/results/rollout.json`. `--rounds` is how often. PyTorch, where it is installed, runs
with as many threads and with an allocator that keeps large blocks, without which it is three times
slower.

    latents  K = 32, C = 4, 32 x 32 sites, 128 substeps, from noise to data; a batch of 8, or of 64
             on a GPU: sampling ImageNet's latents with one evaluation
    digits   K = 16, C = 1, 8 x 8 sites, a batch of 32 whose intervals end anywhere: a rollout in
             the training of `configs/digits.py`

The floor of the time is the larger one of two: the mixture once through memory, and one exponential
and `4 C + 4` operations for each component, site and substep, at rates measured in this process.
"""

import argparse
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness
from piflow_jax.flow.policies import GMFlowPolicy, GMOutput
from piflow_jax.flow.rollout import rollout
from piflow_jax.flow.schedule import TimeWarp

SUBSTEPS = 128
CHAIN = 32


def elementwise_rates() -> dict[str, float]:
    """Exponentials and floating-point operations a second, of arrays that stay on chip."""
    accelerated = jax.default_backend() != "cpu"
    lanes = 1 if accelerated else harness.machine()["cores"]
    length, turns = (2**24, 1) if accelerated else (2**13, 100)

    def rate(operation: Callable, operations: int) -> float:
        def chain(_, values):
            for _ in range(CHAIN):
                values = operation(values)
            return values

        # Loops that do not depend on each other run on different cores.
        run = jax.jit(lambda *lanes: [jax.lax.fori_loop(0, turns, chain, a) for a in lanes])
        arrays = [jnp.linspace(0.1, 0.9, length, dtype=jnp.float32) + i for i in range(lanes)]
        least = float("inf")
        for _ in range(12):
            start = time.perf_counter()
            harness.settle(run(*arrays))
            least = min(least, time.perf_counter() - start)
        return operations * lanes * length * turns * CHAIN / least

    return {
        "exponentials": rate(lambda a: jnp.exp(-a), 1),
        "operations": rate(lambda a: a * 0.5 + 0.25, 2),
    }


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
    """The same rollout by name; the policy is made outside, as in training and sampling."""
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

    calls = {"fused": ours("fused"), "scan": ours("scan")}
    try:
        import torch

        from benchmarks.torch_rollout import rollout as torch_rollout
    except ImportError:
        return calls
    device = "cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu"
    if device == "cpu":
        torch.set_num_threads(harness.machine()["cores"])

    def given(values, *axes):
        values = np.moveaxis(np.asarray(values), axes, range(1, len(axes) + 1))
        return torch.tensor(np.ascontiguousarray(values), device=device)

    noise, ones = given(x, -1), given(one)
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

    expected = np.asarray(calls["scan"]())
    found = np.moveaxis(scripted().cpu().numpy(), 1, -1)
    assert np.abs(found - expected).max() < 1e-2 * np.abs(expected).max(), "PyTorch's differs"
    return calls | {"PyTorch, scripted": scripted}


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
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
        case = harness.compare(alternatives(*inputs(*sizes)), work, peaks, rounds=rounds)
        about = {"K": components, "C": channels, "side": side, "batch": batch}
        harness.save("rollout", name, case, sizes=about, substeps=SUBSTEPS, rates=rates)


if __name__ == "__main__":
    main()
