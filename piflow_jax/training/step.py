"""Train steps: pure functions of state and batch, one jit each."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from piflow_jax.config import Config, OptimizerConfig
from piflow_jax.data.latents import draw_latents
from piflow_jax.flow.schedule import TimeWarp
from piflow_jax.training.conditions import conditions, null_conditions
from piflow_jax.training.networks import DataShape, Network, with_base
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

__all__ = [
    "accumulate",
    "advance",
    "distill_step",
    "images_of",
    "teacher_step",
]

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
    """What the networks see, `[B, H, W, C]`: images or latents, or a draw from a posterior."""
    for name in ("image", "latents"):
        if name in batch:
            return batch[name].astype(jnp.promote_types(batch[name].dtype, jnp.float32))
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
    parts = jax.tree.map(
        lambda a: jnp.swapaxes(a.reshape(len(a) // count, count, *a.shape[1:]), 0, 1), batch
    )
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


def _samples_like(batch, data: DataShape) -> jax.ShapeDtypeStruct:
    """Shape `(B, H, W, C)` and dtype of a batch's samples, which need not be in it."""
    if "canvas" in batch:
        canvas = batch["canvas"]
        return jax.ShapeDtypeStruct((*canvas.shape[:-1], data.channels), canvas.dtype)
    return jax.eval_shape(lambda batch: images_of(batch, jax.random.key(0), data), batch)


def teacher_step(
    module: Network,
    optimizer: optax.GradientTransformation,
    config: Config,
    data: DataShape,
    null: Mapping[str, jax.Array] | None = None,
) -> StepFn:
    """The flow-matching step of the teacher.

    Args:
      module: the teacher's module, with a velocity head.
      optimizer: its optimiser.
      config: the run's settings.
      data: what the data look like.
      null: of captions, the example of the empty one.

    Returns:
      `(state, root_key, batch) -> (state, metrics)`, to be jitted with the state donated. `batch`
      has `image[B, H, W, C]`, `latents`, or `mean` and `std` of latents, and what `conditions`
      takes.
    """
    settings = config.teacher

    def step(state: TrainState, root: jax.Array, batch):
        key = jax.random.fold_in(root, state.step)

        def loss_fn(params):
            return flow_matching_loss(
                lambda x, sigma, told: module.apply(params, x, sigma, **told),
                key,
                images_of(batch, key, data),
                conditions(config.model, batch),
                null_conditions(config.model, data.num_classes, null),
                settings.label_dropout,
                TimeWarp(config.train.shift),
            )

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        return advance(state, grads, loss, optimizer, settings.optimizer)

    return step


def distill_step(
    student: Network,
    teacher: Network,
    optimizer: optax.GradientTransformation,
    config: Config,
    data: DataShape,
    null: Mapping[str, jax.Array] | None = None,
) -> StepFn:
    """The pi-ID step of the student.

    A student with adapters has its teacher's parameters as its base: they are one argument of the
    step, used by both, and the state holds nothing of their size.

    Args:
      student: the student's module, with a policy head.
      teacher: the teacher's module, with a velocity head.
      optimizer: the student's optimiser.
      config: the run's settings.
      data: what the data look like.
      null: of captions, the example of the empty one; needed for guidance only.

    Returns:
      `(state, teacher_params, root_key, batch) -> (state, metrics)`, to be jitted with the state
      donated and the teacher's parameters not. A batch of captions without latents says by an
      empty array `canvas[B, H, W, 0]` what their size is.
    """
    train = config.train
    factory = make_policy_factory(config.policy, train)
    components = 0 if config.policy.kind == "dx" else config.policy.num_components
    dropout = config.model.network != "dit" and config.model.lora_dropout > 0

    def step(state: TrainState, teacher_params, root: jax.Array, batch):
        keys = jax.random.split(jax.random.fold_in(root, state.step), 3)
        like = _samples_like(batch, data)
        size = like.shape[0]
        ratio = teacher_ratio(state.step, train.mixing_steps)
        noise = jax.random.normal(keys[0], like.shape, like.dtype)

        def sample(key):
            return sample_draws(key, size, train.num_states, components, dropout)

        if train.data_free:
            draws = jax.vmap(sample)(jax.random.split(keys[1], train.nfe))
            # Segments are the leading axis; microbatches are taken from the one behind it.
            draws = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), draws)
        else:
            draws = sample(keys[1])
        tau = 1 - jax.random.uniform(keys[2], (size,))  # in (0, 1]

        def student_fn(params, x, sigma, told, key=None):
            params = with_base(student, params, teacher_params)
            rngs = None if key is None else {"dropout": key}
            return student.apply(params, x, sigma, **told, rngs=rngs)

        def loss_and_grads(part):
            guided = config.teacher.guidance_scale != 1
            teacher_velocity = guided_teacher(
                lambda x, sigma, told: teacher.apply(teacher_params, x, sigma, **told),
                part["conditions"],
                null_conditions(config.model, data.num_classes, null) if guided else None,
                config.teacher,
            )
            if train.data_free:
                loss, _, grads = data_free_loss_and_grads(
                    student_fn,
                    state.params,
                    teacher_velocity,
                    factory,
                    part["conditions"],
                    part["noise"],
                    jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), part["draws"]),
                    ratio,
                    train,
                )
                return loss, grads
            return jax.value_and_grad(
                lambda params: data_dependent_loss(
                    lambda *inputs, **options: student_fn(params, *inputs, **options),
                    teacher_velocity,
                    factory,
                    part["images"],
                    part["conditions"],
                    part["tau"],
                    part["noise"],
                    part["draws"],
                    ratio,
                    train,
                )
            )(state.params)

        whole = {
            "conditions": conditions(config.model, batch),
            "noise": noise,
            "draws": draws,
            "tau": tau,
        }
        if not train.data_free:
            whole["images"] = images_of(batch, keys[0], data)
        loss, grads = accumulate(loss_and_grads, whole, train.microbatches)
        state, metrics = advance(state, grads, loss, optimizer, train.optimizer)
        if train.mixing_steps:
            metrics["teacher_ratio"] = jnp.asarray(ratio)
        return state, metrics

    return step
