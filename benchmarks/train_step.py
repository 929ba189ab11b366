"""A train step of a configuration, against the same step in plain PyTorch.

    python -m benchmarks.train_step
    python -m benchmarks.train_step --config=configs/imagenet.py:gm_repa --batch-size=128

The first is the main job on this machine: the teacher's step and the student's. The second is for
one GPU: the student's step of ImageNet with random weights and latents, which no data are needed
for, against the matrix products of the same run; "of the bound" is then the utilisation that
counts only three forward evaluations of the student and the guided teacher's at each state.
Without `--batch-size` a batch is the configuration's, in one part.

Every call makes several steps, as a loop would that looks at the last of them. On a GPU the
alternatives run one after the other, each in a process of its own: with the memory to itself, but
for what the process that waits for it needs to know of the GPU.
"""

import argparse
import copy
import functools
import importlib.util
import itertools
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from benchmarks import harness
from piflow_jax.config import Config, parse
from piflow_jax.parallel.flops import Flops, flops
from piflow_jax.systems.assembly import Systems
from piflow_jax.systems.datasets import load_source
from piflow_jax.systems.networks import NETWORKS
from piflow_jax.systems.shapes import DataShape
from piflow_jax.training.optimizer import make_optimizer
from piflow_jax.training.state import TrainState
from piflow_jax.training.step import distill_step, first_student_state, teacher_step

STEPS = 4
OURS = "piflow_jax"


def load_config(name: str):
    """The `ConfigDict` of `FILE[:VARIANT]`, as `--config` takes it."""
    path, _, variant = name.partition(":")
    spec = importlib.util.spec_from_file_location("benchmarked", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(variant) if variant else module.get_config()


def torch_threads() -> dict[str, int]:
    """Numbers of threads to time PyTorch with, by name; on a GPU its own choice, 0.

    None of them where PyTorch is left out. At the main job's size, and on a machine that does other
    work too, one thread may do better.
    """
    device = harness.torch_device()
    if device != "cpu":
        return {"PyTorch": 0} if device else {}
    counts = sorted({harness.machine()["cores"], 1}, reverse=True)
    return {f"PyTorch, {n} thread{'s' if n > 1 else ''}": n for n in counts}


class Subject:
    """A stage of a configuration: its batch, weights, and step in both frameworks."""

    def __init__(self, config: Config, stage: str):
        self.config, self.stage = config, stage
        self.size = (config.train if stage == "student" else config.teacher).batch_size
        rng = np.random.default_rng(0)
        if config.data.name == "latents":
            self.data = NETWORKS["dit"].official
            images = rng.standard_normal((self.size, *self.data.shape), np.float32)
            labels = rng.integers(0, self.data.num_classes, self.size)
        else:
            source = load_source(config.data)
            self.data = DataShape.of(config.data.name, source)
            chosen = rng.integers(0, len(source), self.size)
            images, labels = source.x[chosen], source.condition[chosen]
        self.batch = {"x": images, "condition": labels.astype(np.int32)}

    def systems(self, config: Config) -> Systems:
        """Student and teacher."""
        return Systems.of(config, self.data)

    def weights(self):
        """The student's and the teacher's: fresh, but for a teacher without zeros."""
        systems = self.systems(self.config)
        student, teacher = systems.student_network, systems.teacher_network

        @jax.jit
        def make(key):
            keys = jax.random.split(key, 4)
            fresh = teacher.init(keys[0])
            leaves, tree = jax.tree.flatten(fresh)
            noise = zip(leaves, jax.random.split(keys[1], len(leaves)), strict=True)
            noisy = [leaf + 0.02 * jax.random.normal(k, leaf.shape) for leaf, k in noise]
            params = jax.tree.unflatten(tree, noisy)
            return student.start(keys[2], teacher, params), params

        return make(jax.random.key(0))

    def step(self, config: Config):
        """The step with these settings, and its optimiser."""
        systems = self.systems(config)
        if self.stage == "student":
            optimizer = make_optimizer(config.train.optimizer, config.train.steps)
            student, channels = systems.student_network, self.data.channels
            return distill_step(student, systems.teacher, optimizer, config, channels), optimizer
        optimizer = make_optimizer(config.teacher.optimizer, config.teacher.steps)
        return teacher_step(systems.teacher_network, optimizer, config, systems.null), optimizer

    def arguments(self, config: Config, optimizer):
        """The step's first state, and its constants."""
        student, teacher = self.weights()
        if self.stage == "student":
            network = self.systems(config).student_network
            create = functools.partial(first_student_state, jax.random.key(2), config, network)
            return jax.jit(create)(student, teacher), teacher, jax.random.key(1)
        create = jax.jit(lambda params: TrainState.create(params, optimizer))
        return create(teacher), jax.random.key(1)

    def flops(self) -> Flops:
        """The arithmetic of a step by scope; all that is not the optimiser's is networks'."""
        step, optimizer = self.step(self.config)
        arguments = jax.eval_shape(lambda: self.arguments(self.config, optimizer))
        return flops(step, *arguments, self.batch, scopes=("teacher", "student", "optimizer"))

    def ours(self, config: Config) -> Callable:
        """Our step with these settings, compiled at its first call."""
        step, optimizer = self.step(config)
        step = jax.jit(step, donate_argnums=0)
        state, *constants = self.arguments(config, optimizer)
        batch = jax.device_put(self.batch)

        def call():
            nonlocal state
            for _ in range(STEPS):
                state, metrics = step(state, *constants, batch)
            return metrics

        return call

    def torch(self, threads: int = 0, compiled: bool = False) -> Callable:
        """The same in PyTorch, on a GPU if there is one."""
        import torch

        from benchmarks import torch_twin

        policy = self.config.policy
        device = harness.torch_device()
        systems = self.systems(self.config)
        with jax.default_device(jax.devices("cpu")[0]):  # JAX would keep the GPU's memory
            params = self.weights()
        teacher = torch_twin.from_flax(systems.teacher_network.module, params[1]).to(device)
        null = self.data.num_classes
        networks = [teacher]
        if self.stage == "student":
            module = systems.student_network.module
            student = torch_twin.from_flax(
                module, params[0], policy.num_components, policy.logstd_hidden
            ).to(device)
            networks.append(student)
            step = torch_twin.Distillation(student, teacher, self.config, null)
        else:
            step = torch_twin.FlowMatching(teacher, self.config, null)
        if compiled:
            for network in networks:
                network.compile()
        images = torch.from_numpy(np.moveaxis(self.batch["x"], -1, 1).copy()).to(device)
        labels = torch.from_numpy(self.batch["condition"].astype(np.int64)).to(device)

        def call():
            if threads:
                torch.set_num_threads(threads)
            for _ in range(STEPS):
                loss = step(images, labels)
            return float(loss)

        return call


def with_corrector(config, corrector: str):
    """The settings with a corrector that acts from the first step on, `KIND:UPDATES` or `none`."""
    kind, _, updates = corrector.partition(":")
    changed = copy.deepcopy(config)
    changed.train.corrector.kind = "" if kind == "none" else kind
    changed.train.corrector.start = 0
    changed.train.corrector.critic_steps = int(updates or 1)
    return changed


def our_alternatives(
    config,
    remats: list[str],
    attentions: list[str],
    rollouts: list[str] = (),
    correctors: list[str] = (),
) -> dict[str, Config]:
    """Settings by name; the first has the plain name."""
    found = {}
    if correctors:
        config = with_corrector(config, correctors[0])
    for remat, attention in itertools.product(
        remats or [config.model.remat], attentions or [config.model.attention]
    ):
        changed = copy.deepcopy(config)
        changed.model.remat, changed.model.attention = remat, attention
        name = f"{OURS}, remat {remat}, attention {attention}" if found else OURS
        found[name] = parse(changed)
    for rollout in rollouts:
        solver, _, substeps = rollout.partition(":")
        changed = copy.deepcopy(config)
        changed.train.solver, changed.train.total_substeps = solver, int(substeps)
        found[f"{OURS}, {substeps} substeps, {solver}"] = parse(changed)
    for corrector in correctors[1:]:
        found[f"{OURS}, corrector {corrector}"] = parse(with_corrector(config, corrector))
    return found


def measure(raw, stage: str, options) -> dict:
    """Times a stage's alternatives."""
    students = (options.rollouts, options.correctors) if stage == "student" else ()
    ours = our_alternatives(raw, options.remat, options.attention, *students)
    subject = Subject(ours[OURS], stage)
    builders = {name: functools.partial(subject.ours, config) for name, config in ours.items()}
    if options.torch:
        counts = torch_threads()
        for name, threads in counts.items():
            builders[name] = functools.partial(subject.torch, threads)
        if options.compile and counts:
            threads = next(iter(counts.values()))
            builders["PyTorch, torch.compile"] = functools.partial(subject.torch, threads, True)
    dtype, counted = ours[OURS].model.dtype, subject.flops()
    work = harness.Work(
        items=STEPS * subject.size,
        unit="examples",
        flops=STEPS * (counted.needed - counted.by_scope["optimizer"]),
        dtype=dtype,
    )
    if options.apart or jax.default_backend() != "cpu":
        peaks = harness.apart(harness.measured_peaks, (dtype,))
        return harness.compare_apart(builders, work, peaks, rounds=options.rounds)
    peaks = harness.measured_peaks((dtype,))
    return harness.compare(builders, work, peaks, rounds=options.rounds)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/digits.py")
    parser.add_argument("--batch-size", type=int, help="examples; by default the configuration's")
    parser.add_argument("--stage", nargs="+", choices=("student", "teacher"))
    parser.add_argument("--optimizer", choices=("adamw", "muon"), help="in place of the student's")
    parser.add_argument("--remat", nargs="+", default=[], help="policies to compare")
    parser.add_argument("--attention", nargs="+", default=[], help="implementations to compare")
    parser.add_argument(
        "--rollouts", nargs="+", default=[], metavar="SOLVER:N", help="substeps to compare"
    )
    parser.add_argument(
        "--correctors",
        nargs="+",
        default=[],
        metavar="KIND:UPDATES",
        help="correctors to compare with the first, such as none policy critic:1 critic:4",
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--torch", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--compile", action="store_true", help="torch.compile as well")
    parser.add_argument("--apart", action="store_true", help="one after the other, as on a GPU")
    options = parser.parse_args()
    harness.tune_allocator()
    raw = load_config(options.config)
    raw.train.microbatches = 1
    for group in (raw.train, raw.teacher):
        group.batch_size = options.batch_size or group.batch_size
    if options.optimizer:
        raw.train.optimizer.kind = options.optimizer
    if jax.default_backend() == "gpu":
        options.remat = options.remat or ["none"]
        options.attention = options.attention or ["cudnn", "xla"]
    given = raw.data.name == "latents"
    for stage in options.stage or (["student"] if given else ["student", "teacher"]):
        case = measure(raw, stage, options)
        group = raw.train if stage == "student" else raw.teacher
        name = f"{Path(options.config).name}, {stage}, batch {group.batch_size}"
        harness.save(
            "train_step",
            f"{name}, {group.optimizer.kind}",
            case,
            dtype=raw.model.dtype,
            steps_per_call=STEPS,
        )


if __name__ == "__main__":
    main()
