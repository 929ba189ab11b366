"""Parts shared by the methods of a comparison: the rows of their table, states and samplers.

All methods train the teacher's network with the student's optimiser and batches. In addition to its
batch, a method gets a dictionary: `teacher`, the teacher's parameters, and for regression `pairs`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import optax

from piflow_jax.config import Config, ModelConfig
from piflow_jax.flow.policies.base import per_sample
from piflow_jax.flow.schedule import TimeWarp, sampling_times
from piflow_jax.keys import folded_noise, index_keys, index_noise, seed_key
from piflow_jax.models import student_from_teacher
from piflow_jax.models.blocks import Constrain, unconstrained
from piflow_jax.systems.assembly import Systems, guided
from piflow_jax.systems.built_in import BuiltIn
from piflow_jax.systems.networks import teacher_network
from piflow_jax.systems.shapes import DataShape
from piflow_jax.systems.spec import teacher_spec
from piflow_jax.training.optimizer import make_optimizer
from piflow_jax.training.state import TrainState
from piflow_jax.training.step import Draw, StepFn, advance, states_of

__all__ = [
    "Method",
    "Pairs",
    "Rival",
    "Setting",
    "changed",
    "copy_of_teacher",
    "descend",
    "endpoint_pairs",
    "fresh",
    "gradient_step",
    "interpolate",
    "renoised_sample",
    "rival_sampler",
    "rival_setting",
    "rival_spec",
]

Velocity = Callable[[jax.Array, jax.Array], jax.Array]
"""`(x[B, *sites, C], t[B]) -> u[B, *sites, C]`."""


def changed(config: Any, settings: Mapping[str, Any]) -> Any:
    """A group of settings with some of them replaced.

    Args:
      config: the group, such as the run's `Config`.
      settings: values by dotted key.

    Returns:
      The group.
    """
    for key, value in settings.items():
        name, _, rest = key.partition(".")
        new = changed(getattr(config, name), {rest: value}) if rest else value
        config = dataclasses.replace(config, **{name: new})
    return config


@dataclasses.dataclass(frozen=True)
class Setting:
    """The inputs of every objective.

    Attributes:
      network: the network in training.
      teacher: the teacher's network.
      optimizer: the update rule.
      config: the run's settings.
      data: shape and conditions of the data.
      draw: draws states, for a source that has it, see `Source`.
    """

    network: BuiltIn
    teacher: BuiltIn
    optimizer: optax.GradientTransformation
    config: Config
    data: DataShape
    draw: Draw | None = None

    def guided(self, params: Any, labels: jax.Array) -> Velocity:
        """The guided teacher `(x, t) -> u` for its `params` and `labels[B]`."""
        null = self.teacher.conditioning.null(self.data, None)
        return guided(self.teacher, self.config.teacher, null).bind(params, labels)

    def bind(self, params: Any, labels: jax.Array) -> Callable[..., jax.Array]:
        """The network `(x, t, ...) -> u` for its `params` and `labels[B]`."""
        return lambda x, t, *others: self.network.module.apply(params, x, t, labels, *others)


def fresh(setting: Setting, key: jax.Array, teacher_params: Any) -> TrainState:
    """The first state of a method that starts from scratch.

    Args:
      setting: networks and optimiser.
      key: PRNG key.
      teacher_params: the teacher's parameters; unused.

    Returns:
      The state.
    """
    return TrainState.create(setting.network.init(key), setting.optimizer)


def copy_of_teacher(setting: Setting, key: jax.Array, teacher_params: Any) -> TrainState:
    """The first state of a method whose network starts at the teacher; see `fresh`."""
    module, teacher = setting.network.module, setting.teacher.module
    fresh_params = setting.network.init(key)
    params = student_from_teacher(key, module, fresh_params, teacher_params, teacher=teacher)
    return TrainState.create(params, setting.optimizer)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A row of the table: everything that depends on the method.

    A row that is not a `Rival` is a student of this package, trained by pi-ID.

    Attributes:
      name: its name in `config.rivals.methods`.
      title: its name in tables and pictures.
      given: its inputs in addition to the batches: nothing, the teacher, or the teacher's pairs.
      settings: changes to the settings, by dotted key.
      follows: `nfe -> bool`, whether to compare its samples with the teacher's endpoints from the
        same noise.
      timed_as: another method with the same time per step; empty means itself.
      credit: whether its budget also includes the teacher's training.
      rate: its learning rate divided by that of `config.train.optimizer`.
      endings: examples of endings of its name, for messages.
      variant: `ending -> row`, None for an unknown ending.
    """

    name: str
    title: str
    given: Literal["data", "teacher", "pairs"]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    follows: Callable[[int], bool] = lambda nfe: True
    timed_as: str = ""
    credit: bool = False
    rate: float = 1.0
    endings: tuple[str, ...] = ()
    variant: Callable[[str], "Method | None"] = lambda ending: None

    def configured(self, config: Config) -> Config:
        """The run's settings `config`, changed to the method's own settings and learning rate."""
        rate = self.rate * config.train.optimizer.learning_rate
        return changed(config, {**self.settings, "train.optimizer.learning_rate": rate})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rival(Method):
    """A method with its own training step.

    Attributes:
      step: makes its step, `(state, given, root_key, batch) -> (state, metrics)`.
      sample: `(network, noise, nfe, warp) -> x_0`, for a network with bound parameters and labels.
      init: `(setting, key, teacher_params) -> state`, its first state.
      network: makes its network; the default is the teacher's network.
      nfes: `config -> numbers of evaluations` for the comparison.
    """

    step: Callable[[Setting], StepFn]
    sample: Callable[[Callable[..., jax.Array], jax.Array, int, TimeWarp], jax.Array]
    init: Callable[[Setting, jax.Array, Any], TrainState] = copy_of_teacher
    network: Callable[[ModelConfig, DataShape], BuiltIn] = teacher_network
    nfes: Callable[[Config], tuple[int, ...]] = lambda config: config.rivals.nfes


def gradient_step(loss: Callable[..., jax.Array]) -> Callable[[Setting], StepFn]:
    """Makes the maker of a step that follows the gradient of one loss.

    Args:
      loss: `(setting, params, state, given, key, x0[B, H, W, C], labels[B]) -> loss`.

    Returns:
      The maker of the step.
    """

    def make(setting: Setting) -> StepFn:
        def step(state: TrainState, given, root: jax.Array, batch):
            image_key, key = jax.random.split(jax.random.fold_in(root, state.step))
            x0 = states_of(batch["x"], image_key, setting.draw)
            value, grads = jax.value_and_grad(functools.partial(loss, setting))(
                state.params, state, given, key, x0, batch["condition"]
            )
            return advance(state, grads, value, setting.optimizer, setting.config.train.optimizer)

        return step

    return make


def interpolate(x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
    """States `[B, *sites, C]` between `x0[B, *sites, C]` and `noise[B, *sites, C]` at `t[B]`."""
    level = per_sample(t, x0.ndim)
    return (1 - level) * x0 + level * noise


@flax.struct.dataclass
class Pairs:
    """Noise and the endpoints of the teacher's paths from it; a pytree.

    Attributes:
      noise: `[N, H, W, C]`.
      endpoints: `[N, H, W, C]`.
      labels: `[N]`.
    """

    noise: jax.Array
    endpoints: jax.Array
    labels: jax.Array


def endpoint_pairs(
    config: Config, data: DataShape, key: jax.Array, count: int, params: Any, index: jax.Array
) -> Pairs:
    """Makes `count` pairs of the teacher in one call.

    Args:
      config: the run's settings; the teacher takes `rivals.pair_steps` Euler steps.
      data: shape and conditions of the data.
      key: PRNG key of the noise.
      count: pairs per call.
      params: the teacher's parameters.
      index: number of the call, a scalar.

    Returns:
      The pairs, cycling through the classes. Each depends on its number alone, not on `count`.
    """
    numbers = jnp.asarray(index * count, jnp.uint32) + jnp.arange(count, dtype=jnp.uint32)
    noise = index_noise(index_keys(key, numbers), data.shape)
    labels = (numbers % data.num_classes).astype(jnp.int32)
    sample = Systems.of(config, data).teacher_sampler(config.rivals.pair_steps, "euler")
    return Pairs(noise, sample(params, noise, labels), labels)


def rival_setting(
    config: Config,
    data: DataShape,
    rival: Rival,
    constrain: Constrain = unconstrained,
    draw: Draw | None = None,
) -> Setting:
    """Builds networks and optimiser of a method.

    Args:
      config: the run's settings, as `rival.configured` returns them.
      data: shape and conditions of the data.
      rival: the method.
      constrain: see `DiT`.
      draw: draws states, for a source that has it, see `Source`.

    Returns:
      The setting.
    """
    # Some methods take forward-mode derivatives, which cuDNN's attention does not have.
    network = rival.network(config.model, data).constrained(constrain)
    network = dataclasses.replace(network, module=network.module.clone(attention=None))
    teacher = teacher_network(config.model, data).constrained(constrain)
    optimizer = make_optimizer(config.train.optimizer, config.train.steps)
    return Setting(network, teacher, optimizer, config, data, draw)


def rival_spec(config: Config, data: DataShape, method: str) -> dict[str, Any]:
    """The spec of a rival's checkpoint; it is not a student, whose network predicts a policy.

    Args:
      config: the run's settings.
      data: shape and conditions of the data.
      method: the method's name.

    Returns:
      The spec.
    """
    own = {"kind": "rival", "method": method, "train.shift": config.train.shift}
    return teacher_spec(config, data) | own


def rival_sampler(config: Config, data: DataShape, rival: Rival, nfe: int) -> Callable:
    """A method's sampler, `(params, noise[B, H, W, C], labels[B]) -> x_0[B, H, W, C]`.

    Args:
      config: the run's settings.
      data: shape and conditions of the data.
      rival: the method.
      nfe: network evaluations.

    Returns:
      The sampler.
    """
    module = rival.network(config.model, data).module

    def sample(params, noise, labels):
        def network(x, t, *others):
            return module.apply(params, x, t, labels, *others)

        return rival.sample(network, noise, nfe, TimeWarp(config.train.shift))

    return sample


def descend(
    step: Callable[..., jax.Array], noise: jax.Array, nfe: int, warp: TimeWarp
) -> jax.Array:
    """Samples in steps from one level to the next, at levels uniform in raw time.

    Args:
      step: `(x[B, *sites, C], t, r, index) -> x[B, *sites, C]`, from the level `t` to `r`.
      noise: `[B, *sites, C]`, standard normal.
      nfe: number of steps.
      warp: raw time to noise level.

    Returns:
      `x_0[B, *sites, C]`.
    """
    times = sampling_times(nfe, warp)
    levels = [jnp.asarray(level, noise.dtype) for level in (times.src, times.to)]
    scanned = (*levels, jnp.arange(nfe))
    return jax.lax.scan(lambda x, inputs: (step(x, *inputs), None), noise, scanned)[0]


def renoised_sample(
    velocity: Velocity, noise: jax.Array, nfe: int, warp: TimeWarp, key: jax.Array | None = None
) -> jax.Array:
    """Samples by `x_0 = x_t - t u(x_t, t)`, with fresh noise up to the next level.

    This is the multistep sampler of consistency models (arXiv 2303.01469, Alg. 1) and of DMD2
    (arXiv 2405.14867, Sec. 4.4).

    Args:
      velocity: `(x[B, *sites, C], t[B]) -> u[B, *sites, C]`; traced once.
      noise: `[B, *sites, C]`, standard normal.
      nfe: network evaluations, at levels uniform in raw time.
      warp: raw time to noise level.
      key: typed PRNG keys `[B]` of the fresh noise, one per sample. By default they are derived
        from the sample's own first noise, so that it depends on nothing but the sample.

    Returns:
      `x_0[B, *sites, C]`.

    Raises:
      ValueError: if `nfe` is below 1.
    """
    keys = _own_keys(noise) if key is None else key

    def step(x, t, r, index):
        x0 = x - t * velocity(x, jnp.full(x.shape[:1], t))
        return (1 - r) * x0 + r * folded_noise(keys, index, x.shape, x.dtype)

    return descend(step, noise, nfe, warp)


def _own_keys(noise: jax.Array) -> jax.Array:
    numbers = noise.reshape(noise.shape[0], -1)[:, :2].astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(numbers, jnp.uint32)
    root = seed_key(0)
    return jax.vmap(lambda b: jax.random.fold_in(jax.random.fold_in(root, b[0]), b[1]))(bits)
