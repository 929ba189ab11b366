"""Few-step sampling from a student, against the same sampler in plain PyTorch.

    python -m benchmarks.sampler
    python -m benchmarks.sampler --config=configs/imagenet.py:gm_repa --batch-size=64

The first is the main job's student on this machine, the second is for one GPU. Weights are random.
There is a case for each solver: 128 substeps of Euler, which PyTorch takes too, and 64 of second
order, which are nearer to the limit (`benchmarks.substeps`). Beside the sampler, as a notebook
calls it, stand its network evaluations alone and its policies' rollouts alone; what is left is what
noise and the call cost. "Of the bound" counts the network's matrix products only.
"""

import argparse
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness
from benchmarks.train_step import OURS, Subject, load_config, torch_threads
from piflow_jax.config import Config, parse
from piflow_jax.flow.sampling import few_step_sample
from piflow_jax.flow.schedule import TimeWarp
from piflow_jax.flow.substeps import Solver
from piflow_jax.parallel.flops import flops
from piflow_jax.student import Student
from piflow_jax.systems.network import abstract_variables
from piflow_jax.systems.policies import policy_factory
from piflow_jax.systems.spec import StudentSettings

SUBSTEPS = {"euler": 128, "multistep": 64}
EVALUATIONS, ROLLOUTS = "its network evaluations alone", "its policies' rollouts alone"


def ours(
    subject: Subject, labels: np.ndarray, solver: Solver, substeps: int
) -> dict[str, Callable]:
    """Our sampler, as a notebook calls it, and the evaluations and the rollouts in it alone."""
    config = subject.config
    student_network = subject.systems(config).student_network
    module = student_network.module
    params, _ = subject.weights()
    settings = StudentSettings(
        model=config.model, policy=config.policy, train=config.train, data=subject.data
    )
    student = Student(student_network, params, settings)
    noise = jax.random.normal(jax.random.key(1), (len(labels), *subject.data.shape))
    evaluate = jax.jit(module.apply)
    times, on_device = jnp.ones(len(labels)), jnp.asarray(labels)
    output = evaluate(params, noise, times, on_device)
    factory = policy_factory(config.policy, config.train, sampling=True)

    @jax.jit
    def roll_out(output, noise):
        return few_step_sample(
            lambda x, sigma: factory(output, x, sigma),
            noise,
            config.train.nfe,
            TimeWarp(config.train.shift),
            total_substeps=substeps,
            final_step_size_scale=config.train.final_step_size_scale,
            solver=solver,
        )

    return {
        OURS: lambda: student.sample(0, labels, substeps=substeps, solver=solver),
        EVALUATIONS: lambda: [
            evaluate(params, noise, times, on_device) for _ in range(config.train.nfe)
        ],
        ROLLOUTS: lambda: roll_out(output, noise),
    }


def torch_sampler(
    subject: Subject, labels: np.ndarray, substeps: int, threads: int = 0, compiled: bool = False
) -> Callable:
    """Euler's in PyTorch, on a GPU if there is one."""
    import torch

    from benchmarks import torch_twin

    config, policy = subject.config, subject.config.policy
    device = harness.torch_device()
    student_network = subject.systems(config).student_network
    module = student_network.module
    network = torch_twin.from_flax(
        module, subject.weights()[0], policy.num_components, policy.logstd_hidden
    ).to(device)
    if compiled:
        network.compile()
    shape = (len(labels), subject.data.channels, *subject.data.shape[:2])
    chosen = torch.from_numpy(labels.astype(np.int64)).to(device)
    train, bfloat16 = config.train, config.model.dtype == "bfloat16"

    @torch.inference_mode()
    def call():
        if threads:
            torch.set_num_threads(threads)
        noise = torch.randn(shape, device=device)
        with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
            samples = torch_twin.few_step_sample(
                network, noise, chosen, train.nfe, substeps, train.shift
            )
        return samples.cpu()

    return call


def measure(config: Config, options, solver: Solver, substeps: int) -> dict:
    """Times sampling with a configuration's student."""
    subject = Subject(config, "student")
    labels = np.arange(options.batch_size) % subject.data.num_classes
    alternatives = ours(subject, labels, solver, substeps)
    builders = {name: lambda c=call: c for name, call in alternatives.items()}
    if solver == "euler":
        given = (torch_sampler, subject, labels, substeps)
        counts = torch_threads()
        for name, threads in counts.items():
            builders[name] = functools.partial(*given, threads)
        if options.compile and counts:
            threads = next(iter(counts.values()))
            builders["PyTorch, torch.compile"] = functools.partial(*given, threads, compiled=True)
    student_network = subject.systems(config).student_network
    module = student_network.module
    evaluation = flops(
        module.apply, abstract_variables(student_network), *module.example(options.batch_size)
    )
    work = harness.Work(
        items=options.batch_size,
        unit="samples",
        flops=config.train.nfe * evaluation.total,
        dtype=config.model.dtype,
    )
    peaks = harness.measured_peaks((config.model.dtype,))
    return harness.compare(builders, work, peaks, rounds=options.rounds)


def policy_share(case: Mapping[str, Any]) -> str:
    """The policies' cost relative to the network's, in words; empty if one was not measured."""
    rows = case["alternatives"]
    if not {EVALUATIONS, ROLLOUTS} <= set(rows):
        return ""
    share = rows[ROLLOUTS]["median_seconds"] / rows[EVALUATIONS]["median_seconds"]
    return f"The policies' rollouts take {share:.3g} times as long as the network's evaluations.\n"


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/digits.py")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--solver", nargs="+", choices=list(SUBSTEPS), default=list(SUBSTEPS))
    parser.add_argument("--substeps", type=int, help="in place of 128 of Euler and 64 of multistep")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--compile", action="store_true", help="torch.compile as well")
    options = parser.parse_args()
    harness.tune_allocator()
    raw = load_config(options.config)
    raw.train.batch_size = 1  # no batch is trained on
    raw.train.microbatches = 1
    if jax.default_backend() == "gpu":
        raw.model.attention = "cudnn"
    config = parse(raw)
    for solver in options.solver:
        substeps = options.substeps or SUBSTEPS[solver]
        case = measure(config, options, solver, substeps)
        harness.save(
            "sampler",
            f"{Path(options.config).name}, NFE {config.train.nfe}, batch {options.batch_size}, "
            f"{solver}, {substeps} substeps",
            case,
            dtype=config.model.dtype,
            solver=solver,
            substeps=substeps,
        )
        print(policy_share(case))


if __name__ == "__main__":
    main()
