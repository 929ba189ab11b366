"""Diagnosis of a poor student: four measurements on the same noise, and a plot of them.

A student can fail for reasons that need different cures. Its *network* may not have learned
everything that its policy could express. Then the velocity gap along its own trajectory is large,
and a free policy, fitted without a network, is better (after the toy experiment of arXiv
2510.14974). The *policy* may be too small. Then the free policy is equally poor. The mixture may
have *collapsed* to one component. Or the *rollout* is too coarse. Then the endpoint moves when
substeps are added.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from piflow_jax.arguments import whole
from piflow_jax.flow.imitation import imitation_loss, sample_intervals
from piflow_jax.flow.policies import GMFlowPolicy, Policy
from piflow_jax.flow.policies.base import promote
from piflow_jax.flow.rollout import rollout
from piflow_jax.flow.sampling import few_step_sample, ode_sample
from piflow_jax.flow.schedule import TimeWarp, sampling_times
from piflow_jax.flow.substeps import Solver
from piflow_jax.keys import as_key

__all__ = [
    "Capacity",
    "Diagnosis",
    "RolloutError",
    "VelocityGap",
    "diagnose",
    "effective_components",
    "plot_diagnosis",
    "policy_capacity",
    "rollout_error",
    "velocity_gap",
]

PolicyFn = Callable[[jax.Array, jax.Array], Policy]
VelocityFn = Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class VelocityGap:
    """The distance between policy and teacher velocities along the student's own trajectory.

    Attributes:
      t: shape `[nfe, P]`, noise levels, falling.
      gap: shape `[nfe, P]`, mean squares of the difference of velocities.
      power: shape `[nfe, P]`, mean squares of the teacher's velocity, for comparison.
    """

    t: np.ndarray
    gap: np.ndarray
    power: np.ndarray

    @property
    def by_segment(self) -> np.ndarray:
        """Mean gap of each segment, shape `[nfe]`."""
        return self.gap.mean(axis=1)


@dataclasses.dataclass(frozen=True)
class Capacity:
    """How well free policies, without a network, fit the teacher on fixed noise.

    Attributes:
      loss: shape `[steps]`, the pi-ID loss during the fit.
      error: mean squared distance of their endpoints from the teacher's.
    """

    loss: np.ndarray
    error: float


@dataclasses.dataclass(frozen=True)
class RolloutError:
    """The endpoint's error in two parts: the student's own, and the part from too few substeps.

    Attributes:
      substeps: shape `[S]`, substeps per unit of raw time.
      rollout: shape `[S]`, mean squared distance of endpoints from those of the finest rollout.
      total: shape `[S]`, mean squared distance from the teacher's endpoints.
      student: mean squared distance of the finest rollout from the teacher's endpoints.
    """

    substeps: np.ndarray
    rollout: np.ndarray
    total: np.ndarray
    student: float


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """All measurements of one student; `plot_diagnosis` draws them.

    Attributes:
      gap: the velocity gap by time and by segment.
      rollout: the error against the number of substeps.
      naive: mean squared distance of the teacher's endpoints at as many evaluations as the student.
      capacity: the fit of a free policy of the same kind over one segment, or None if not
        requested.
      components: shape `[N]`, effective components at all sites, or None if the policy is not a
        mixture.
      num_components: `K`, or 0 if the policy is not a mixture.
    """

    gap: VelocityGap
    rollout: RolloutError
    naive: float
    capacity: Capacity | None
    components: np.ndarray | None
    num_components: int

    def reasons(self) -> list[str]:
        """The notable findings, one sentence each, with the largest part of the error first."""
        found = []
        at_use = float(self.rollout.rollout[-1])
        if at_use > 0.25 * self.rollout.student and at_use > 0.01 * self.naive:
            found.append(
                (at_use, f"rollout: substeps are too few, they move endpoints by {at_use:.2g}")
            )
        if self.capacity is not None:
            free, own = self.capacity.error, self.rollout.student
            if own > 4 * free and own > 0.01 * self.naive:
                text = f"network: a free policy reaches {free:.2g}, the student {own:.2g}: train on"
                found.append((own - free, text))
            # With several evaluations a student may be better than any policy with one evaluation.
            if free > 0.1 * self.naive and own > 0.5 * free:
                text = (
                    f"policy: even a free one stays {free:.2g} away: more components or evaluations"
                )
                found.append((free, text))
        if self.components is not None and self.num_components > 1:
            mean = float(np.mean(self.components))
            if mean < 1.1:
                found.append(
                    (0.0, f"mixture: {mean:.2f} components of {self.num_components} in use")
                )
        return [text for _, text in sorted(found, reverse=True)]


def velocity_gap(
    policy_fn: PolicyFn,
    teacher: VelocityFn,
    noise: jax.Array,
    nfe: int,
    warp: TimeWarp,
    *,
    points: int = 16,
    total_substeps: int = 128,
    final_step_size_scale: float = 1.0,
) -> VelocityGap:
    """Compares velocities of policy and teacher along the student's own trajectory.

    Args:
      policy_fn: `(x[B, *sites, C], t[B]) -> policy`, one network evaluation.
      teacher: `(x[B, *sites, C], t[B]) -> u[B, *sites, C]`, guided.
      noise: `[B, *sites, C]`, standard normal.
      nfe: network evaluations, at least 1.
      warp: raw time to noise level.
      points: queries per segment, evenly spaced in raw time from the segment's start.
      total_substeps: policy substeps per unit of raw time.
      final_step_size_scale: relative length of the last segment.

    Returns:
      The gap by time and segment.

    Raises:
      ValueError: `nfe`, `points` or `total_substeps` is below 1, or `final_step_size_scale` is
        negative.
    """
    times, points = sampling_times(nfe, warp, final_step_size_scale), whole("points", points, 1)
    batch = noise.shape[0]

    @jax.jit
    def segment(x, tau_src, tau_dst):
        policy = policy_fn(x, jnp.full((batch,), warp.warp(tau_src)))

        def query(x, tau):
            now, then = (jnp.full((batch,), value) for value in (tau[0], tau[1]))
            t = warp.warp(now)
            mine, theirs = policy.velocity(x, t), teacher(x, t)
            x, _ = rollout(policy, x, now, then, warp, total_substeps, bound="traced")
            return x, (t[0], jnp.mean((mine - theirs) ** 2), jnp.mean(theirs**2))

        grid = jnp.linspace(tau_src, tau_dst, points + 1)
        return jax.lax.scan(query, x, jnp.stack([grid[:-1], grid[1:]], axis=1))

    (x,), found = promote(noise), []
    for src, dst in zip(times.src, times.dst, strict=True):
        x, values = segment(x, *(jnp.float32(warp.unwarp(t)) for t in (src, dst)))
        found.append(values)
    return VelocityGap(*(np.stack([np.asarray(one[i]) for one in found]) for i in range(3)))


def policy_capacity(
    make_policy: Callable[[Any, jax.Array, jax.Array], Policy],
    output: Any,
    teacher: VelocityFn,
    noise: jax.Array,
    warp: TimeWarp,
    *,
    steps: int = 500,
    learning_rate: float = 0.02,
    num_states: int = 4,
    total_substeps: int = 128,
    reference: jax.Array | None = None,
    seed: int = 0,
) -> Capacity:
    """Fits one free output per noise, without a network, over one segment from noise to data.

    Args:
      make_policy: `(output, x, t) -> policy`.
      output: arrays `[B, ...]` like a network's prediction for the batch, at which the fit starts.
      teacher: `(x[B, *sites, C], t[B]) -> u[B, *sites, C]`.
      noise: `[B, *sites, C]`.
      warp: raw time to noise level.
      steps: Adam steps; the rate decays to zero along a cosine.
      learning_rate: learning rate at the start.
      num_states: teacher queries per step.
      total_substeps: policy substeps per unit of raw time.
      reference: `[B, *sites, C]`, the teacher's endpoints; by default from 128 Euler steps.
      seed: seed of the query times.

    Returns:
      The loss along the fit and the remaining error.

    Raises:
      ValueError: `steps`, `num_states` or `total_substeps` is below 1.
    """
    one = jnp.ones(noise.shape[0], noise.dtype)
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))
    if reference is None:
        reference = ode_sample(teacher, noise, 128, warp)

    def loss_fn(output, key):
        times = sample_intervals(key, num_states, one, 0 * one, teacher_ratio=0)
        policy = make_policy(output, noise, one)
        loss, _ = imitation_loss(
            policy, teacher, noise, one, one, times, warp, total_substeps=total_substeps
        )
        return loss

    @jax.jit
    def fit(output):
        def step(carry, key):
            output, state = carry
            loss, grads = jax.value_and_grad(loss_fn)(output, key)
            # Outputs are independent of each other, so their learning rate must not depend on the
            # batch size.
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(output, updates), state), loss

        keys = jax.random.split(as_key(seed), steps)
        (output, _), losses = jax.lax.scan(step, (output, optimizer.init(output)), keys)
        end, _ = rollout(make_policy(output, noise, one), noise, one, 0 * one, warp, total_substeps)
        return losses, jnp.mean((end - reference) ** 2)

    losses, error = fit(output)
    return Capacity(np.asarray(losses), float(error))


def effective_components(policy: GMFlowPolicy) -> jax.Array:
    """Exponential of the entropy of the mixture's weights at the source.

    Args:
      policy: a mixture.

    Returns:
      `[B, *sites]`, between 1 (one component has all the weight) and `K` (all weights are equal).
    """
    logs = jax.nn.log_softmax(policy.logweights, axis=1)
    weights = jnp.exp(logs)
    return jnp.exp(-jnp.sum(jnp.where(weights > 0, weights * logs, 0), axis=1))


def rollout_error(
    policy_fn: PolicyFn,
    noise: jax.Array,
    reference: jax.Array,
    nfe: int,
    warp: TimeWarp,
    *,
    substeps: Sequence[int] = (8, 16, 32, 64, 128),
    finest: int = 1024,
    final_step_size_scale: float = 1.0,
    solver: Solver = "multistep",
) -> RolloutError:
    """Splits the endpoint's error into the student's own error and the error of its rollout.

    Args:
      policy_fn: `(x[B, *sites, C], t[B]) -> policy`.
      noise: `[B, *sites, C]`.
      reference: `[B, *sites, C]`, the teacher's endpoints from the same noise.
      nfe: network evaluations, at least 1.
      warp: raw time to noise level.
      substeps: numbers of substeps per unit of raw time, rising; the last is the one in use.
      finest: number of substeps that stands for infinitely many.
      final_step_size_scale: relative length of the last segment.
      solver: solver of the rollouts, by default the same as in `Student.sample`. Substeps are
        rounded up, as there.

    Returns:
      The errors.

    Raises:
      ValueError: `nfe` or a number of substeps is below 1, `final_step_size_scale` is negative, or
        the solver is unknown.
    """

    def sample(count):
        return jax.jit(
            lambda noise: few_step_sample(
                policy_fn,
                noise,
                nfe,
                warp,
                total_substeps=count,
                final_step_size_scale=final_step_size_scale,
                solver=solver,
                rounding="ceil",
            )
        )(noise)

    def distance(a, b):
        return float(jnp.mean((a - b) ** 2))

    limit, ends = sample(finest), [sample(count) for count in substeps]
    return RolloutError(
        np.asarray(substeps),
        np.asarray([distance(end, limit) for end in ends]),
        np.asarray([distance(end, reference) for end in ends]),
        distance(limit, reference),
    )


def diagnose(
    policy_fn: PolicyFn,
    teacher: VelocityFn,
    noise: jax.Array,
    nfe: int,
    warp: TimeWarp,
    *,
    free: tuple[Callable[[Any, jax.Array, jax.Array], Policy], Any] | None = None,
    substeps: int = 128,
    final_step_size_scale: float = 1.0,
    capacity_steps: int = 500,
    solver: Solver = "multistep",
) -> Diagnosis:
    """Measures a student against its teacher with all methods of this module.

    Args:
      policy_fn: `(x[B, *sites, C], t[B]) -> policy`, with the batch's conditions.
      teacher: `(x[B, *sites, C], t[B]) -> u[B, *sites, C]`, with the same conditions.
      noise: `[B, *sites, C]`, standard normal.
      nfe: network evaluations, at least 1.
      warp: raw time to noise level.
      free: `make_policy` and `output` of `policy_capacity`; without it the capacity is not
        measured.
      substeps: policy substeps per unit of raw time in use.
      final_step_size_scale: relative length of the last segment.
      capacity_steps: Adam steps of the free policy's fit.
      solver: solver of the student's samples. The gap and the free policies are measured along
        Euler trajectories, because students are trained on them.

    Returns:
      The measurements.

    Raises:
      ValueError: `nfe` or `substeps` is below 1, `final_step_size_scale` is negative, or the solver
        is unknown.
    """
    reference, naive = (
        jax.jit(lambda x, n=n: ode_sample(teacher, x, n, warp))(noise) for n in (128, nfe)
    )
    policy = policy_fn(noise, jnp.ones(noise.shape[0]))
    mixture = isinstance(policy, GMFlowPolicy)
    scale = {"final_step_size_scale": final_step_size_scale}
    counts = [max(substeps // 2**i, 1) for i in (4, 3, 2, 1, 0)]
    capacity = None
    if free is not None:
        options = {"steps": capacity_steps, "reference": reference, "total_substeps": substeps}
        capacity = policy_capacity(*free, teacher, noise, warp, **options)
    return Diagnosis(
        gap=velocity_gap(policy_fn, teacher, noise, nfe, warp, total_substeps=substeps, **scale),
        rollout=rollout_error(
            policy_fn,
            noise,
            reference,
            nfe,
            warp,
            substeps=counts,
            finest=8 * substeps,
            solver=solver,
            **scale,
        ),
        naive=float(jnp.mean((naive - reference) ** 2)),
        capacity=capacity,
        components=np.ravel(effective_components(policy)) if mixture else None,
        num_components=policy.logweights.shape[1] if mixture else 0,
    )


def plot_diagnosis(diagnosis: Diagnosis) -> Any:
    """Draws a diagnosis in four panels.

    Args:
      diagnosis: the result of `diagnose`.

    Returns:
      The matplotlib `Figure`.

    Raises:
      ImportError: matplotlib is not installed; `pip install -e ".[notebooks]"`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    (gap_axes, rollout_axes), (capacity_axes, component_axes) = figure.subplots(2, 2)

    gap = diagnosis.gap
    for i, (t, values) in enumerate(zip(gap.t, gap.gap, strict=True)):
        mean = gap.by_segment[i]
        gap_axes.plot(t, values, ".-", label=f"segment {i + 1}: {mean:.2g} on average")
    gap_axes.plot(gap.t.ravel(), gap.power.ravel(), ":", color="0.6", label="the teacher's power")
    gap_axes.set(xlabel="t (noise on the left)", ylabel="mean square", yscale="log")
    gap_axes.invert_xaxis()
    gap_axes.set_title("velocity gap along the student's trajectory")
    gap_axes.legend(fontsize=8)

    error = diagnosis.rollout
    rollout_axes.loglog(error.substeps, error.total, "o-", label="from the teacher")
    rollout_axes.loglog(error.substeps, error.rollout, "s-", label="from the finest rollout")
    rollout_axes.axhline(
        error.student, ls="--", color="C2", label="finest rollout from the teacher"
    )
    rollout_axes.axhline(diagnosis.naive, ls=":", color="0.6", label="teacher at the same NFE")
    rollout_axes.set(xlabel="substeps per unit of raw time", ylabel="mean squared distance")
    rollout_axes.set_xticks(error.substeps, [str(count) for count in error.substeps])
    rollout_axes.minorticks_off()
    rollout_axes.set_title("endpoints: student against rollout")
    rollout_axes.legend(fontsize=8)

    if diagnosis.capacity is None:
        capacity_axes.text(0.5, 0.5, "not measured", ha="center", transform=capacity_axes.transAxes)
    else:
        capacity_axes.semilogy(diagnosis.capacity.loss, lw=0.8)
        own = error.student
        capacity_axes.set_title(
            f"free policies: endpoints {diagnosis.capacity.error:.2g} away, the student's {own:.2g}"
        )
        capacity_axes.set(xlabel="step of the fit", ylabel="imitation loss")

    if diagnosis.components is None:
        component_axes.text(0.5, 0.5, "no mixture", ha="center", transform=component_axes.transAxes)
    else:
        component_axes.hist(diagnosis.components, bins=40, range=(1, diagnosis.num_components))
        component_axes.set(
            xlabel=f"effective components, of {diagnosis.num_components}", ylabel="sites"
        )
        component_axes.set_title("how much of the mixture is in use")
    return figure
