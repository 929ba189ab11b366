"""Parts shared by methods that learn mean velocities `u(x_t, t, t - r)` from data alone.

Their network takes the length of a step in addition to the time. It learns velocities with guidance
built in (MeanFlow, arXiv 2505.13447, Sec. 4.2) and samples by jumps along the flow.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from piflow_jax.config import ModelConfig
from piflow_jax.flow.policies.base import per_sample
from piflow_jax.flow.schedule import TimeWarp
from piflow_jax.models import DiT
from piflow_jax.rivals.base import Rival, Setting, descend, fresh, interpolate
from piflow_jax.systems.built_in import BuiltIn
from piflow_jax.systems.networks import teacher_network
from piflow_jax.systems.shapes import DataShape

__all__ = [
    "TwoTimes",
    "flow_map_rival",
    "flow_map_sample",
    "flow_states",
    "guided_target",
    "two_times",
]

MeanVelocity = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""`(x[B, *sites, C], t[B], t - r [B]) -> u[B, *sites, C]`, mean velocity from `t` down to `r`."""


class TwoTimes(DiT):
    """A DiT that takes a second time in addition to `t`.

    The second time has an embedder of its own. The output of this embedder is added to that of the
    first (MeanFlow, arXiv 2505.13447; shortcut models, arXiv 2410.12557). Nothing else differs.
    """

    @nn.compact
    def __call__(
        self, x: jax.Array, t: jax.Array, labels: jax.Array, second: jax.Array
    ) -> jax.Array:
        """Evaluates the network.

        Args:
            x: `[B, H, W, C]` states, see `DiT`.
            t: `[B]` times in [0, 1], 1 is noise.
            labels: `[B]` integers in `[0, num_classes]`.
            second: `[B]` second times in [0, 1].

        Returns:
            The head's output, `u[B, H, W, C]` or another shape, see `DiT`.

        Raises:
            ValueError: A shape or a size is not valid.
        """
        if second.shape != t.shape:
            raise ValueError(f"second {second.shape} must have the shape of t, {t.shape}")
        time = self.embed_time(t) + self.embed_time(second, "second_time")
        return self.predict(x, t, labels, time)

    def example(self, batch: int = 1) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes of the inputs in training, for `batch` examples; see `DiT`."""
        x, t, labels = super().example(batch)
        return x, t, labels, t


def two_times(model: ModelConfig, data: DataShape) -> BuiltIn:
    """The teacher's network with a second time, and without a factor of its times.

    Args:
      model: the network's settings.
      data: shape and conditions of the data.

    Returns:
      The network.
    """
    network = teacher_network(model, data)
    plain = network.module
    names = [field.name for field in dataclasses.fields(plain) if field.name != "parent"]
    module = TwoTimes(**{name: getattr(plain, name) for name in names})
    # MeanFlow's target has the network's derivative by time, which a factor would make rough.
    module = module.clone(time_scale=1.0)
    return dataclasses.replace(network, module=module)


def guided_target(
    velocity: jax.Array,
    cond: jax.Array,
    uncond: jax.Array,
    omega: float | jax.Array,
    kappa: float | jax.Array = 0.0,
) -> jax.Array:
    """Velocity with built-in guidance, which replaces the conditional one (Sec. 4.2 and App. B.1).

    `omega v + kappa u_c + (1 - omega - kappa) u_u`, with the network's own velocities at `r = t`.
    The resulting guidance scale is `omega / (1 - kappa)`. It costs no evaluations in sampling.

    Args:
      velocity: `[B, *sites, C]`, `eps - x_0`.
      cond: `[B, *sites, C]`, the network's velocity `u(x, t, t)` with the label.
      uncond: `[B, *sites, C]`, the network's velocity without a label.
      omega: share of the sample's own velocity, a scalar or `[B]`.
      kappa: share of the network's velocity, a scalar or `[B]`.

    Returns:
      `[B, *sites, C]`, without gradient.
    """
    omega, kappa = (per_sample(jnp.asarray(value), velocity.ndim) for value in (omega, kappa))
    mixed = omega * velocity + kappa * cond + (1 - omega - kappa) * uncond
    return jax.lax.stop_gradient(mixed)


def flow_states(
    setting: Setting,
    network: Callable[[jax.Array], MeanVelocity],
    keys: Sequence[jax.Array],
    x0: jax.Array,
    t: jax.Array,
    labels: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """States of a batch and their velocities, with the guidance of the teacher's settings.

    Args:
      setting: the method's setting.
      network: maps labels to a mean velocity.
      keys: the PRNG key of the noise, and the key for dropping labels, with the teacher's
        probability.
      x0: `[B, *sites, C]`, data.
      t: `[B]`.
      labels: `[B]`.

    Returns:
      `(x[B, *sites, C], velocity[B, *sites, C], labels[B])`.
    """
    guidance, nothing = setting.config.teacher, setting.data.num_classes
    noise = jax.random.normal(keys[0], x0.shape, x0.dtype)
    x, velocity = interpolate(x0, noise, t), noise - x0
    dropped = jax.random.bernoulli(keys[1], guidance.label_dropout, labels.shape)
    labels = jnp.where(dropped, nothing, labels)
    if guidance.guidance_scale != 1:
        low, high = guidance.guidance_interval
        inside = (t >= low) & (t <= high) & (labels != nothing)
        omega = jnp.where(inside, guidance.guidance_scale, 1.0)
        asked = (labels, jnp.full_like(labels, nothing))
        cond, uncond = (network(told)(x, t, jnp.zeros_like(t)) for told in asked)
        velocity = guided_target(velocity, cond, uncond, omega)
    return x, velocity, labels


def flow_map_sample(
    mean_velocity: MeanVelocity, noise: jax.Array, nfe: int, warp: TimeWarp
) -> jax.Array:
    """Samples by `x_r = x_t - (t - r) u(x_t, t, t - r)` (MeanFlow, arXiv 2505.13447, Eq. 12).

    Args:
      mean_velocity: `(x[B, *sites, C], t[B], t - r [B]) -> u[B, *sites, C]`; traced once.
      noise: `[B, *sites, C]`, standard normal.
      nfe: network evaluations, in steps uniform in raw time.
      warp: raw time to noise level.

    Returns:
      `x_0[B, *sites, C]`.

    Raises:
      ValueError: if `nfe` is below 1.
    """

    def step(x, t, r, index):
        times = (jnp.full(x.shape[:1], time) for time in (t, t - r))
        return x - (t - r) * mean_velocity(x, *times)

    return descend(step, noise, nfe, warp)


def flow_map_rival(**row: Any) -> Rival:
    """The row of a method that learns mean velocities from data; `row` has its further entries."""
    return Rival(given="data", init=fresh, network=two_times, **row)
