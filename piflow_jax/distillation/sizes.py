"""Compares the least needs of the settings with the devices, before anything is compiled.

Bytes and operations are lower bounds, computed from the settings alone. A run that is refused could
not have worked. A run that passes may still be too large; the compiler or the allocator then fails.
"""

import dataclasses
import functools
import math
import operator
import os
from typing import Any

import jax
import jax.numpy as jnp

from piflow_jax.config import Config, ConfigError
from piflow_jax.data import Source
from piflow_jax.evaluation import least_real_samples, least_samples
from piflow_jax.keys import seed_key
from piflow_jax.parallel import peak_flops
from piflow_jax.parallel.topology import Chip
from piflow_jax.systems.assembly import Systems
from piflow_jax.systems.datasets import dataset
from piflow_jax.systems.judges import compared
from piflow_jax.systems.network import abstract_variables
from piflow_jax.systems.networks import without_scales
from piflow_jax.systems.policies import policy_outputs
from piflow_jax.systems.sampling import TEACHER_SOLVERS
from piflow_jax.training.optimizer import make_optimizer
from piflow_jax.training.state import TrainState
from piflow_jax.training.step import first_student_state

GIB = 2**30
# Longest wait for a step or an evaluation, which give no result before they end.
_MOST_DAYS = 7
# Upper bounds on the operations per second of a CPU core and of an unlisted accelerator.
_CORE_FLOPS, _UNKNOWN_FLOPS = 2e11, 1e16


@dataclasses.dataclass(frozen=True)
class Machine:
    """Memory and speed of all devices together.

    Attributes:
      memory: bytes; infinite if unknown.
      flops: operations per second, an upper bound.
    """

    memory: float
    flops: float

    @classmethod
    def here(cls) -> "Machine":
        """The devices of all processes; CPU devices share the memory of their host."""
        device, hosts = jax.local_devices()[0], jax.process_count()
        if device.platform == "cpu":
            return cls(hosts * _host_memory(), hosts * (os.cpu_count() or 1) * _CORE_FLOPS)
        count = jax.device_count()
        memory = (device.memory_stats() or {}).get("bytes_limit", math.inf)
        return cls(count * memory, count * (peak_flops(device) or _UNKNOWN_FLOPS))

    @classmethod
    def of_chips(cls, chip: Chip, count: int) -> "Machine":
        """Chips that need not be attached."""
        return cls(count * chip.memory, count * chip.flops)


@dataclasses.dataclass(frozen=True)
class _Part:
    """An amount and the keys that it grows with."""

    amount: float
    keys: tuple[str, ...]


class Sizes:
    """Refuses settings that exceed the devices' memory or would not finish.

    Every check raises ConfigError with the amount. Of the keys that the amount grows with, the
    error names the key farthest above its default.

    Args:
      systems: teacher and student.
      source: the data, if available.
      machine: the devices; by default those of this run.
      teacher: the teacher's parameters, if its network is unknown.

    Raises:
      ConfigError: patches do not divide the samples.
    """

    def __init__(
        self,
        systems: Systems,
        source: Source | None = None,
        machine: Machine | None = None,
        teacher: Any = None,
    ):
        self._systems, self._config, self._data = systems, systems.config, systems.data
        self._real = None if source is None else len(compared(source))
        self._machine = machine or Machine.here()
        self._given = teacher
        model = systems.config.model
        # A set of captions may have several shapes.
        self._shapes = getattr(source, "buckets", [systems.data.shape[:-1]])
        self._patch = getattr(model.own, "patch_size", 0)  # 0 if unknown, for a user's own network
        for side in sorted({side for shape in self._shapes for side in shape}):
            if self._patch and side % self._patch:
                raise ConfigError(
                    f"config.model.{model.network}.patch_size must divide the {side} sites of a "
                    f"side of {systems.data.name!r}, got {self._patch}"
                )
        self._of_network = _numeric(f"model.{model.network}", model.own)
        self._of_student = self._of_network + _numeric("policy", systems.config.policy)

    @functools.cached_property
    def _teacher(self) -> Any:
        network = self._systems.teacher_network
        return self._given if network is None else abstract_variables(network)

    @functools.cached_property
    def _student(self) -> Any:
        return abstract_variables(self._systems.student_network)

    @property
    def _sites(self) -> int:
        return max(map(math.prod, self._shapes))

    def check_run(self) -> None:
        """Checks all parts of a run before its first part begins."""
        settings, row = self._config.evaluation, dataset(self._config)
        if row.by_class and not (self._config.teacher.checkpoint or self._config.teacher.weights):
            self.check_teacher_training()
        self.check_student_training()
        if row.by_class and (not row.latents or settings.features or settings.every):
            self.check_evaluation()

    def check_distillation(self, measured: bool) -> None:
        """Checks a student's training and, if it is measured, its evaluation."""
        self.check_student_training()
        if measured:
            self.check_evaluation(measured)

    def check_teacher_training(self) -> None:
        """Checks a step of the teacher's training."""
        network = self._systems.teacher_network
        trained, settings = network.trained(self._teacher), self._config.teacher
        optimizer = make_optimizer(settings.optimizer, settings.steps)
        state = jax.eval_shape(lambda trained: TrainState.create(trained, optimizer), trained)
        state = _bytes(state) + _bytes(trained)
        self._check_step("teacher", _Part(state, self._of_network), self._data.channels, 1)
        self._check_time(
            "a step of the teacher's training",
            self._config.teacher.batch_size * 2 * self._flops(self._teacher),
            (*self._of_network, "teacher.batch_size"),
        )

    def check_student_training(self) -> None:
        """Checks a step of the student's training."""
        config, train, network = self._config, self._config.train, self._systems.student_network
        trained = network.trained(self._student)
        first = functools.partial(first_student_state, seed_key(0), config, network)
        state = jax.eval_shape(first, trained, self._teacher)
        state = _bytes(state) + _bytes(trained) + _bytes(self._teacher)
        outputs = policy_outputs(config, self._data.channels)
        self._check_step("train", _Part(state, self._of_student), outputs, train.microbatches)
        ranged = config.teacher.guidance_range
        queries = train.num_states * (1 if config.teacher.guidance_scale == 1 and not ranged else 2)
        flops = 2 * self._flops(self._student) + queries * self._flops(self._teacher)
        self._check_time(
            "a step of the student's training",
            train.batch_size * flops * (train.nfe if train.data_free else 1),
            (*self._of_student, "train.batch_size", "train.num_states", "train.nfe"),
        )

    def check_sampling(self, number: int) -> None:
        """Checks a batch of `number` samples, of `config.evaluation.batch_size` at most."""
        settings = self._config.evaluation
        variables, outputs, keys = self._teacher, self._data.channels, self._of_network
        if settings.system == "student":
            outputs = policy_outputs(self._config, self._data.channels)
            variables, keys = self._student, self._of_student
        batch = min(settings.batch_size, number)
        evaluated = batch * self._sites * outputs * self._width
        parts = _Part(_bytes(variables), keys), _Part(evaluated, (*keys, "evaluation.batch_size"))
        self._check_memory("a batch of samples", *parts)

    def check_evaluation(self, measured: bool | None = None) -> None:
        """Checks the evaluation, and that it draws enough samples for its figures.

        Args:
          measured: whether samples are compared with the data's; by default unless those are
            latents.
        """
        settings = self._config.evaluation
        if measured is None:
            measured = not dataset(self._config).latents
        numbers = {"evaluation.num_samples": settings.num_samples}
        if settings.every:
            numbers["evaluation.every_samples"] = settings.every_samples
        number, keys = max(numbers.values()), tuple(numbers)
        flops = self._config.sampling_nfe * self._flops(self._student)
        if measured:  # the teacher also runs, and all its samples are kept
            self._check_figures(numbers)
            steps = settings.teacher_steps
            evaluations = TEACHER_SOLVERS[settings.teacher_solver].evaluations
            flops += sum(steps) * evaluations * self._flops(self._teacher)
            kept = number * self._sites * self._data.channels * 4 * (len(steps) + 1)
            self._check_memory("the evaluation", _Part(kept, keys), there=_host_memory())
            keys += ("evaluation.teacher_steps",)
        self.check_sampling(number)
        self._check_time("the evaluation", number * flops, self._of_network + keys)

    def check_pairs(self) -> None:
        """Checks the rivals' pairs of noise and endpoint."""
        rivals = self._config.rivals
        held = 2 * rivals.pairs * self._sites * self._data.channels * 4
        self._check_memory("the rivals' pairs", _Part(held, ("rivals.pairs",)))
        self.check_sampling(self._config.evaluation.batch_size)
        flops = rivals.pairs * rivals.pair_steps * self._flops(self._teacher)
        keys = (*self._of_network, "rivals.pairs", "rivals.pair_steps")
        self._check_time("making the rivals' pairs", flops, keys)

    def _check_figures(self, numbers: dict[str, int]) -> None:
        config, classes = self._config, max(self._data.num_classes, 1)
        if config.evaluation.weights:
            raise ConfigError("config.evaluation.weights are for data sets of latents")
        least = least_samples(classes)
        for key, number in numbers.items():
            if number < least:
                raise ConfigError(
                    f"config.{key} must be at least {least} for all figures, one of which compares "
                    f"two samples of a class, of {classes}; got {number}"
                )
        if self._real is not None and self._real < least_real_samples():
            raise ConfigError(
                f"{self._data.name!r} has {self._real} samples, but figures need "
                f"{least_real_samples()}"
            )

    def _check_step(self, group: str, state: _Part, outputs: int, microbatches: int) -> None:
        batch, keys = getattr(self._config, group).batch_size, (f"{group}.batch_size",)
        # Outputs and their gradient, for one microbatch.
        evaluated = 2 * batch / microbatches * self._sites * outputs * self._width
        self._check_memory(
            f"a step of the {'teacher' if group == 'teacher' else 'student'}'s training",
            state,
            _Part(batch * self._sites * self._data.channels * 4, keys),
            _Part(evaluated, state.keys + keys),
        )

    @property
    def _width(self) -> int:
        """Bytes per number in a network's compute dtype."""
        return jnp.dtype(self._config.model.dtype).itemsize

    def _flops(self, variables: Any) -> float:
        """Operations of an evaluation: most parameters meet each token, in two operations."""
        leaves = jax.tree.leaves(without_scales(variables))
        parameters = sum(math.prod(leaf.shape) for leaf in leaves)
        if not self._patch:
            return parameters
        tokens = min(math.prod(shape) / self._patch ** len(shape) for shape in self._shapes)
        return parameters * tokens

    def _check_memory(self, what: str, *parts: _Part, there: float | None = None) -> None:
        total = sum(part.amount for part in parts)
        there = self._machine.memory if there is None else there
        if total > there:
            keys = max(parts, key=lambda part: part.amount).keys
            takes = f"{total / GIB:,.1f} GiB of memory, there are {there / GIB:,.1f}"
            raise self._too_large(what, takes, keys)

    def _check_time(self, what: str, flops: float, keys: tuple[str, ...]) -> None:
        days = flops / self._machine.flops / 86_400
        if days > _MOST_DAYS:
            rate = f"{days:,.0f} days at {self._machine.flops:.1e} a second"
            raise self._too_large(what, f"{flops:.1e} operations, {rate}", keys)

    def _too_large(self, what: str, takes: str, keys: tuple[str, ...]) -> ConfigError:
        def times_default(key: str) -> float:
            values = (operator.attrgetter(key)(settings) for settings in (self._config, Config()))
            value, default = (sum(v) if isinstance(v, tuple) else v for v in values)
            return value / max(default, 1)

        key = max(keys, key=times_default)
        value = operator.attrgetter(key)(self._config)
        return ConfigError(
            f"{what} takes at least {takes}; lower config.{key} ({value}), or take more devices"
        )


def _numeric(name: str, group: Any) -> tuple[str, ...]:
    """Keys of a group that hold numbers."""
    values = dataclasses.asdict(group).items()
    return tuple(f"{name}.{key}" for key, value in values if type(value) in (int, float))


def _bytes(tree: Any) -> float:
    def width(dtype):
        return 0.5 if dtype == jnp.int4 else dtype.itemsize

    return sum(math.prod(leaf.shape) * width(leaf.dtype) for leaf in jax.tree.leaves(tree))


def _host_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
