"""Samples from a student's policy: the one sampler of notebooks, the page and the command line.

Source: pi-Flow, arXiv 2510.14974, Alg. 1.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from piflow_jax.arguments import guidance_cautions
from piflow_jax.config import Config, EvaluationConfig, PolicyConfig, TrainConfig
from piflow_jax.data import Source, stacked
from piflow_jax.flow.policies import Policy
from piflow_jax.flow.rollout import Implementation, rollout
from piflow_jax.flow.sampling import (
    ode_sample,
    sample_segments,
    sde_sample,
    segment_substeps,
)
from piflow_jax.flow.schedule import FlowMapTimes, TimeWarp, sampling_times
from piflow_jax.flow.substeps import Rounding, Solver
from piflow_jax.flow.teacher import Teacher
from piflow_jax.keys import keys_of_noise
from piflow_jax.systems.conditioning import Condition
from piflow_jax.systems.network import Network
from piflow_jax.systems.policies import policy_factory
from piflow_jax.systems.segments import said_evaluations
from piflow_jax.systems.shapes import DataShape

ROUNDING: Rounding = "ceil"
"""Rounding of a student's substeps, as in the pi-Flow release."""

# What the figures of a look depend on, of the settings that a continued run may change.
_MEASURED_WITH = (
    *("every_samples", "seed", "nfe", "substeps", "solver", "temperature", "guidance"),
    *("features", "reference"),
)
# Most conditions to cycle through for data without classes.
_MOST_CONDITIONS = 1000
# Most noise levels of a sampler in a message.
_MOST_LEVELS = 8


def student_policy(
    network: Network, policy: PolicyConfig, train: TrainConfig
) -> Callable[..., Policy]:
    """One evaluation of a student's network.

    Args:
      network: the network.
      policy: the policy's settings.
      train: the settings of the distillation.

    Returns:
      `(params, x[B, *sites, C], t[B], condition) -> policy`.
    """
    factory = policy_factory(policy, train, sampling=True)

    def predict(params: Any, x: jax.Array, t: jax.Array, condition: Condition) -> Policy:
        with jax.named_scope("student"):
            output = network.apply(params, x, t, condition)
        with jax.named_scope("policy"):
            return factory(output, x, t)

    return predict


def student_rollout(
    train: TrainConfig,
    policy: Policy,
    x: jax.Array,
    t_start: ArrayLike,
    t_end: ArrayLike,
    substeps: int,
    solver: Solver,
) -> jax.Array:
    """Integrates a student's policy between noise levels as its sampler does.

    Args:
      train: the settings of the distillation.
      policy: from `student_policy`.
      x: `[B, *sites, C]`, states at `t_start`.
      t_start: noise levels, `[B]` or a scalar.
      t_end: noise levels, `[B]` or a scalar, not above `t_start`.
      substeps: policy substeps per unit of raw time.
      solver: solver of the rollout.

    Returns:
      `[B, *sites, C]`, states at `t_end`.
    """
    warp = TimeWarp(train.shift)
    start, end = (warp.unwarp(jnp.asarray(t)) for t in (t_start, t_end))
    options = {"solver": solver, "rounding": ROUNDING}
    return rollout(policy, x, start, end, warp, substeps, **options)[0]


def student_times(train: TrainConfig, nfe: int, h: float = 0.0, start: float = 1.0) -> FlowMapTimes:
    """Times of a student's samples, see `sampling_times`."""
    return sampling_times(nfe, TimeWarp(train.shift), train.final_step_size_scale, h, start)


def sampling_cautions(
    train: TrainConfig,
    nfe: int,
    h: float = 0.0,
    temperature: float = 1.0,
    start: float = 1.0,
    guidance: ArrayLike = (),
    guidance_range: tuple[float, ...] = (),
) -> list[str]:
    """Finds options that a student was not trained for, and options without effect.

    Args:
      train: the settings of the distillation.
      nfe: network evaluations.
      h: stochasticity between segments.
      temperature: temperature of the mixture.
      start: noise level at which sampling starts.
      guidance: guidance scales, any number of them.
      guidance_range: `(low, high)` of the scales of training; empty if the scale is no input.

    Returns:
      Sentences; empty if there is nothing to warn of.
    """
    cautions = []
    trained = [student_times(train, number) for number in train.evaluations]
    asked = student_times(train, nfe, h, start)
    known, wanted = (
        np.array([pair for times in several for pair in zip(times.src, times.to, strict=True)])
        for several in (trained, [asked])
    )
    if not all(np.isclose(known, segment).all(1).any() for segment in wanted):
        begin = "" if start == 1 else f" from start={start:g}"
        cautions.append(
            f"this student was trained for nfe={said_evaluations(train)}, which "
            f"evaluates its network at {_levels(known[:, 0])}; nfe={nfe}{begin} evaluates it at "
            f"{_levels(asked.src)}, where samples may be poor or mere noise"
        )
    if nfe == 1 and temperature != 1:
        cautions.append(
            f"temperature={temperature:g} has no effect with nfe=1: the last segment is not "
            "sharpened, and it is the only one"
        )
    if nfe == 1 and h > 0:
        cautions.append(
            f"h={h:g} has no effect with nfe=1: noise is renewed between segments, and there is one"
        )
    return cautions + guidance_cautions(guidance, guidance_range)


def _levels(levels: np.ndarray) -> str:
    """The noise levels of the evaluations, shortened if there are many."""
    levels = np.unique(levels)[::-1]
    shown = [f"{level:.3g}" for level in levels[:_MOST_LEVELS]]
    return f"t = {', '.join(shown)}{', ...' if len(levels) > _MOST_LEVELS else ''}"


def student_substeps(
    train: TrainConfig, nfe: int, substeps: int, rounding: Rounding = ROUNDING
) -> np.ndarray:
    """Number of substeps in each segment of a student's samples.

    Args:
      train: the settings of the distillation.
      nfe: network evaluations.
      substeps: policy substeps per unit of raw time.
      rounding: how their number is rounded to an integer.

    Returns:
      Whole numbers `[nfe]`.
    """
    times = student_times(train, nfe)
    return segment_substeps(times, TimeWarp(train.shift), substeps, rounding)


def student_sampler(
    network: Network,
    policy: PolicyConfig,
    train: TrainConfig,
    *,
    substeps: int,
    solver: Solver,
    implementation: Implementation = "auto",
) -> Callable[..., jax.Array]:
    """A student's sampler, with the substeps of the pi-Flow release.

    Args:
      network: the network.
      policy: the policy's settings.
      train: the settings of the distillation.
      substeps: policy substeps per unit of raw time.
      solver: solver of the policy's rollouts.
      implementation: implementation of the policy's rollouts, see `rollout`.

    Returns:
      `(params, noise[B, *sites, C], condition, times, temperature=1.0, key=None) -> x_0`, see
      `sample_segments`.
    """
    predict = student_policy(network, policy, train)

    # The time between the network's evaluations belongs to the policy.
    @jax.named_scope("policy")
    def sample(params, noise, condition, times, temperature=1.0, key=None):
        return sample_segments(
            lambda x, t: predict(params, x, t, condition),
            noise,
            times,
            TimeWarp(train.shift),
            total_substeps=substeps,
            temperature=temperature,
            key=key,
            solver=solver,
            rounding=ROUNDING,
            implementation=implementation,
        )

    return sample


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherSolver:
    """A row of `TEACHER_SOLVERS`.

    Attributes:
      sample: `(velocity, noise, steps, warp) -> x_0`.
      evaluations: network evaluations per step.
      follows_flow: a sample is the endpoint of the flow that begins at its noise, which a student
        imitates.
    """

    sample: Callable[..., jax.Array]
    evaluations: int = 1
    follows_flow: bool = True


def _sde(velocity: Callable, noise: jax.Array, steps: int, warp: TimeWarp) -> jax.Array:
    return sde_sample(velocity, noise, steps, warp, keys_of_noise(noise))


TEACHER_SOLVERS = {
    "euler": TeacherSolver(sample=ode_sample),
    "heun": TeacherSolver(sample=functools.partial(ode_sample, solver="heun"), evaluations=2),
    "multistep": TeacherSolver(sample=functools.partial(ode_sample, solver="multistep")),
    "sde": TeacherSolver(sample=_sde, follows_flow=False),
}
"""How a teacher is sampled, by `config.evaluation.teacher_solver`."""


def teacher_sampler(
    teacher: Teacher, shift: float, steps: int, solver: str = "euler"
) -> Callable[..., jax.Array]:
    """A guided teacher's sampler.

    Args:
      teacher: the teacher.
      shift: shift of the time warp.
      steps: steps of the solver.
      solver: a row of `TEACHER_SOLVERS`.

    Returns:
      `(params, noise[B, *sites, C], condition) -> x_0`.
    """
    sample = TEACHER_SOLVERS[solver].sample
    return lambda params, noise, condition: sample(
        teacher.bind(params, condition), noise, steps, TimeWarp(shift)
    )


def teacher_record(config: Config) -> dict[str, Any]:
    """Settings of a teacher's samples that records name only where they are not the default.

    Records that are older than the choice of a solver mean the default and keep their meaning.
    """
    solver = config.evaluation.teacher_solver
    return {} if solver == EvaluationConfig.teacher_solver else {"teacher_solver": solver}


def sampling_guidance(config: Config) -> float:
    """The guidance scale of samples: `config.evaluation.guidance`, or the teacher's own."""
    return config.evaluation.guidance or config.teacher.guidance_scale


def sampling_record(config: Config) -> dict[str, Any]:
    """The settings that samples depend on, except those of network, policy and weights.

    Records of how samples or figures were made take these settings from here.

    Args:
      config: the run's settings.

    Returns:
      Values by name. The names occur in files and must not change.
    """
    train, settings = config.train, config.evaluation
    return {
        "seed": settings.seed,
        "nfe": config.sampling_nfe,
        "final_step_size_scale": train.final_step_size_scale,
        "shift": train.shift,
        "substeps": settings.substeps,
        "solver": settings.solver,
        "rounding": ROUNDING,
        "temperature": settings.temperature,
        "dtype": config.model.dtype,
    } | ({"guidance": settings.guidance} if settings.guidance else {})


def measured_with(config: Config) -> dict[str, Any]:
    """What the distances of looks depend on, by key; a continued run may have changed it."""
    return {f"config.evaluation.{key}": getattr(config.evaluation, key) for key in _MEASURED_WITH}


def conditions_in_turn(source: Source, data: DataShape) -> tuple[Condition, np.ndarray]:
    """The conditions that samples of figures cycle through, and their labels.

    Args:
      source: the data.
      data: shape and conditions of the data.

    Returns:
      `(conditions, labels int32[n])`: one condition per class; without classes, the conditions of
      the first examples, all with label 0; without conditions, a single None.
    """
    if data.num_classes:
        labels = np.arange(data.num_classes, dtype=np.int32)
        return (source.of_classes() if hasattr(source, "of_classes") else labels), labels
    count = min(len(source), _MOST_CONDITIONS)
    examples = [source[index].get("condition") for index in range(count)]
    labels = np.zeros(count, np.int32)
    return (None if examples[0] is None else stacked(examples)), labels
