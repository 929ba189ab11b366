"""Losses of the two stages: flow matching for the teacher, pi-ID for the student.

Random draws are separate from losses, so that a test can put the reference's draws in. The named
scopes `student`, `teacher` and `policy` are what `parallel.cycles` and profilers sum by.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from piflow_jax.config import PolicyConfig, TeacherConfig, TrainConfig
from piflow_jax.flow.guidance import guided_velocity
from piflow_jax.flow.imitation import imitation_loss, intervals_from_uniforms, window_size
from piflow_jax.flow.policies import ArcFlowPolicy, DXPolicy, GMFlowPolicy, Policy
from piflow_jax.flow.policies.base import per_sample
from piflow_jax.flow.schedule import TimeWarp, longest_segment, segment_start

__all__ = [
    "Draws",
    "data_dependent_loss",
    "data_free_loss_and_grads",
    "flow_matching_loss",
    "guided_teacher",
    "make_policy_factory",
    "sample_draws",
    "teacher_ratio",
]

Conditions = Any
"""What a network is told beside state and time: arrays `[B, ...]` in any structure."""

Network = Callable[..., Any]
"""A network with its parameters bound: `(x[B, *sites, C], sigma[B], conditions) -> output`.

One with dropout also takes a PRNG key, the keyword `key`.
"""

PolicyFactory = Callable[[jax.Array, jax.Array, jax.Array], Policy]
"""`(network output, x_src, sigma_src) -> policy`."""

# Of the reference: policies in training, policies in its sampler.
TRAIN_EPS = 1e-6
SAMPLE_EPS = 1e-4

# A stream of its own beside those that are split off the same key.
_ADAPTERS = 0xADA


def make_policy_factory(
    policy: PolicyConfig, train: TrainConfig, *, sampling: bool = False
) -> PolicyFactory:
    """How a network's output becomes a policy.

    Args:
      policy: the policy's settings.
      train: the distillation's settings; segments and shift stay as trained when sampling.
      sampling: take the clamp of the reference's sampler instead of the one of its training.

    Returns:
      The factory.
    """
    if policy.kind == "gm":
        eps = SAMPLE_EPS if sampling else TRAIN_EPS
        return lambda output, x, sigma: GMFlowPolicy.create(output, x, sigma, eps=eps)
    if policy.kind == "arc":
        return ArcFlowPolicy.create
    longest = longest_segment(train.nfe, train.final_step_size_scale)
    segment_size = policy.segment_size or longest

    def create(output, x, sigma):
        return DXPolicy.create(
            output, x, sigma, segment_size, train.shift, policy.mode, eps=SAMPLE_EPS
        )

    return create


def guided_teacher(
    network: Network, conditions: Conditions, null: Conditions, config: TeacherConfig
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The teacher's guided velocity for one batch, conditional and unconditional in one call.

    Args:
      network: the teacher.
      conditions: of the batch.
      null: what stands for no condition, of a single example.
      config: guidance scale, interval and orthogonal share.

    Returns:
      `(x[B, *sites, C], sigma[B]) -> u[B, *sites, C]`.
    """
    if config.guidance_scale == 1:
        return jax.named_scope("teacher")(lambda x, sigma: network(x, sigma, conditions))

    @jax.named_scope("teacher")
    def velocity(x, sigma):
        def pair(a, b):
            # Side by side and not one after the other: a batch that is split over devices stays so.
            return jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:])

        nothing = jax.tree.map(lambda a, n: jnp.broadcast_to(n, a.shape), conditions, null)
        told = jax.tree.map(lambda a, n: pair(a, n.astype(a.dtype)), conditions, nothing)
        both = network(pair(x, x), pair(sigma, sigma), told)
        both = both.reshape(-1, 2, *both.shape[1:])
        cond, uncond = both[:, 0], both[:, 1]
        return guided_velocity(
            cond,
            uncond,
            config.guidance_scale,
            sigma,
            config.guidance_interval,
            config.orthogonal_guidance,
            x,
        )

    return velocity


def flow_matching_loss(
    network: Network,
    key: jax.Array,
    x0: jax.Array,
    conditions: Conditions,
    null: Conditions,
    dropout: float,
    warp: TimeWarp,
) -> jax.Array:
    """Conditional flow matching, `mean((u - (eps - x_0))^2)` at `tau ~ U(0, 1)`.

    Args:
      network: the teacher.
      key: PRNG key.
      x0: `[B, *sites, C]`, data.
      conditions: of the batch.
      null: replaces an example's conditions with probability `dropout`; of a single example.
      dropout: see `null`.
      warp: raw time to noise level.

    Returns:
      The loss, a scalar.
    """
    time_key, noise_key, label_key = jax.random.split(key, 3)
    batch = x0.shape[0]
    # One draw per stratum: the same distribution, less variance of the gradient.
    offsets = jax.random.uniform(time_key, (batch,))
    sigma = warp.warp((jnp.arange(batch) + offsets) / batch)
    noise = jax.random.normal(noise_key, x0.shape, x0.dtype)
    t = per_sample(sigma, x0.ndim)
    dropped = jax.random.bernoulli(label_key, dropout, (batch,))

    def drop(told, nothing):
        where = dropped.reshape((batch,) + (1,) * (told.ndim - 1))
        return jnp.where(where, jnp.broadcast_to(nothing, told.shape).astype(told.dtype), told)

    velocity = network((1 - t) * x0 + t * noise, sigma, jax.tree.map(drop, conditions, null))
    return jnp.mean(jnp.square(velocity - (noise - x0)))


@flax.struct.dataclass
class Draws:
    """Random numbers of one segment's loss.

    Attributes:
      student: `[B, M]` uniforms of the student's intervals.
      teacher: `[B, M - 1]` uniforms of the teacher's intervals.
      dropout: `[B, K]` uniforms of the mixture dropout; a component is dropped below its rate.
      adapters: `[B]` keys for the dropout of the student's adapters, of which the first counts;
        None for a student without.
    """

    student: jax.Array
    teacher: jax.Array
    dropout: jax.Array
    adapters: jax.Array | None = None


def sample_draws(
    key: jax.Array, batch: int, num_states: int, components: int, adapters: bool = False
) -> Draws:
    """Draws the numbers of one segment; `batch`, `M`, `K` and `adapters` as in `Draws`."""
    student, teacher, dropout = jax.random.split(key, 3)
    return Draws(
        jax.random.uniform(student, (batch, num_states)),
        jax.random.uniform(teacher, (batch, num_states - 1)),
        jax.random.uniform(dropout, (batch, components)),
        jax.random.split(jax.random.fold_in(key, _ADAPTERS), batch) if adapters else None,
    )


def teacher_ratio(step: jax.Array, mixing_steps: int) -> float | jax.Array:
    """Share of the trajectory walked by the teacher, `1 - min(step, N) / N`; 0 without mixing."""
    if mixing_steps == 0:
        return 0
    return 1 - jnp.minimum(step, mixing_steps) / mixing_steps


def _make_policy(student, policy_factory, x, sigma, conditions, draws):
    dropout = {} if draws.adapters is None else {"key": draws.adapters[0]}
    with jax.named_scope("student"):
        output = student(x, sigma, conditions, **dropout)
    with jax.named_scope("policy"):
        return policy_factory(output, x, sigma)


@jax.named_scope("policy")
def _segment_loss(policy, teacher, x_src, tau_src, segment_size, draws, ratio, config):
    """pi-ID on one segment under a config; the loss and where the segment ends."""
    window = window_size(segment_size, config.window_substeps, config.total_substeps)
    intervals = intervals_from_uniforms(draws.student, draws.teacher, segment_size, window, ratio)
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
        window_substeps=config.window_substeps,
        longest_segment=longest_segment(config.nfe, config.final_step_size_scale),
        loss_scale=config.loss_scale,
        adaptive_power=config.adaptive_power,
        time_power=config.time_power,
    )


def data_dependent_loss(
    student: Network,
    teacher: Callable[[jax.Array, jax.Array], jax.Array],
    policy_factory: PolicyFactory,
    x0: jax.Array,
    conditions: Conditions,
    tau: jax.Array,
    noise: jax.Array,
    draws: Draws,
    ratio: float | jax.Array,
    config: TrainConfig,
) -> jax.Array:
    """pi-ID on one random segment of each sample (paper, Alg. 2).

    Args:
      student: the student.
      teacher: the guided teacher.
      policy_factory: makes the policy of the student's output.
      x0: `[B, *sites, C]`, data.
      conditions: of the batch.
      tau: `[B]`, raw times in (0, 1], snapped up to the start of their segment.
      noise: `[B, *sites, C]`.
      draws: the segment's random numbers.
      ratio: share of the trajectory walked by the teacher.
      config: the distillation's settings.

    Returns:
      The loss, a scalar.
    """
    tau_src, segment_size = segment_start(tau, config.nfe, config.final_step_size_scale)
    sigma = TimeWarp(config.shift).warp(tau_src)
    t = per_sample(sigma, x0.ndim)
    x_src = (1 - t) * x0 + t * noise
    policy = _make_policy(student, policy_factory, x_src, sigma, conditions, draws)
    loss, _ = _segment_loss(policy, teacher, x_src, tau_src, segment_size, draws, ratio, config)
    return loss


def data_free_loss_and_grads(
    student_fn: Callable,
    params,
    teacher: Callable[[jax.Array, jax.Array], jax.Array],
    policy_factory: PolicyFactory,
    conditions: Conditions,
    noise: jax.Array,
    draws: Draws,
    ratio: float | jax.Array,
    config: TrainConfig,
):
    """pi-ID from pure noise through all segments, without data (paper, Sec. 3.4).

    Each segment has its own student evaluation and its own gradient; the state is handed over
    without gradient, by the detached policy. Segments are scanned with the gradient taken inside,
    so memory does not grow with their number.

    Args:
      student_fn: `(params, x, sigma, conditions) -> output`, see `Network`.
      params: the student's parameters that are trained.
      teacher: the guided teacher.
      policy_factory: makes the policy of the student's output.
      conditions: of the batch.
      noise: `[B, *sites, C]`, where the walk starts.
      draws: the segments' random numbers, stacked on a leading axis of length `nfe`.
      ratio: share of the trajectory walked by the teacher.
      config: the distillation's settings.

    Returns:
      `(loss, segment_losses[nfe], grads)`; the loss and the gradients weigh each segment by its
      raw-time length.
    """
    nfe, f = config.nfe, config.final_step_size_scale
    base = 1 / (nfe - 1 + f)
    batch = noise.shape[0]
    warp = TimeWarp(config.shift)

    def segment(carry, inputs):
        x, tau, grads = carry
        draws, index = inputs
        length = jnp.where(index == nfe - 1, f * base, base)
        segment_size = jnp.full((batch,), length, noise.dtype)
        sigma = warp.warp(tau)

        def weighted(params):
            student = functools.partial(student_fn, params)
            policy = _make_policy(student, policy_factory, x, sigma, conditions, draws)
            loss, aux = _segment_loss(policy, teacher, x, tau, segment_size, draws, ratio, config)
            return loss * length, (loss, aux.x_dst)

        (_, (loss, x_dst)), new = jax.value_and_grad(weighted, has_aux=True)(params)
        grads = jax.tree.map(jnp.add, grads, new)
        return (x_dst, jnp.maximum(tau - segment_size, 0), grads), (loss, length * loss)

    start = (noise, jnp.ones((batch,), noise.dtype), jax.tree.map(jnp.zeros_like, params))
    (_, _, grads), (losses, weighted) = jax.lax.scan(segment, start, (draws, jnp.arange(nfe)))
    return jnp.sum(weighted), losses, grads
