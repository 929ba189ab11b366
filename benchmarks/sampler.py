"""Few-step sampling from a student, beside the same sampler in plain PyTorch.

    python -m benchmarks.sampler
    python -m benchmarks.sampler --config=configs/imagenet.py:gm_repa --batch-size=64

The first is the main job's student on this machine, the second is for one GPU. Weights are random.
Beside the sampler, as a notebook calls it, stand its network evaluations alone: the difference is
what noise, policies and the call cost. "Of the bound" counts the network's matrix products only.
"""

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness
from benchmarks.train_step import OURS, Subject, load_config, torch_threads
from piflow_jax.config import Config, parse
from piflow_jax.models.flops import forward_flops
from piflow_jax.student import Student
from piflow_jax.training.networks import StudentSettings


def ours(subject: Subject, labels: np.ndarray, substeps: int) -> dict[str, Callable]:
    """Our sampler, as a notebook calls it, and the evaluations in it alone."""
    config = subject.config
    module, _ = subject.modules(config)
    params, _ = subject.weights()
    settings = StudentSettings(
        model=config.model, policy=config.policy, train=config.train, data=subject.data
    )
    student = Student(module, params, settings)
    noise = jax.random.normal(jax.random.key(1), (len(labels), *subject.data.shape))
    evaluate = jax.jit(lambda params, x, t, labels: module.apply(params, x, t, labels).means)
    times, on_device = jnp.ones(len(labels)), jnp.asarray(labels)
    return {
        OURS: lambda: student.sample(0, labels, substeps=substeps),
        "its network evaluations alone": lambda: [
            evaluate(params, noise, times, on_device) for _ in range(config.train.nfe)
        ],
    }


def torch_sampler(
    subject: Subject, labels: np.ndarray, substeps: int, threads: int = 0, compiled: bool = False
) -> Callable:
    """The same in PyTorch, on a GPU if there is one."""
    import torch

    from benchmarks import torch_twin

    config, policy = subject.config, subject.config.policy
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    module, _ = subject.modules(config)
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


def measure(config: Config, options) -> dict:
    """Times sampling with a configuration's student."""
    subject = Subject(config, "student")
    labels = np.arange(options.batch_size) % subject.data.num_classes
    alternatives = ours(subject, labels, options.substeps)
    if importlib.util.find_spec("torch"):
        for name, threads in torch_threads().items():
            alternatives[name] = torch_sampler(subject, labels, options.substeps, threads)
        if options.compile:
            threads = next(iter(torch_threads().values()))
            compiled = torch_sampler(subject, labels, options.substeps, threads, compiled=True)
            alternatives["PyTorch, torch.compile"] = compiled
    module, _ = subject.modules(config)
    size = subject.data.sample_size
    work = harness.Work(
        items=options.batch_size,
        unit="samples",
        flops=options.batch_size * config.train.nfe * forward_flops(module, size, size),
        dtype=config.model.dtype,
    )
    peaks = harness.measured_peaks((config.model.dtype,))
    return harness.compare(alternatives, work, peaks, rounds=options.rounds)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/digits.py")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--substeps", type=int, default=128)
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
    harness.save(
        "sampler",
        f"{Path(options.config).name}, NFE {config.train.nfe}, batch {options.batch_size}",
        measure(config, options),
        dtype=config.model.dtype,
        substeps=options.substeps,
    )


if __name__ == "__main__":
    main()
