"""pi-ID: policy imitation distillation on one segment (arXiv 2510.14974, Sec. 3.3, Alg. 2).

The detached policy is rolled out to a few intermediate states. The teacher gives its velocity at
each of them, and a plain L2 loss matches the differentiable policy's velocity to it.
"""

import math
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from piflow_jax.arguments import ROUNDING, check_between, check_shape, known, whole
from piflow_jax.flow.policies.base import Policy, per_batch, per_sample, promote
from piflow_jax.flow.rollout import average_velocity, rollout
from piflow_jax.flow.schedule import TimeWarp
from piflow_jax.flow.substeps import Solver, check_substeps, num_substeps
from piflow_jax.keys import as_key

__all__ = [
    "ImitationAux",
    "Intervals",
    "imitation_loss",
    "intervals_from_uniforms",
    "sample_intervals",
    "uniforms_by_density",
    "window_size",
]

# The adaptive weight stops growing where the error is below this.
ADAPTIVE_EPS = 1e-3


@flax.struct.dataclass
class Intervals:
    """Raw-time lengths walked by the student and by the teacher between intermediate states.

    Attributes:
      student: `[B, M]`, rolled out with the detached policy before each teacher query.
      teacher: `[B, M]`, stepped along the teacher's velocity after each query.
      mixed: False if `teacher` is known to be zero before anything is computed. The loss then
        compiles no rollout for it.
    """

    student: jax.Array
    teacher: jax.Array
    mixed: bool = flax.struct.field(pytree_node=False, default=True)


@flax.struct.dataclass
class ImitationAux:
    """Intermediate values of the loss, without gradient.

    Attributes:
      x_dst: `[B, *sites, C]`, state at the segment's end, reached by the detached policy.
      tau_dst: `[B]`, its raw time.
      x: `[M, B, *sites, C]`, the intermediate states.
      sigma: `[M, B]`, their noise levels.
      prediction: `[M, B, *sites, C]`, the policy's mean or local velocities.
      target: `[M, B, *sites, C]`, the teacher's velocities.
    """

    x_dst: jax.Array
    tau_dst: jax.Array
    x: jax.Array
    sigma: jax.Array
    prediction: jax.Array
    target: jax.Array


def window_size(
    segment_size: jax.Array, window_substeps: int, total_substeps: int = 128
) -> jax.Array:
    """Raw-time length of the time-smoothing window, no longer than the segment.

    Args:
      segment_size: raw-time length of the segment in (0, 1], of any shape.
      window_substeps: policy substeps in the window; 0 means no window.
      total_substeps: policy substeps per unit of raw time.

    Returns:
      The length, shaped like `segment_size`. A traced negative length gives a negative window.

    Raises:
      ValueError: a number is out of range.
    """
    check_between("segment_size", segment_size, 0, 1, slack=ROUNDING)
    window_substeps = whole("window_substeps", window_substeps, 0)
    total_substeps = check_substeps(total_substeps)
    substep = segment_size / num_substeps(segment_size, total_substeps)
    return jnp.minimum(window_substeps * substep, segment_size)


def intervals_from_uniforms(
    student_u: jax.Array,
    teacher_u: jax.Array,
    segment_size: jax.Array,
    window: jax.Array,
    teacher_ratio: float | jax.Array,
) -> Intervals:
    """Turns uniform draws into the intervals of scheduled trajectory mixing.

    Args:
      student_u: `[B, M]` in [0, 1].
      teacher_u: `[B, M - 1]` in [0, 1].
      segment_size: `[B]`, raw-time length of the segment.
      window: `[B]`, raw-time length of the time-smoothing window.
      teacher_ratio: share of the segment walked by the teacher, a scalar in [0, 1]; 1 is fully
        off-policy, 0 fully on-policy. A Python 0 is recognised and saves the teacher's part.

    Returns:
      The intervals; student and teacher together cover at most `segment_size - window`. A traced
      window longer than its segment makes them negative.

    Raises:
      ValueError: if the shapes do not match, or known values are out of range.
    """
    check_between("student_u", student_u, 0, 1)
    check_between("teacher_u", teacher_u, 0, 1)
    check_between("teacher_ratio", teacher_ratio, 0, 1)
    _check_segment(segment_size, window)
    batch, states = student_u.shape
    check_shape(
        "teacher_u", teacher_u, (batch, states - 1), f"student_u of shape {student_u.shape}"
    )
    room = jnp.expand_dims(segment_size - window, -1)
    student = jnp.sort(student_u * ((1 - teacher_ratio) * room), axis=-1)
    zero = jnp.zeros_like(student[:, :1])
    one = jnp.ones_like(zero)
    teacher = jnp.diff(jnp.sort(teacher_u, axis=-1), axis=-1, prepend=zero, append=one)
    return Intervals(
        student=jnp.diff(student, axis=-1, prepend=zero),
        teacher=teacher * (teacher_ratio * room),
        mixed=not (isinstance(teacher_ratio, int | float) and teacher_ratio == 0),
    )


def uniforms_by_density(
    student_u: jax.Array, tau_src: jax.Array, room: jax.Array, power: float
) -> jax.Array:
    """Moves the uniforms of states, so that their raw times have a density proportional to a power.

    Args:
      student_u: `[B, M]` in [0, 1], for `intervals_from_uniforms` without a teacher's share.
      tau_src: `[B]`, raw times of the segment's start.
      room: `[B]`, raw-time length in which states lie: the segment without its window.
      power: `q` of the density `tau^q`; 0 leaves the uniforms as they are.

    Returns:
      `[B, M]` in [0, 1]. Errors at these states are, on average, those at uniform states with the
      weight `tau^q` divided by its mean.

    Raises:
      ValueError: `power` is negative or not finite.
    """
    check_between("power", power, 0)
    if power == 0:
        return student_u
    start, room = (jnp.expand_dims(jnp.asarray(a), -1) for a in (tau_src, room))
    end = jnp.maximum(start - room, 0)
    low, high = end ** (power + 1), start ** (power + 1)
    tau = jnp.maximum(high - student_u * (high - low), low) ** (1 / (power + 1))
    least = jnp.finfo(tau.dtype).tiny  # a window may leave no room
    return jnp.clip((start - tau) / jnp.maximum(start - end, least), 0, 1)


def _check_segment(segment_size: jax.Array, window: jax.Array) -> None:
    check_between("segment_size", segment_size, 0, 1, slack=ROUNDING)
    check_between("window", window, 0, slack=ROUNDING)
    size, length = known(segment_size), known(window)
    if size is not None and length is not None and (length > size + ROUNDING).any():
        raise ValueError("window must not be longer than segment_size")


def _check_intervals(intervals: Intervals, batch: int, segment_size: jax.Array) -> None:
    check_between("segment_size", segment_size, 0, 1, slack=ROUNDING)
    shapes = np.shape(intervals.student), np.shape(intervals.teacher)
    if shapes[0] != shapes[1] or len(shapes[0]) != 2 or shapes[0][0] != batch or not shapes[0][1]:
        raise ValueError(
            f"intervals must be student[{batch}, M] and teacher[{batch}, M] with M at least 1, got "
            f"{list(shapes[0])} and {list(shapes[1])}"
        )
    for name in ("student", "teacher"):
        check_between(f"intervals.{name}", getattr(intervals, name), 0, slack=ROUNDING)
    values = [known(a) for a in (intervals.student, intervals.teacher, segment_size)]
    if not any(value is None for value in values):
        student, teacher, size = values
        if (np.sum(student + teacher, axis=-1) > size + ROUNDING).any():
            raise ValueError("intervals must not be longer than their segment together")


def sample_intervals(
    key: jax.Array,
    num_states: int,
    segment_size: jax.Array,
    window: jax.Array,
    teacher_ratio: float | jax.Array,
) -> Intervals:
    """Draws the intervals of a training step; see `intervals_from_uniforms`.

    Args:
      key: a PRNG key.
      num_states: `M`, intermediate states per segment, at least 1.
      segment_size: `[B]`.
      window: `[B]`.
      teacher_ratio: share of the segment walked by the teacher, a scalar in [0, 1].

    Returns:
      The intervals.

    Raises:
      ValueError: if `num_states` is below 1, or known values are out of range.
    """
    num_states = whole("num_states", num_states, 1)
    key = key if isinstance(key, jax.Array) else as_key(key)
    segment_size, window = promote(segment_size, window)
    if segment_size.ndim != 1 or window.shape not in ((), segment_size.shape):
        raise ValueError(
            f"segment_size and window must be [B], got {list(segment_size.shape)} and "
            f"{list(window.shape)}"
        )
    student_key, teacher_key = jax.random.split(key)
    batch, dtype = segment_size.shape[0], segment_size.dtype
    return intervals_from_uniforms(
        jax.random.uniform(student_key, (batch, num_states), dtype),
        jax.random.uniform(teacher_key, (batch, num_states - 1), dtype),
        segment_size,
        window,
        teacher_ratio,
    )


def imitation_loss(
    policy: Policy,
    teacher: Callable[[jax.Array, jax.Array], jax.Array],
    x_src: jax.Array,
    tau_src: jax.Array,
    segment_size: jax.Array,
    intervals: Intervals,
    warp: TimeWarp,
    *,
    detached: Policy | None = None,
    total_substeps: int = 128,
    solver: Solver = "euler",
    window_substeps: int = 0,
    longest_segment: float = 1.0,
    loss_scale: float = 1.0,
    adaptive_power: float = 0.0,
    time_power: float = 0.0,
    eps: float = 1e-4,
) -> tuple[jax.Array, ImitationAux]:
    """The pi-ID loss of one segment (paper, Alg. 2).

    Args:
      policy: the student's policy at the segment's source; gradients flow into it.
      teacher: `(x[B, *sites, C], sigma[B]) -> u[B, *sites, C]`, guided; queried once per state and
        never differentiated.
      x_src: `[B, *sites, C]`, states at the segment's start.
      tau_src: `[B]`, raw times of the segment's start.
      segment_size: `[B]`, raw-time lengths.
      intervals: times of the M intermediate states, from `sample_intervals` with the window of
        `window_size(segment_size, window_substeps, total_substeps)`.
      warp: raw time to noise level.
      detached: the policy that visits the states, with its dropout; by default `policy` itself.
        Its gradient is stopped either way.
      total_substeps: substeps per unit of raw time.
      solver: solver of the rollouts, see `rollout`; the paper uses Euler's.
      window_substeps: length of the time-smoothing window in substeps; 0 matches local velocities.
      longest_segment: upper bound on every `segment_size`, in raw time. It bounds the
        differentiated rollouts, because the compiler must know the length of their loop.
      loss_scale: factor of the loss, 3 on ImageNet and 30 on FLUX and Qwen-Image.
      adaptive_power: `p` of the weight `1 / (error + 1e-3)^p`, where `error` is a sample's mean
        squared error at a state. The weight carries no gradient. It is the adaptive weight of
        MeanFlow (arXiv 2505.13447, Sec. 4.3); 0 gives the paper's plain loss.
      time_power: `q` of the weight `t^q` of the noise level. An error of the velocity is an error
        of `x_0` divided by `t`, so 2 weighs errors of `x_0` equally at all times, and 0 weighs
        errors of the velocity equally.
      eps: lower bound on the difference of noise levels that mean velocities divide by.

    Returns:
      `(loss[], aux)`, `loss = loss_scale * mean((prediction - target)^2) / 2`, with the weights if
      there are any. With traced times, states that intervals lead beyond the segment's end are not
      brought back, and NaN gives NaN.

    Raises:
      ValueError: shapes do not match (the teacher's included), a number is out of range, or known
        intervals are negative or longer than their segment.
    """
    check_between("loss_scale", loss_scale)
    check_between("adaptive_power", adaptive_power)
    check_between("time_power", time_power)
    check_between("longest_segment", longest_segment, 0, open_low=True)
    check_between("eps", eps, 0, open_low=True)
    check_between("tau_src", tau_src, 0, 1, slack=ROUNDING)
    x_src, tau_src, segment_size = promote(x_src, tau_src, segment_size)
    tau_src = per_batch("tau_src", tau_src, x_src)
    segment_size = per_batch("segment_size", segment_size, x_src)
    _check_intervals(intervals, len(x_src), segment_size)
    detached = jax.lax.stop_gradient(policy if detached is None else detached)
    window = window_size(segment_size, window_substeps, total_substeps)
    # Without mixing, the mean velocity spans only the window.
    longest = max(math.ceil(longest_segment * total_substeps), 1)
    bound = longest if intervals.mixed else window_substeps

    def visit(x, begin, end):
        return rollout(detached, x, begin, end, warp, total_substeps, bound="traced", solver=solver)

    def state(carry, interval):
        x, tau = carry
        student, teacher_interval = interval
        tau_a = jnp.maximum(tau - student, 0)
        x_a, sigma_a = visit(x, tau, tau_a)
        x_a = jax.lax.stop_gradient(x_a)
        target = jax.lax.stop_gradient(teacher(x_a, sigma_a))
        check_shape("the teacher's velocity", target, x_a.shape, "its state")
        target = target.astype(x_a.dtype)
        tau_b = jnp.maximum(tau_a - teacher_interval, 0)
        prediction = average_velocity(
            policy,
            x_a,
            tau_a,
            tau_b - window,
            warp,
            total_substeps,
            eps,
            bound=bound,
            solver=solver,
        )
        x_b = x_a
        if intervals.mixed:
            x_b = x_a + per_sample(warp.warp(tau_b) - sigma_a, x_a.ndim) * target
        return (x_b, tau_b), (x_a, sigma_a, prediction, target)

    carry = (jax.lax.stop_gradient(x_src), tau_src)
    columns = (intervals.student.T.astype(tau_src.dtype), intervals.teacher.T.astype(tau_src.dtype))
    (x, tau), (states, sigmas, predictions, targets) = jax.lax.scan(state, carry, columns)
    errors = jnp.mean(jnp.square(predictions - targets), axis=tuple(range(2, predictions.ndim)))
    if adaptive_power:
        errors = errors * (jax.lax.stop_gradient(errors) + ADAPTIVE_EPS) ** -adaptive_power
    if time_power:
        errors = errors * sigmas**time_power
    loss = loss_scale * 0.5 * jnp.mean(errors)
    tau_dst = tau_src - segment_size
    x_dst, _ = visit(x, tau, tau_dst)
    aux = ImitationAux(x_dst, tau_dst, states, sigmas, predictions, targets)
    return loss, jax.lax.stop_gradient(aux)
