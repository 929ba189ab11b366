"""Train steps: pure functions of state and batch, each in a single jit."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from piflow_jax.config import Config, OptimizerConfig
from piflow_jax.flow.guidance import Null
from piflow_jax.flow.schedule import TimeWarp
from piflow_jax.flow.teacher import Teacher
from piflow_jax.keys import seed_key
from piflow_jax.systems.network import Network
from piflow_jax.systems.policies import POLICIES, policy_factory
from piflow_jax.systems.spaces import Space
from piflow_jax.training.accumulation import accumulate
from piflow_jax.training.corrector import make_corrector
from piflow_jax.training.objectives import (
    data_dependent_loss,
    data_free_loss_and_grads,
    flow_matching_loss,
    sample_draws,
    teacher_ratio,
)
from piflow_jax.training.optimizer import make_optimizer, update_ema
from piflow_jax.training.state import TrainState

# Separate random streams, independent of those that the losses split off the same keys.
_POSTERIOR = 0x9057
_CORRECTOR = 0xC0EE
_GUIDANCE = 0x61DE

Metrics = dict[str, jax.Array]
StepFn = Callable[..., tuple[TrainState, Metrics]]
Draw = Callable[[jax.Array, Any], jax.Array]
"""`(key, x) -> states[B, *sites, C]`, for a source with distributions of states in `x`."""


@jax.named_scope("optimizer")
def advance(
    state: TrainState,
    grads,
    loss: jax.Array,
    optimizer: optax.GradientTransformation,
    config: OptimizerConfig,
    carried: Any = (),
) -> tuple[TrainState, Metrics]:
    """The state after an optimiser step, including its average, and the metrics for the loop.

    Args:
      state: the state before.
      grads: gradients with respect to `state.params`.
      loss: scalar.
      optimizer: the update rule.
      config: the settings of warm-up and average.
      carried: the network's variables other than its parameters, after the step.

    Returns:
      `(state, metrics)`.
    """
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = update_ema(state.ema_params, params, state.step, config.warmup_steps, config.ema_gamma)
    metrics = {"loss": loss, "grad_norm": optax.global_norm(grads)}
    state = state.replace(step=state.step + 1, params=params, ema_params=ema, opt_state=opt_state)
    return state.carrying(carried), metrics


def states_of(x: Any, key: jax.Array, draw: Draw | None) -> jax.Array:
    """States `[B, *sites, C]` from a batch's `x`, in at least float32."""
    if draw is not None:
        return draw(jax.random.fold_in(key, _POSTERIOR), x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def teacher_step(
    network: Network,
    optimizer: optax.GradientTransformation,
    config: Config,
    null: Null | None = None,
    draw: Draw | None = None,
) -> StepFn:
    """The flow-matching step of the teacher.

    Args:
      network: the teacher, which predicts velocities.
      optimizer: its optimiser.
      config: the run's settings.
      null: the null condition, see `null_conditions`; None drops no condition.
      draw: draws states, for a source that has it, see `Source`.

    Returns:
      `(state, root_key, batch) -> (state, metrics)`, to be jitted with the state donated. A batch
      has `x` and `condition`, see `Source`.
    """
    settings = config.teacher

    def step(state: TrainState, root: jax.Array, batch):
        key = jax.random.fold_in(root, state.step)

        def loss_fn(params):
            def call(carried, *inputs):
                return network.train(network.with_base(params, carried), *inputs)

            return flow_matching_loss(
                call,
                state.carried,
                key,
                states_of(batch["x"], key, draw),
                batch.get("condition"),
                null,
                settings.label_dropout,
                TimeWarp(config.train.shift),
            )

        (loss, carried), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        return advance(state, grads, loss, optimizer, settings.optimizer, carried)

    return step


def first_student_state(
    key: jax.Array,
    config: Config,
    student: Network,
    trained: Any,
    teacher_params: Any,
    carried: Any = (),
    space: Space | None = None,
) -> TrainState:
    """The state of a student before its first step, with what its corrector learns.

    Args:
      key: PRNG key of what is fresh in the critic.
      config: the run's settings.
      student: the student.
      trained: the student's trained parameters at the start.
      teacher_params: the teacher's parameters; only a corrector needs them.
      carried: the student's carried variables.
      space: see `distill_step`.

    Returns:
      The state.
    """
    optimizer = make_optimizer(config.train.optimizer, config.train.steps)
    state = TrainState.create(trained, optimizer, carried)
    corrector = make_corrector(config, student, space=space)
    return state if corrector is None else corrector.begin(key, state, teacher_params)


def distill_step(
    student: Network,
    teacher: Teacher,
    optimizer: optax.GradientTransformation,
    config: Config,
    channels: int,
    draw: Draw | None = None,
    space: Space | None = None,
) -> StepFn:
    """The pi-ID step of the student.

    A student with adapters has its teacher's parameters as its base. They are a single argument of
    the step for both, and the state holds nothing of their size.

    Args:
      student: the student, which predicts policies.
      teacher: the teacher with its guidance; with a `guidance_range`, each example has a scale of
        its own.
      optimizer: the student's optimiser.
      config: the run's settings.
      channels: `C` of a state.
      draw: draws states, for a source that has it, see `Source`.
      space: the feature space of a corrector that compares features.

    Returns:
      `(state, teacher_params, root_key, batch) -> (state, metrics)`, to be jitted with the state
      donated and the teacher's parameters not. A batch has `x` and `condition`, see `Source`. For
      training without data, `x[B, *sites, 0]` gives the size of samples.
    """
    train, scales = config.train, config.teacher.guidance_range
    factory = policy_factory(config.policy, train)
    corrector = make_corrector(config, student, teacher, space)
    components = POLICIES[config.policy.kind].droppable(config.policy)

    def step(state: TrainState, teacher_params, root: jax.Array, batch):
        keys = jax.random.split(jax.random.fold_in(root, state.step), 3)
        like = jax.eval_shape(lambda x: states_of(x, seed_key(0), draw), batch["x"])
        size, shape = like.shape[0], (*like.shape[:-1], channels)
        ratio = teacher_ratio(state.step, train.mixing_steps)
        noise = jax.random.normal(keys[0], shape, like.dtype)

        def sample(key):
            choices = len(train.evaluations)
            return sample_draws(key, size, train.num_states, components, student.drops, choices)

        if train.data_free:
            draws = jax.vmap(sample)(jax.random.split(keys[1], train.nfe))
            # Segments are the leading axis; microbatches are taken from the axis after it.
            draws = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), draws)
        else:
            draws = sample(keys[1])
        tau = 1 - jax.random.uniform(keys[2], (size,))  # in (0, 1]
        guidance = None
        if scales:
            key = jax.random.fold_in(keys[2], _GUIDANCE)
            guidance = jax.random.uniform(key, (size,), minval=scales[0], maxval=scales[1])

        def student_fn(params, carried, *inputs):
            return student.train(student.of_student(params, carried, teacher_params), *inputs)

        def loss_and_grads(part, carried):
            condition, guide = part["condition"], teacher
            if scales:
                guide = dataclasses.replace(teacher, guidance_scale=part["guidance"])
                condition = student.conditioning.guided(condition, part["guidance"])
            velocity = guide.bind(teacher_params, part["condition"])
            if train.data_free:
                loss, _, grads, carried = data_free_loss_and_grads(
                    student_fn,
                    state.params,
                    carried,
                    velocity,
                    factory,
                    condition,
                    part["noise"],
                    jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), part["draws"]),
                    ratio,
                    train,
                )
                return (loss, grads), carried
            (loss, carried), grads = jax.value_and_grad(
                lambda params: data_dependent_loss(
                    lambda *inputs: student_fn(params, *inputs),
                    carried,
                    velocity,
                    factory,
                    part["states"],
                    condition,
                    part["tau"],
                    part["noise"],
                    part["draws"],
                    ratio,
                    train,
                ),
                has_aux=True,
            )(state.params)
            return (loss, grads), carried

        whole = {
            "condition": batch.get("condition"),
            "guidance": guidance,
            "noise": noise,
            "draws": draws,
            "tau": tau,
        }
        if not train.data_free:
            whole["states"] = states_of(batch["x"], keys[0], draw)
        if corrector is not None:
            corrected, whole = corrector.shares(whole)
        (loss, grads), carried = accumulate(
            loss_and_grads, whole, train.microbatches, state.carried
        )
        more = {}
        if corrector is not None:
            correct, follow = jax.random.split(jax.random.fold_in(keys[1], _CORRECTOR))
            grads, more = corrector.correct(state, grads, teacher_params, corrected, correct)
        state, metrics = advance(state, grads, loss, optimizer, train.optimizer, carried)
        if corrector is not None:
            state, followed = corrector.follow(state, teacher_params, corrected, follow)
            more |= followed
        if train.mixing_steps:
            more["teacher_ratio"] = jnp.asarray(ratio)
        return state, metrics | more

    return step
