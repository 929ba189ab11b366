"""What a student does with its policy: the one sampler of notebooks, the page and the command line.

Source: pi-Flow, arXiv 2510.14974, Alg. 1.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from piflow_jax.config import PolicyConfig, TrainConfig
from piflow_jax.data import Source, stacked
from piflow_jax.flow.policies import Policy
from piflow_jax.flow.sampling import sample_segments, segment_substeps
from piflow_jax.flow.schedule import TimeWarp, sampling_times
from piflow_jax.flow.substeps import Rounding, Solver
from piflow_jax.systems.conditioning import Condition
from piflow_jax.systems.networks import Network
from piflow_jax.systems.policies import policy_factory
from piflow_jax.systems.shapes import DataShape

__all__ = [
    "ROUNDING",
    "conditions_in_turn",
    "student_policy",
    "student_sampler",
    "student_substeps",
]

ROUNDING: Rounding = "ceil"
"""Of a student's substeps, as in the pi-Flow release."""

# Conditions in turn of data without classes.
_MOST_CONDITIONS = 1000


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


def student_substeps(
    train: TrainConfig, nfe: int, substeps: int, rounding: Rounding = ROUNDING
) -> np.ndarray:
    """Substeps of each segment of a student's samples.

    Args:
      train: the settings of the distillation.
      nfe: network evaluations.
      substeps: policy substeps per unit of raw time.
      rounding: how their number becomes a whole one.

    Returns:
      Whole numbers `[nfe]`.
    """
    warp = TimeWarp(train.shift)
    times = sampling_times(nfe, warp, train.final_step_size_scale)
    return segment_substeps(times, warp, substeps, rounding)


def student_sampler(
    network: Network, policy: PolicyConfig, train: TrainConfig, *, substeps: int, solver: Solver
) -> Callable[..., jax.Array]:
    """A student's sampler, with the substeps of the pi-Flow release.

    Args:
      network: the network.
      policy: the policy's settings.
      train: the settings of the distillation.
      substeps: policy substeps per unit of raw time.
      solver: of the policy's rollouts.

    Returns:
      `(params, noise[B, *sites, C], condition, times, temperature=1.0, key=None) -> x_0`, see
      `sample_segments`.
    """
    predict = student_policy(network, policy, train)

    # What runs between the network's evaluations is the policy's.
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
        )

    return sample


def conditions_in_turn(source: Source, data: DataShape) -> tuple[Condition, np.ndarray]:
    """The conditions that samples of figures have in turn, and their labels.

    Args:
      source: the data.
      data: what networks know of it.

    Returns:
      `(conditions, labels int32[n])`: one of each class; without classes those of the first
      examples, all labelled 0; and a single None without conditions.
    """
    if data.num_classes:
        labels = np.arange(data.num_classes, dtype=np.int32)
        return (source.of_classes() if hasattr(source, "of_classes") else labels), labels
    count = min(len(source), _MOST_CONDITIONS)
    examples = [source[index].get("condition") for index in range(count)]
    labels = np.zeros(count, np.int32)
    return (None if examples[0] is None else stacked(examples)), labels
