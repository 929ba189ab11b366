"""Train steps: pure functions of state and batch, one jit each."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from piflow_jax.config import Config, OptimizerConfig
from piflow_jax.data.latents import draw_latents
from piflow_jax.flow.schedule import TimeWarp
from piflow_jax.training.networks import DataShape
from piflow_jax.training.objectives import (
    data_dependent_loss,
    data_free_loss_and_grads,
    flow_matching_loss,
    guided_teacher,
    make_policy_factory,
    sample_draws,
    teacher_ratio,
)
from piflow_jax.training.optimizer import update_ema
from piflow_jax.training.state import TrainState

__all__ = ["accumulate", "advance", "distill_step", "images_of", "teacher_step"]

# A stream of its own beside those that the losses split off the same key.
_POSTERIOR = 0x9057

Metrics = dict[str, jax.Array]
StepFn = Callable[..., tuple[TrainState, Metrics]]


@jax.named_scope("optimizer")
def advance(
    state: TrainState,
    grads,
    loss: jax.Array,
    optimizer: optax.GradientTransformation,
    config: OptimizerConfig,
) -> tuple[TrainState, Metrics]:
    """The state after an optimiser's step, its average included, and what the loop reports.

    Args:
      state: the state before.
      grads: gradients by `state.params`.
      loss: scalar.
      optimizer: the update rule.
      config: the settings of warm-up and average.

    Returns:
      `(state, metrics)`.
    """
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = update_ema(state.ema_params, params, state.step, config.warmup_steps, config.ema_gamma)
    metrics = {"loss": loss, "grad_norm": optax.global_norm(grads)}
    return TrainState(state.step + 1, params, ema, opt_state), metrics


def images_of(batch, key: jax.Array, data: DataShape) -> jax.Array:
    """What the networks see, `[B, H, W, C]`: images, or a draw from the posterior of latents."""
    if "image" in batch:
        return batch["image"]
    return draw_latents(
        jax.random.fold_in(key, _POSTERIOR),
        batch["mean"],
        batch["std"],
        data.latent_scale,
        data.latent_shift,
    )


def accumulate(loss_and_grads: Callable, batch, count: int):
    """Mean loss and gradients of a batch, in `count` parts one after the other.

    Every part has the same number of examples, so the result is that of the whole batch; memory is
    that of one part. Part `i` takes the examples `i, i + count, ...`: a batch that is split over
    devices then has equally many of each part on each of them, and nothing moves between devices.

    Args:
      loss_and_grads: `part -> (loss, grads)`, both means over the examples of the part.
      batch: arrays with the examples in front.
      count: number of parts; divides the number of examples.

    Returns:
      `(loss, grads)`.
    """
    if count == 1:
        return loss_and_grads(batch)
    parts = jax.tree.map(lambda a: jnp.swapaxes(a.reshape(-1, count, *a.shape[1:]), 0, 1), batch)
    zeros = jax.tree.map(
        lambda a: jnp.zeros(a.shape, a.dtype),
        jax.eval_shape(loss_and_grads, jax.tree.map(lambda a: a[0], parts)),
    )

    def body(total, part):
        new = loss_and_grads(part)
        with jax.named_scope("optimizer"):
            return jax.tree.map(jnp.add, total, new), None

    total, _ = jax.lax.scan(body, zeros, parts)
    with jax.named_scope("optimizer"):
        return jax.tree.map(lambda a: a / count, total)


def teacher_step(
    module, optimizer: optax.GradientTransformation, config: Config, data: DataShape
) -> StepFn:
    """The flow-matching step of the teacher.

    Args:
      module: the teacher's module, with a velocity head.
      optimizer: its optimiser.
      config: the run's settings.
      data: what the data look like.

    Returns:
      `(state, root_key, batch) -> (state, metrics)`, to be jitted with the state donated. `batch`
      has `image[B, H, W, C]`, or `mean` and `std` of latents, and `label[B]`.
    """
    settings = config.teacher

    def step(state: TrainState, root: jax.Array, batch):
        key = jax.random.fold_in(root, state.step)

        def loss_fn(params):
            return flow_matching_loss(
                lambda *inputs: module.apply(params, *inputs),
                key,
                images_of(batch, key, data),
                batch["label"],
                data.num_classes,
                settings.label_dropout,
                TimeWarp(config.train.shift),
            )

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        return advance(state, grads, loss, optimizer, settings.optimizer)

    return step


def distill_step(
    student, teacher, optimizer: optax.GradientTransformation, config: Config, data: DataShape
) -> StepFn:
    """The pi-ID step of the student.

    Args:
      student: the student's module, with a policy head.
      teacher: the teacher's module, with a velocity head.
      optimizer: the student's optimiser.
      config: the run's settings.
      data: what the data look like.

    Returns:
      `(state, teacher_params, root_key, batch) -> (state, metrics)`, to be jitted with the state
      donated and the teacher's parameters not.
    """
    train = config.train
    factory = make_policy_factory(config.policy, train)
    components = 0 if config.policy.kind == "dx" else config.policy.num_components

    def step(state: TrainState, teacher_params, root: jax.Array, batch):
        keys = jax.random.split(jax.random.fold_in(root, state.step), 3)
        images, labels = images_of(batch, keys[0], data), batch["label"]
        ratio = teacher_ratio(state.step, train.mixing_steps)
        size = images.shape[0]
        noise = jax.random.normal(keys[0], images.shape, images.dtype)
        if train.data_free:
            draws = jax.vmap(lambda key: sample_draws(key, size, train.num_states, components))(
                jax.random.split(keys[1], train.nfe)
            )
            # Segments are the leading axis; microbatches are taken from the one behind it.
            draws = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), draws)
        else:
            draws = sample_draws(keys[1], size, train.num_states, components)
        tau = 1 - jax.random.uniform(keys[2], (size,))  # in (0, 1]

        def loss_and_grads(part):
            teacher_velocity = guided_teacher(
                lambda *inputs: teacher.apply(teacher_params, *inputs),
                part["labels"],
                data.num_classes,
                config.teacher,
            )
            if train.data_free:
                loss, _, grads = data_free_loss_and_grads(
                    student.apply,
                    state.params,
                    teacher_velocity,
                    factory,
                    part["labels"],
                    part["noise"],
                    jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), part["draws"]),
                    ratio,
                    train,
                )
                return loss, grads
            return jax.value_and_grad(
                lambda params: data_dependent_loss(
                    lambda *inputs: student.apply(params, *inputs),
                    teacher_velocity,
                    factory,
                    part["images"],
                    part["labels"],
                    part["tau"],
                    part["noise"],
                    part["draws"],
                    ratio,
                    train,
                )
            )(state.params)

        whole = {"images": images, "labels": labels, "noise": noise, "draws": draws, "tau": tau}
        loss, grads = accumulate(loss_and_grads, whole, train.microbatches)
        state, metrics = advance(state, grads, loss, optimizer, train.optimizer)
        if train.mixing_steps:
            metrics["teacher_ratio"] = jnp.asarray(ratio)
        return state, metrics

    return step
