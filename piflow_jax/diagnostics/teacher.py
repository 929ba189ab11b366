"""Checks a teacher's description: its denoising error against the error that data allow.

A network with a wrong description (prediction, sign, direction or time scale) still gives
velocities, as does one that gets data of another scale, and a student imitates them. The error of
the clean samples reveals it. No useful network is worse than the best linear estimate, and the
error of that estimate follows from the variance of the data alone. Denoising errors are those of
arXiv 2206.00364.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from piflow_jax.arguments import whole
from piflow_jax.data import Source, as_source, stacked
from piflow_jax.flow.teacher import Schedule, Teacher
from piflow_jax.keys import as_key

__all__ = ["TeacherReport", "check_teacher"]

_LEVELS = (0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9)
# A teacher is in doubt if its error exceeds this multiple of the linear estimate's error. Another
# reading of the same network is reported if its error is below this share of the teacher's. It must
# also be below this share of the error that a network of zeros has under the same reading: a
# network that has hardly learned is close to zero.
_DOUBTFUL, _BETTER, _LEARNED = 1.3, 0.5, 0.8


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherReport:
    """How well a teacher denoises.

    Attributes:
      levels: noise levels `t`.
      error: mean squared error of `x_0 = x_t - t u` at each.
      linear: error of the best linear estimate per coordinate, at each level.
      problem: the fault in the description or in the scale of the data, in a sentence; None if
        there is none.
    """

    levels: tuple[float, ...]
    error: tuple[float, ...]
    linear: tuple[float, ...]
    problem: str | None

    @property
    def ratio(self) -> float:
        """Error over the linear estimate's error, mean over levels; a useful teacher is below 1.

        NaN if the data do not vary: then the linear estimate has no error.
        """
        return _ratio(self.error, self.linear)

    def __str__(self) -> str:
        """A table, and the problem if there is one."""
        rows = zip(self.levels, self.error, self.linear, strict=True)
        lines = [f"{t:5.2f}  {error:10.4g}  {linear:10.4g}" for t, error, linear in rows]
        head = "    t       error      linear"
        return "\n".join([head, *lines, self.problem or "nothing wrong was found"])


def check_teacher(
    teacher: Teacher, params: Any, source: Source | Any, *, examples: int = 64, seed: int = 0
) -> TeacherReport:
    """Compares a teacher's denoising error with its description.

    Args:
      teacher: the teacher; its guidance is ignored.
      params: its parameters.
      source: the data that it was trained on, see `Source`, or arrays, see `data.as_source`.
      examples: number of examples to denoise at each of seven levels.
      seed: seed of the noise.

    Returns:
      The report. `problem` names another prediction, sign, direction, time scale or scale of the
      data if the same network denoises much better with it.

    Raises:
      ValueError: the network does not take the data, or predicts another shape; or `examples` is
        below 1.
    """
    # Compiled once for all levels and readings: around it there is little to compute.
    teacher = dataclasses.replace(teacher, predict=jax.jit(teacher.predict), guidance_scale=1.0)
    source = as_source(source)
    count = min(whole("examples", examples, 1), len(source))
    batch = stacked([source[int(i)] for i in np.linspace(0, len(source) - 1, count)])
    key = as_key(seed)
    x0 = batch["x"]
    if getattr(source, "draw", None) is not None:
        x0 = source.draw(jax.random.fold_in(key, 1), x0)
    x0 = jnp.asarray(x0, jnp.float32)
    noise = jax.random.normal(key, x0.shape)
    condition = batch.get("condition")
    error, linear = _errors(teacher, params, x0, noise, condition), _linear(x0)
    ratio = _ratio(error, linear)
    problem = None
    # Examples that are all the same leave nothing to compare with.
    if any(linear) and not ratio < _DOUBTFUL:

        def ratio_of(teacher, x0):
            return _ratio(_errors(teacher, params, x0, noise, condition), _linear(x0))

        readings = {name: (other, x0) for name, other in _readings(teacher)}
        readings |= {name: (teacher, other) for name, other in _other_data(x0)}
        found = {name: ratio_of(*reading) for name, reading in readings.items()}
        reading = min(found, key=lambda name: found[name] if np.isfinite(found[name]) else np.inf)
        other, data = readings[reading]
        zeros = dataclasses.replace(other, predict=lambda params, z, s, cond: 0 * z)
        better = found[reading] < _BETTER * ratio or not np.isfinite(ratio)
        if better and found[reading] < _LEARNED * ratio_of(zeros, data):
            problem = (
                f"the teacher's error is {ratio:.3g} times the best linear estimate's; "
                f"{reading} it would be {found[reading]:.3g} times that"
            )
    return TeacherReport(levels=_LEVELS, error=tuple(error), linear=tuple(linear), problem=problem)


def _ratio(error: Sequence[float], linear: Sequence[float]) -> float:
    return float(np.mean(np.divide(error, linear))) if all(linear) else math.nan


def _errors(teacher: Teacher, params, x0, noise, condition) -> list[float]:
    """Mean squared error of the clean samples at each level."""

    def error(level: float) -> float:
        t = jnp.full(x0.shape[:1], level)
        x = (1 - level) * x0 + level * noise
        velocity = teacher.velocity(params, x, t, condition)
        return float(jnp.mean(jnp.square(x - level * velocity - x0)))

    return [error(level) for level in _LEVELS]


def _linear(x0: jax.Array) -> list[float]:
    """The mean squared error of the best linear estimate at each level."""
    variance = float(np.var(np.asarray(x0), axis=0).mean())
    return [variance * t**2 / ((1 - t) ** 2 * variance + t**2) for t in _LEVELS]


def _other_data(x0: jax.Array) -> Iterator[tuple[str, jax.Array]]:
    """The same data as the teacher may have been trained on them."""
    yield "with 2 * x - 1 in place of the data x", 2 * x0 - 1
    yield "with (x + 1) / 2 in place of the data x", (x0 + 1) / 2
    yield "with x / 127.5 - 1 in place of the data x", x0 / 127.5 - 1
    for factor in (1 / 8, 1 / 4, 1 / 2, 2, 4, 8):
        yield f"with the data times about {factor:g}", factor * x0


def _readings(teacher: Teacher) -> Iterator[tuple[str, Teacher]]:
    """Other possible descriptions of the same network."""
    for prediction in ("u", "eps", "x0", "v"):
        if prediction != teacher.prediction:
            yield (
                f"read as prediction={prediction!r}",
                dataclasses.replace(teacher, prediction=prediction),
            )
    yield "with the opposite sign", dataclasses.replace(teacher, predict=_negated(teacher.predict))
    schedule = teacher.schedule
    for factor, name in ((1000.0, "1000 times"), (1e-3, "a thousandth of")):
        scaled = dataclasses.replace(schedule, time_scale=schedule.time_scale * factor)
        yield (
            f"asked with {name} its time (time_scale={scaled.time_scale:g})",
            dataclasses.replace(teacher, schedule=scaled),
        )
    for data_at in (0, 1):
        straight = Schedule.straight(data_at=data_at, time_scale=schedule.time_scale)
        yield (
            f"on the straight path with data at {data_at}",
            dataclasses.replace(teacher, schedule=straight),
        )
    yield "on the cosine schedule", dataclasses.replace(teacher, schedule=Schedule.cosine())


def _negated(predict: Callable) -> Callable:
    return lambda *arguments: -predict(*arguments)
