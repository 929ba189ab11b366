"""What the methods of a comparison share: the rows of their table, their states and samplers.

All of them train the teacher's network with the student's optimiser and batches. In addition
to its batch, a method gets a dictionary: `teacher`, its parameters, and for regression `pairs`.
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
from piflow_jax.systems.networks import BuiltIn, teacher_network
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
    """A group of settings with others in their places.

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
    """What every objective is made of.

    Attributes:
      network: the network that trains.
      teacher: the teacher's.
      optimizer: the update rule.
      config: the run's settings.
      data: what the data look like.
      draw: of a source that has one, see `Source`.
    """

    network: BuiltIn
    teacher: BuiltIn
    optimizer: optax.GradientTransformation
    config: Config
    data: DataShape
    draw: Draw | None = None

    def guided(self, params: Any, labels: jax.Array) -> Velocity:
        """The guided teacher `(x, t) -> u` of its `params` and of `labels[B]`."""
        null = self.teacher.conditioning.null(self.data, None)
        return guided(self.teacher, self.config.teacher, null).bind(params, labels)

    def bind(self, params: Any, labels: jax.Array) -> Callable[..., jax.Array]:
        """The network `(x, t, ...) -> u` of its `params` and of `labels[B]`."""
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
    del teacher_params
    return TrainState.create(setting.network.init(key), setting.optimizer)


def copy_of_teacher(setting: Setting, key: jax.Array, teacher_params: Any) -> TrainState:
    """The first state of a method whose network starts at the teacher; see `fresh`."""
    module, teacher = setting.network.module, setting.teacher.module
    fresh_params = setting.network.init(key)
    params = student_from_teacher(key, module, fresh_params, teacher_params, teacher=teacher)
    return TrainState.create(params, setting.optimizer)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A row of the table: everything that depends on which method it is.

    A row that is no `Rival` is a student of this package, which pi-ID trains.

    Attributes:
      name: what `config.rivals.methods` calls it.
      title: what tables and pictures call it.
      given: what it learns from besides the batches: nothing, the teacher, or pairs of it.
      settings: the settings that it changes, by dotted key.
      follows: `nfe -> bool`, whether its samples are to be compared with the teacher's endpoints of
        the same noise.
      timed_as: the method whose step takes the same time; empty is itself.
      credit: whether its budget has the teacher's training on top.
      endings: examples of what may stand behind its name, for messages.
      variant: `ending -> row`, None for an ending that there is not.
    """

    name: str
    title: str
    given: Literal["data", "teacher", "pairs"]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    follows: Callable[[int], bool] = lambda nfe: True
    timed_as: str = ""
    credit: bool = False
    endings: tuple[str, ...] = ()
    variant: Callable[[str], "Method | None"] = lambda ending: None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rival(Method):
    """A method with a step of its own.

    Attributes:
      step: makes its step, `(state, given, root_key, batch) -> (state, metrics)`.
      sample: `(network, noise, nfe, warp) -> x_0`, of a network whose parameters and labels are
        bound.
      init: `(setting, key, teacher_params) -> state`, its first state.
      network: makes its network, of which the default is the teacher's.
      nfes: `config -> numbers of evaluations` at which it is compared.
      rate: its learning rate over that of `config.train.optimizer`.
    """

    step: Callable[[Setting], StepFn]
    sample: Callable[[Callable[..., jax.Array], jax.Array, int, TimeWarp], jax.Array]
    init: Callable[[Setting, jax.Array, Any], TrainState] = copy_of_teacher
    network: Callable[[ModelConfig, DataShape], BuiltIn] = teacher_network
    nfes: Callable[[Config], tuple[int, ...]] = lambda config: config.rivals.nfes
    rate: float = 1.0


def gradient_step(loss: Callable[..., jax.Array]) -> Callable[[Setting], StepFn]:
    """What makes a step that follows the gradient of one loss.

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
    """Noise and where the teacher's paths from it end; a pytree.

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
    """Pairs of the teacher, so many in a call.

    Args:
      config: the run's settings; the teacher takes `rivals.pair_steps` Euler steps.
      data: what the data look like.
      key: PRNG key of the noise.
      count: pairs of a call.
      params: the teacher's parameters.
      index: number of the call, a scalar.

    Returns:
      The pairs, of classes in turn. Each depends on its number alone, not on `count`.
    """
    numbers = jnp.asarray(index * count, jnp.uint32) + jnp.arange(count, dtype=jnp.uint32)
    noise = index_noise(index_keys(key, numbers), data.shape)
    labels = (numbers % data.num_classes).astype(jnp.int32)
    sample = Systems.of(config, data).teacher_sampler(config.rivals.pair_steps)
    return Pairs(noise, sample(params, noise, labels), labels)


def rival_setting(
    config: Config,
    data: DataShape,
    rival: Rival,
    constrain: Constrain = unconstrained,
    draw: Draw | None = None,
) -> Setting:
    """Networks and optimiser of a method.

    Args:
      config: the run's settings; `train.steps` and `train.optimizer` are the method's.
      data: what the data look like.
      rival: the method.
      constrain: see `DiT`.
      draw: of a source that has one, see `Source`.

    Returns:
      The setting, its learning rate that of the method.
    """
    rate = rival.rate * config.train.optimizer.learning_rate
    config = changed(config, {"train.optimizer.learning_rate": rate})
    # Forward-mode derivatives, which some take, are not to be had of cuDNN's attention.
    network = rival.network(config.model, data).constrained(constrain)
    network = dataclasses.replace(network, module=network.module.clone(attention=None))
    teacher = teacher_network(config.model, data).constrained(constrain)
    optimizer = make_optimizer(config.train.optimizer, config.train.steps)
    return Setting(network, teacher, optimizer, config, data, draw)


def rival_spec(config: Config, data: DataShape, method: str) -> dict[str, Any]:
    """What a rival's checkpoint says of itself; no student, whose network predicts a policy.

    Args:
      config: the run's settings.
      data: what the data look like.
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
      data: what the data look like.
      rival: the method.
      nfe: evaluations.

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
    """Samples by steps from one level to the next, at levels uniform in raw time.

    Args:
      step: `(x[B, *sites, C], t, r, index) -> x[B, *sites, C]`, from the level `t` to `r`.
      noise: `[B, *sites, C]`, standard normal.
      nfe: steps.
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
    """Samples by `x_0 = x_t - t u(x_t, t)` and fresh noise up to the next level.

    The multistep sampler of consistency models (arXiv 2303.01469, Alg. 1) and of DMD2 (arXiv
    2405.14867, Sec. 4.4).

    Args:
      velocity: `(x[B, *sites, C], t[B]) -> u[B, *sites, C]`; traced once.
      noise: `[B, *sites, C]`, standard normal.
      nfe: evaluations, at levels uniform in raw time.
      warp: raw time to noise level.
      key: typed PRNG keys `[B]` of the fresh noise, one for each sample. By default they are made
        of the sample's own first noise, so that it depends on nothing but the sample.

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
