"""Train steps: pure functions of state and batch, each in a single jit."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from piflow_jax.config import Config, OptimizerConfig
from piflow_jax.flow.schedule import TimeWarp
from piflow_jax.flow.teacher import Teacher
from piflow_jax.keys import seed_key
from piflow_jax.systems.networks import Network
from piflow_jax.systems.policies import POLICIES, policy_factory
from piflow_jax.training.objectives import (
    data_dependent_loss,
    data_free_loss_and_grads,
    flow_matching_loss,
    sample_draws,
    teacher_ratio,
)
from piflow_jax.training.optimizer import update_ema
from piflow_jax.training.state import TrainState

__all__ = ["accumulate", "advance", "distill_step", "states_of", "teacher_step"]

# A separate random stream, independent of those that the losses split off the same key.
_POSTERIOR = 0x9057

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
    return TrainState(state.step + 1, params, ema, opt_state).carrying(carried), metrics


def states_of(x: Any, key: jax.Array, draw: Draw | None) -> jax.Array:
    """States `[B, *sites, C]` from a batch's `x`, in at least float32."""
    if draw is not None:
        return draw(jax.random.fold_in(key, _POSTERIOR), x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def accumulate(loss_and_grads: Callable, batch, count: int, carried: Any = ()):
    """Mean loss and gradients of a batch, computed in `count` parts one after the other.

    All parts have the same number of examples, so the result equals that of the whole batch, with
    the memory of one part. Part `i` takes the examples `i, i + count, ...`. A batch that is split
    over devices then has equally many examples of each part on every device, and nothing moves
    between devices.

    Args:
      loss_and_grads: `(part, carried) -> ((loss, grads), carried)`; loss and gradients are means
        over the examples of the part.
      batch: arrays with examples on the leading axis.
      count: number of parts; divides the number of examples.
      carried: variables that one part hands to the next.

    Returns:
      `((loss, grads), carried)`.
    """
    if count == 1:
        return loss_and_grads(batch, carried)
    parts = jax.tree.map(
        lambda a: jnp.swapaxes(a.reshape(len(a) // count, count, *a.shape[1:]), 0, 1), batch
    )
    first = jax.tree.map(lambda a: a[0], parts)
    shapes, _ = jax.eval_shape(loss_and_grads, first, carried)
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)

    def body(carry, part):
        total, carried = carry
        new, carried = loss_and_grads(part, carried)
        with jax.named_scope("optimizer"):
            return (jax.tree.map(jnp.add, total, new), carried), None

    (total, carried), _ = jax.lax.scan(body, (zeros, carried), parts)
    with jax.named_scope("optimizer"):
        return jax.tree.map(lambda a: a / count, total), carried


def teacher_step(
    network: Network,
    optimizer: optax.GradientTransformation,
    config: Config,
    null: Any = None,
    draw: Draw | None = None,
) -> StepFn:
    """The flow-matching step of the teacher.

    Args:
      network: the teacher, which predicts velocities.
      optimizer: its optimiser.
      config: the run's settings.
      null: the null condition of a single example; None drops no condition.
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


def distill_step(
    student: Network,
    teacher: Teacher,
    optimizer: optax.GradientTransformation,
    config: Config,
    channels: int,
    draw: Draw | None = None,
) -> StepFn:
    """The pi-ID step of the student.

    A student with adapters has its teacher's parameters as its base. They are a single argument of
    the step for both, and the state holds nothing of their size.

    Args:
      student: the student, which predicts policies.
      teacher: the teacher with its guidance.
      optimizer: the student's optimiser.
      config: the run's settings.
      channels: `C` of a state.
      draw: draws states, for a source that has it, see `Source`.

    Returns:
      `(state, teacher_params, root_key, batch) -> (state, metrics)`, to be jitted with the state
      donated and the teacher's parameters not. A batch has `x` and `condition`, see `Source`. For
      training without data, `x[B, *sites, 0]` gives the size of samples.
    """
    train = config.train
    factory = policy_factory(config.policy, train)
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

        def student_fn(params, carried, *inputs):
            base = teacher_params if student.adapted else carried
            return student.train(student.with_base(params, base), *inputs)

        def loss_and_grads(part, carried):
            velocity = teacher.bind(teacher_params, part["condition"])
            if train.data_free:
                loss, _, grads, carried = data_free_loss_and_grads(
                    student_fn,
                    state.params,
                    carried,
                    velocity,
                    factory,
                    part["condition"],
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
                    part["condition"],
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
            "noise": noise,
            "draws": draws,
            "tau": tau,
        }
        if not train.data_free:
            whole["states"] = states_of(batch["x"], keys[0], draw)
        (loss, grads), carried = accumulate(
            loss_and_grads, whole, train.microbatches, state.carried
        )
        state, metrics = advance(state, grads, loss, optimizer, train.optimizer, carried)
        if train.mixing_steps:
            metrics["teacher_ratio"] = jnp.asarray(ratio)
        return state, metrics

    return step
