"""Losses of the two stages: flow matching for the teacher, pi-ID for the student.

Random draws are separate from the losses, so that a test can substitute the reference's draws.
`parallel.cycles` and profilers sum over the named scopes `student`, `teacher` and `policy`.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from piflow_jax.config import TrainConfig
from piflow_jax.flow.guidance import Null, null_conditions
from piflow_jax.flow.imitation import (
    imitation_loss,
    intervals_from_uniforms,
    uniforms_by_density,
    window_size,
)
from piflow_jax.flow.policies.base import per_sample
from piflow_jax.flow.schedule import Segments, TimeWarp, segment_start
from piflow_jax.systems.conditioning import Condition
from piflow_jax.systems.policies import PolicyFactory
from piflow_jax.systems.segments import longest_segment

Velocity = Callable[[jax.Array, jax.Array], jax.Array]
"""`(x[B, *sites, C], sigma[B]) -> u[B, *sites, C]`."""

Student = Callable[..., tuple[Any, Any]]
"""`(carried, x[B, *sites, C], sigma[B], condition, key) -> (output, carried)`.

`carried` holds a network's variables other than parameters, such as running averages. `key` is the
key of its dropout, or None.
"""

# Separate random streams, independent of those split off the same key.
_ADAPTERS, _EVALUATIONS = 0xADA, 0xE7A


def flow_matching_loss(
    network: Student,
    carried: Any,
    key: jax.Array,
    x0: jax.Array,
    condition: Condition,
    null: Null | None,
    dropout: float,
    warp: TimeWarp,
) -> tuple[jax.Array, Any]:
    """Conditional flow matching, `mean((u - (eps - x_0))^2)` at `tau ~ U(0, 1)`.

    Args:
      network: the teacher, whose output is a velocity.
      carried: see `Student`.
      key: PRNG key.
      x0: `[B, *sites, C]`, data.
      condition: conditions of the batch.
      null: null condition, see `null_conditions`, that replaces an example's condition with
        probability `dropout`; None replaces none.
      dropout: probability of replacing a condition, see `null`.
      warp: raw time to noise level.

    Returns:
      The loss, a scalar, and `carried` after the call.
    """
    time_key, noise_key, label_key = jax.random.split(key, 3)
    batch = x0.shape[0]
    # One draw per stratum has the same distribution, and the gradient has less variance.
    offsets = jax.random.uniform(time_key, (batch,))
    sigma = warp.warp((jnp.arange(batch) + offsets) / batch)
    noise = jax.random.normal(noise_key, x0.shape, x0.dtype)
    t = per_sample(sigma, x0.ndim)
    dropped = jax.random.bernoulli(label_key, dropout, (batch,))

    def drop(given, nothing):
        return jnp.where(per_sample(dropped, given.ndim), nothing, given)

    if null is not None:
        condition = jax.tree.map(drop, condition, null_conditions(condition, null))
    x = (1 - t) * x0 + t * noise
    velocity, carried = network(carried, x, sigma, condition, None)
    return jnp.mean(jnp.square(velocity - (noise - x0))), carried


@flax.struct.dataclass
class Draws:
    """Random numbers of one segment's loss.

    Attributes:
      student: `[B, M]` uniforms of the student's intervals.
      teacher: `[B, M - 1]` uniforms of the teacher's intervals.
      dropout: `[B, K]` uniforms of the mixture dropout; a component is dropped if its uniform is
        below the rate.
      adapters: `[B]` keys for the dropout of the student's adapters, of which only the first is
        used; None for a student without adapters.
      evaluations: `int32[B]`, which of the numbers of evaluations cuts raw time into segments; None
        for a student that is trained for one number.
    """

    student: jax.Array
    teacher: jax.Array
    dropout: jax.Array
    adapters: jax.Array | None = None
    evaluations: jax.Array | None = None


def sample_draws(
    key: jax.Array,
    batch: int,
    num_states: int,
    components: int,
    adapters: bool = False,
    choices: int = 1,
) -> Draws:
    """Draws the numbers of one segment; `batch`, `M`, `K` and `adapters` as in `Draws`.

    There are `choices` numbers of evaluations.
    """
    evaluations = None
    if choices > 1:
        # Equally many examples of each number, as nearly as the batch allows.
        shuffled = jax.random.permutation(jax.random.fold_in(key, _EVALUATIONS), batch)
        evaluations = shuffled % choices
    student, teacher, dropout = jax.random.split(key, 3)
    return Draws(
        jax.random.uniform(student, (batch, num_states)),
        jax.random.uniform(teacher, (batch, num_states - 1)),
        jax.random.uniform(dropout, (batch, components)),
        jax.random.split(jax.random.fold_in(key, _ADAPTERS), batch) if adapters else None,
        evaluations,
    )


def teacher_ratio(step: jax.Array, mixing_steps: int) -> float | jax.Array:
    """Share of the trajectory that the teacher walks, `1 - min(step, N) / N`; 0 without mixing."""
    if mixing_steps == 0:
        return 0
    return 1 - jnp.minimum(step, mixing_steps) / mixing_steps


def _make_policy(student, carried, policy_factory, x, sigma, condition, draws):
    key = None if draws.adapters is None else draws.adapters[0]
    with jax.named_scope("student"):
        output, carried = student(carried, x, sigma, condition, key)
    with jax.named_scope("policy"):
        return policy_factory(output, x, sigma), carried


@jax.named_scope("policy")
def _segment_loss(policy, teacher, x_src, tau_src, segment_size, draws, ratio, config):
    """The pi-ID loss on one segment with the settings of a config, and the state at its end."""
    window = window_size(segment_size, config.window_substeps, config.total_substeps)
    student = uniforms_by_density(draws.student, tau_src, segment_size - window, config.state_power)
    intervals = intervals_from_uniforms(student, draws.teacher, segment_size, window, ratio)
    detached = None
    if config.gm_dropout > 0:
        detached = policy.drop(draws.dropout < config.gm_dropout)
    return imitation_loss(
        policy,
        teacher,
        x_src,
        tau_src,
        segment_size,
        intervals,
        TimeWarp(config.shift),
        detached=detached,
        total_substeps=config.total_substeps,
        solver=config.solver,
        window_substeps=config.window_substeps,
        longest_segment=longest_segment(config),
        loss_scale=config.loss_scale,
        adaptive_power=config.adaptive_power,
        time_power=config.time_power,
    )


def _segment(tau, index, config):
    """Start and length, `[B]` each, of the segments that hold raw times `tau[B]`."""
    found = [segment_start(tau, nfe, config.final_step_size_scale) for nfe in config.evaluations]
    if index is None:
        return found[0]
    return [jnp.stack(choices)[index, jnp.arange(len(tau))] for choices in zip(*found, strict=True)]


def data_dependent_loss(
    student: Student,
    carried: Any,
    teacher: Velocity,
    policy_factory: PolicyFactory,
    x0: jax.Array,
    condition: Condition,
    tau: jax.Array,
    noise: jax.Array,
    draws: Draws,
    ratio: float | jax.Array,
    config: TrainConfig,
) -> tuple[jax.Array, Any]:
    """pi-ID on one random segment of each sample (paper, Alg. 2).

    Args:
      student: the student, with its parameters bound.
      carried: see `Student`.
      teacher: the guided teacher.
      policy_factory: makes the policy from the student's output.
      x0: `[B, *sites, C]`, data.
      condition: conditions of the batch.
      tau: `[B]`, raw times in (0, 1], snapped up to the start of their segment.
      noise: `[B, *sites, C]`.
      draws: the segment's random numbers.
      ratio: share of the trajectory that the teacher walks.
      config: the distillation's settings.

    Returns:
      The loss, a scalar, and `carried` after the call.
    """
    tau_src, segment_size = _segment(tau, draws.evaluations, config)
    sigma = TimeWarp(config.shift).warp(tau_src)
    t = per_sample(sigma, x0.ndim)
    x_src = (1 - t) * x0 + t * noise
    policy, carried = _make_policy(student, carried, policy_factory, x_src, sigma, condition, draws)
    loss, _ = _segment_loss(policy, teacher, x_src, tau_src, segment_size, draws, ratio, config)
    return loss, carried


def data_free_loss_and_grads(
    student_fn: Callable,
    params,
    carried: Any,
    teacher: Velocity,
    policy_factory: PolicyFactory,
    condition: Condition,
    noise: jax.Array,
    draws: Draws,
    ratio: float | jax.Array,
    config: TrainConfig,
):
    """pi-ID from pure noise through all segments, without data (paper, Sec. 3.4).

    Each segment has its own student evaluation and its own gradient. The detached policy leads the
    state to the next segment without gradient. The gradient is taken inside the scan over segments,
    so memory does not grow with their number.

    Args:
      student_fn: `(params, carried, x, sigma, condition, key) -> (output, carried)`, see `Student`.
      params: the student's trained parameters.
      carried: see `Student`.
      teacher: the guided teacher.
      policy_factory: makes the policy from the student's output.
      condition: conditions of the batch.
      noise: `[B, *sites, C]`, the states at the start.
      draws: the segments' random numbers, stacked on a leading axis of length `nfe`.
      ratio: share of the trajectory that the teacher walks.
      config: the distillation's settings.

    Returns:
      `(loss, segment_losses[nfe], grads, carried)`. The loss and the gradients weigh each segment
      by its raw-time length.
    """
    nfe = config.nfe
    segments = Segments(nfe, config.final_step_size_scale)
    batch = noise.shape[0]
    warp = TimeWarp(config.shift)

    def segment(carry, inputs):
        x, tau, grads, carried = carry
        draws, index = inputs
        length = jnp.where(index == nfe - 1, segments.final, segments.base)
        segment_size = jnp.full((batch,), length, noise.dtype)
        sigma = warp.warp(tau)

        def weighted(params):
            student = functools.partial(student_fn, params)
            policy, after = _make_policy(
                student, carried, policy_factory, x, sigma, condition, draws
            )
            loss, aux = _segment_loss(policy, teacher, x, tau, segment_size, draws, ratio, config)
            return loss * length, (loss, aux.x_dst, after)

        (_, (loss, x_dst, after)), new = jax.value_and_grad(weighted, has_aux=True)(params)
        grads = jax.tree.map(jnp.add, grads, new)
        return (x_dst, jnp.maximum(tau - segment_size, 0), grads, after), (loss, length * loss)

    zeros = jax.tree.map(jnp.zeros_like, params)
    start = (noise, jnp.ones((batch,), noise.dtype), zeros, carried)
    (_, _, grads, carried), (losses, weighted) = jax.lax.scan(
        segment, start, (draws, jnp.arange(nfe))
    )
    return jnp.sum(weighted), losses, grads, carried
