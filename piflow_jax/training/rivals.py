"""The rivals' steps and samplers: a table of objectives by name, over the networks of the student.

All of them train the teacher's network with the student's optimiser and batches. What a method is
given beside its batch is a dictionary: `teacher`, its parameters, and for regression `pairs`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from piflow_jax.config import Config
from piflow_jax.flow import rivals
from piflow_jax.flow.policies.base import per_sample
from piflow_jax.flow.sampling import ode_sample
from piflow_jax.flow.schedule import TimeWarp
from piflow_jax.models import DiT, student_from_teacher
from piflow_jax.models.dit import unconstrained
from piflow_jax.training.networks import DataShape, init_params, rival_network, teacher_network
from piflow_jax.training.objectives import flow_matching_loss, guided_teacher
from piflow_jax.training.optimizer import make_optimizer
from piflow_jax.training.state import TrainState
from piflow_jax.training.step import StepFn, advance, images_of

__all__ = [
    "RIVALS",
    "Pairs",
    "Rival",
    "endpoint_pairs",
    "rival_init",
    "rival_sampler",
    "rival_setting",
]

# Shortest step of the shortcut models, and the share of a batch that bootstraps (their Sec. 4).
SHORTCUT_STEPS = 128
BOOTSTRAP_SHARE = 4
# Noise levels at which DMD2 compares scores: at the ends one of them says nothing.
MATCHED_LEVELS = (0.02, 0.98)
# Share of the training over which the consistency tangent warms up.
WARMUP_SHARE = 0.25


@dataclasses.dataclass(frozen=True)
class Setting:
    """What every objective is made of.

    Attributes:
      module: the network that trains.
      teacher: the teacher's.
      optimizer: the update rule.
      config: the run's settings.
      data: what the data look like.
    """

    module: DiT
    teacher: DiT
    optimizer: optax.GradientTransformation
    config: Config
    data: DataShape

    def velocity_of_teacher(self, params, labels: jax.Array) -> Callable:
        """The guided teacher, `(x, t) -> u`."""
        return guided_teacher(
            lambda *inputs: self.teacher.apply(params, *inputs),
            labels,
            self.data.num_classes,
            self.config.teacher,
        )

    def bind(self, params, labels: jax.Array) -> Callable:
        """The network with its parameters and labels, `(x, t, ...) -> u`."""
        return lambda x, t, *second: self.module.apply(params, x, t, labels, *second)

    @property
    def fake_optimizer(self) -> optax.GradientTransformation:
        """The update rule of a network that follows the student, at a constant rate."""
        settings = dataclasses.replace(self.config.train.optimizer, decay="constant")
        return make_optimizer(settings, self.config.train.steps)


Loss = Callable[..., jax.Array]
"""`(setting, params, state, given, key, x0, labels) -> loss`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rival:
    """A method.

    Attributes:
      step: makes its step, `(state, given, root_key, batch) -> (state, metrics)`.
      given: what it learns from beside the data: nothing, the teacher, or pairs of it.
      two_times: whether its network takes the length of a step besides the time.
      sampler: `jump` along the flow, or `renoise` between evaluations.
      one_step: whether it is defined for one evaluation only.
      fake: whether a network of the student's own distribution trains beside it.
      rate: its learning rate over that of `config.train.optimizer`.
    """

    step: Callable[[Setting], StepFn]
    given: Literal["data", "teacher", "pairs"]
    two_times: bool = False
    sampler: Literal["jump", "renoise"] = "jump"
    one_step: bool = False
    fake: bool = False
    rate: float = 1.0


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Noise and where the teacher's paths from it end; a pytree.

    Attributes:
      noise: `[N, H, W, C]`.
      endpoints: `[N, H, W, C]`.
      labels: `[N]`.
    """

    noise: jax.Array
    endpoints: jax.Array
    labels: jax.Array


jax.tree_util.register_dataclass(Pairs, ["noise", "endpoints", "labels"], [])


def endpoint_pairs(
    setting: Setting, params, key: jax.Array, count: int, steps: int
) -> Callable[[jax.Array], Pairs]:
    """How pairs are made, so many in a call: `index of the call -> Pairs`, to be jitted.

    Args:
      setting: the teacher's network and guidance.
      params: its parameters.
      key: PRNG key of noise and labels.
      count: pairs of a call.
      steps: Euler steps of the teacher.

    Returns:
      The function of the number of the call.
    """

    def make(index):
        noise_key, label_key = jax.random.split(jax.random.fold_in(key, index))
        noise = jax.random.normal(noise_key, (count, *setting.data.shape))
        labels = jax.random.randint(label_key, (count,), 0, setting.data.num_classes)
        velocity = setting.velocity_of_teacher(params, labels)
        ends = ode_sample(velocity, noise, steps, TimeWarp(setting.config.train.shift))
        return Pairs(noise, ends, labels)

    return make


def _step_of(loss: Loss) -> Callable[[Setting], StepFn]:
    """A step that follows the gradient of one loss."""

    def make(setting: Setting) -> StepFn:
        def step(state: TrainState, given, root: jax.Array, batch):
            image_key, key = jax.random.split(jax.random.fold_in(root, state.step))
            x0 = images_of(batch, image_key, setting.data)
            value, grads = jax.value_and_grad(functools.partial(loss, setting))(
                state.params, state, given, key, x0, batch["label"]
            )
            return advance(state, grads, value, setting.optimizer, setting.config.train.optimizer)

        return step

    return make


def _interpolate(x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
    level = per_sample(t, x0.ndim)
    return (1 - level) * x0 + level * noise


def _drop(setting: Setting, key: jax.Array, labels: jax.Array) -> jax.Array:
    """Labels with the teacher's share of null labels, for methods that build guidance in."""
    dropped = jax.random.bernoulli(key, setting.config.teacher.label_dropout, labels.shape)
    return jnp.where(dropped, setting.data.num_classes, labels)


def _guided(setting, network, null, x, t, velocity, labels):
    """The conditional velocity with guidance built in, as the settings of the teacher have it."""
    guidance = setting.config.teacher
    if guidance.guidance_scale == 1:
        return velocity
    zero = jnp.zeros_like(t)
    low, high = guidance.guidance_interval
    inside = (t >= low) & (t <= high) & (labels != setting.data.num_classes)
    omega = jnp.where(inside, guidance.guidance_scale, 1.0)
    return rivals.guided_target(velocity, network(x, t, zero), null(x, t, zero), omega)


def _meanflow(setting: Setting, params, state, given, key, x0, labels):
    del state, given
    time_key, noise_key, label_key = jax.random.split(key, 3)
    t, r = rivals.meanflow_times(time_key, x0.shape[0])
    noise = jax.random.normal(noise_key, x0.shape, x0.dtype)
    x = _interpolate(x0, noise, t)
    labels = _drop(setting, label_key, labels)
    network = setting.bind(params, labels)
    null = setting.bind(params, jnp.full_like(labels, setting.data.num_classes))
    velocity = _guided(setting, network, null, x, t, noise - x0, labels)
    return rivals.meanflow_loss(network, x, velocity, t, r)[0]


def _step_code(d: jax.Array) -> jax.Array:
    """A length of step as the network sees it: its logarithm, from 1 / 8 to 1, and 0 for 0."""
    levels = SHORTCUT_STEPS.bit_length()
    code = (jnp.log2(jnp.maximum(d, 1e-9) * SHORTCUT_STEPS) + 1) / levels
    return jnp.where(d > 0, code, 0)


def _shortcut(setting: Setting, params, state, given, key, x0, labels):
    del given
    keys = jax.random.split(key, 4)
    batch = x0.shape[0]
    boot = max(batch // BOOTSTRAP_SHARE, 1)
    t_boot, d_boot = rivals.shortcut_steps(keys[0], boot, SHORTCUT_STEPS)
    t = jnp.concatenate([t_boot, jax.random.uniform(keys[1], (batch - boot,))])
    noise = jax.random.normal(keys[2], x0.shape, x0.dtype)
    x = _interpolate(x0, noise, t)

    def averaged(labels):
        return lambda x, t, d: setting.bind(state.ema_params, labels)(x, t, _step_code(d))

    dropped = _drop(setting, keys[3], labels)
    null = averaged(jnp.full_like(labels, setting.data.num_classes))
    velocity = _guided(setting, averaged(dropped), null, x, t, noise - x0, dropped)
    # Longer steps are taught with their labels: the flow beneath has the guidance built in.
    labels = jnp.concatenate([labels[:boot], dropped[boot:]])
    target = rivals.shortcut_target(
        averaged(labels[:boot]), x[:boot], t_boot, d_boot, SHORTCUT_STEPS
    )
    target = jnp.concatenate([target, velocity[boot:]])
    steps = jnp.concatenate([2 * d_boot, jnp.zeros((batch - boot,))])
    prediction = setting.bind(params, labels)(x, t, _step_code(steps))
    return jnp.mean(jnp.square(prediction - target))


def _consistency(setting: Setting, params, state, given, key, x0, labels):
    time_key, noise_key = jax.random.split(key)
    angle = rivals.consistency_times(time_key, x0.shape[0])
    noise = jax.random.normal(noise_key, x0.shape, x0.dtype)
    cosine, sine = (per_sample(f(angle), x0.ndim) for f in (jnp.cos, jnp.sin))
    warmup = jnp.minimum(state.step / (WARMUP_SHARE * setting.config.train.steps), 1.0)
    loss, _ = rivals.consistency_loss(
        rivals.trigflow(setting.bind(params, labels)),
        rivals.trigflow(setting.velocity_of_teacher(given["teacher"], labels)),
        cosine * x0 + sine * noise,
        angle,
        warmup,
    )
    return loss


def _regression(setting: Setting, params, state, given, key, x0, labels, *, straight: bool):
    """Reflow over all times, or at the noise alone."""
    del state, labels
    index_key, time_key = jax.random.split(key)
    pairs, batch = given["pairs"], x0.shape[0]
    index = jax.random.randint(index_key, (batch,), 0, pairs.labels.shape[0])
    picked = jax.tree.map(lambda a: a[index], pairs)
    t = jax.random.uniform(time_key, (batch,)) if straight else jnp.ones((batch,))
    return rivals.reflow_loss(
        setting.bind(params, picked.labels), picked.noise, picked.endpoints, t
    )


def _distribution_matching_step(setting: Setting) -> StepFn:
    """DMD2: one update of the student, then several of the network of its distribution."""
    config, data = setting.config, setting.data
    settings, fake_optimizer = config.train.optimizer, setting.fake_optimizer

    def generate(params, key, labels, shape):
        noise_key, walk_key = jax.random.split(key)
        generator = setting.bind(params, labels)
        noise = jax.random.normal(noise_key, shape)
        x, t = rivals.backward_simulation(generator, walk_key, noise, config.rivals.nfes)
        return x - per_sample(t, x.ndim) * generator(x, t)

    def step(state: TrainState, given, root: jax.Array, batch):
        labels, shape = batch["label"], (batch["label"].shape[0], *data.shape)
        keys = jax.random.split(
            jax.random.fold_in(root, state.step), 1 + config.rivals.fake_updates
        )
        fake_params = state.params["fake"]

        def student_loss(params):
            keys_ = jax.random.split(keys[0], 3)
            generated = generate(params, keys_[0], labels, shape)
            low, high = MATCHED_LEVELS
            t = jax.random.uniform(keys_[1], shape[:1], minval=low, maxval=high)
            loss, _ = rivals.distribution_matching_loss(
                generated,
                setting.velocity_of_teacher(given["teacher"], labels),
                setting.bind(fake_params, labels),
                jax.random.normal(keys_[2], shape),
                t,
            )
            return loss

        loss, grads = jax.value_and_grad(student_loss)(state.params["student"])
        student = TrainState(
            state.step, state.params["student"], state.ema_params, state.opt_state["student"]
        )
        student, metrics = advance(student, grads, loss, setting.optimizer, settings)

        def follow(carry, key):
            params, opt_state = carry
            sample_key, loss_key = jax.random.split(key)
            x0 = jax.lax.stop_gradient(generate(student.params, sample_key, labels, shape))

            def fake_loss(params):
                network = setting.teacher.apply
                return flow_matching_loss(
                    lambda *inputs: network(params, *inputs),
                    loss_key,
                    x0,
                    labels,
                    data.num_classes,
                    0.0,
                    TimeWarp(),
                )

            loss, grads = jax.value_and_grad(fake_loss)(params)
            updates, opt_state = fake_optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), loss

        (fake, fake_state), losses = jax.lax.scan(
            follow, (fake_params, state.opt_state["fake"]), keys[1:]
        )
        state = TrainState(
            student.step,
            {"student": student.params, "fake": fake},
            student.ema_params,
            {"student": student.opt_state, "fake": fake_state},
        )
        return state, metrics | {"fake_loss": jnp.mean(losses)}

    return step


RIVALS: dict[str, Rival] = {
    "meanflow": Rival(step=_step_of(_meanflow), given="data", two_times=True),
    "shortcut": Rival(step=_step_of(_shortcut), given="data", two_times=True),
    "consistency": Rival(step=_step_of(_consistency), given="teacher", sampler="renoise", rate=0.3),
    "reflow": Rival(step=_step_of(functools.partial(_regression, straight=True)), given="pairs"),
    "regression": Rival(
        step=_step_of(functools.partial(_regression, straight=False)),
        given="pairs",
        one_step=True,
    ),
    "dmd": Rival(
        step=_distribution_matching_step, given="teacher", sampler="renoise", fake=True, rate=0.1
    ),
}


def rival_init(setting: Setting, rival: Rival, key: jax.Array, teacher_params: Any) -> TrainState:
    """The first state: fresh, or a copy of the teacher where the method starts there.

    Args:
      setting: networks and optimiser.
      rival: the method.
      key: PRNG key.
      teacher_params: the teacher's; not used by methods that start from scratch.

    Returns:
      The state; with a `fake` network, parameters and moments are dictionaries of both.
    """
    params = init_params(setting.module, key)
    if rival.given == "data":
        return TrainState.create(params, setting.optimizer)
    params = student_from_teacher(
        key, setting.module, params, teacher_params, teacher=setting.teacher
    )
    state = TrainState.create(params, setting.optimizer)
    if not rival.fake:
        return state
    return state.replace(
        params={"student": params, "fake": jax.tree.map(jnp.copy, params)},
        opt_state={"student": state.opt_state, "fake": setting.fake_optimizer.init(params)},
    )


def rival_setting(
    config: Config, data: DataShape, rival: Rival, constrain: Callable = unconstrained
) -> Setting:
    """Networks and optimiser of a method.

    Args:
      config: the run's settings; `train.steps` and `train.optimizer` are the method's.
      data: what the data look like.
      rival: the method.
      constrain: see `DiT`.

    Returns:
      The setting, its learning rate that of the method.
    """
    settings = config.train.optimizer
    settings = dataclasses.replace(settings, learning_rate=rival.rate * settings.learning_rate)
    config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, optimizer=settings)
    )
    # Forward-mode derivatives, which some take, are not to be had of cuDNN's attention.
    module = rival_network(config.model, data, two_times=rival.two_times).clone(attention=None)
    teacher = teacher_network(config.model, data)
    return Setting(
        module.clone(constrain=constrain),
        teacher.clone(constrain=constrain),
        make_optimizer(settings, config.train.steps),
        config,
        data,
    )


def rival_sampler(config: Config, data: DataShape, method: str, nfe: int) -> Callable:
    """A method's sampler, `(params, noise[B, H, W, C], labels[B]) -> x_0[B, H, W, C]`.

    Fresh noise between evaluations is drawn by keys that are made of the sample's own first noise:
    it depends on nothing but the sample.

    Args:
      config: the run's settings.
      data: what the data look like.
      method: a key of `RIVALS`.
      nfe: evaluations.

    Returns:
      The sampler.
    """
    rival = RIVALS[method]
    module = rival_network(config.model, data, two_times=rival.two_times)
    # DMD2 and shortcut models are trained at levels uniform in t.
    warp = TimeWarp() if method in ("dmd", "shortcut") else TimeWarp(config.train.shift)
    code = _step_code if method == "shortcut" else (lambda d: d)

    def sample(params, noise, labels):
        def velocity(x, t, d=None):
            second = () if d is None or not rival.two_times else (code(d),)
            return module.apply(params, x, t, labels, *second)

        if rival.sampler == "jump":
            return rivals.flow_map_sample(velocity, noise, nfe, warp)
        return rivals.renoised_sample(velocity, noise, nfe, warp, _own_keys(noise))

    return sample


def _own_keys(noise: jax.Array) -> jax.Array:
    numbers = noise.reshape(noise.shape[0], -1)[:, :2].astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(numbers, jnp.uint32)
    root = jax.random.key(0)
    return jax.vmap(lambda b: jax.random.fold_in(jax.random.fold_in(root, b[0]), b[1]))(bits)
