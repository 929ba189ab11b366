"""MeanFlow: mean velocities learned from their own derivative (arXiv 2505.13447).

The mean velocity over `[r, t]` is `u(x_t, r, t) = (x_t - x_r) / (t - r)` on a path of the flow (Eq.
3). Differentiating by `t` gives the MeanFlow identity `u = v - (t - r) du/dt` (Eq. 6). Its
right-hand side, evaluated with the network and without gradient, is the target of a regression.
Times are ours: `t = 1` is noise.
"""

import functools

import jax
import jax.numpy as jnp

from piflow_jax.flow.policies.base import per_sample
from piflow_jax.rivals.base import Setting, gradient_step
from piflow_jax.rivals.flow_map import MeanVelocity, flow_map_rival, flow_map_sample, flow_states

__all__ = ["MEANFLOW", "meanflow_loss", "meanflow_times"]


def meanflow_times(
    key: jax.Array, batch: int, share: float = 0.25, mean: float = -0.4, std: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Draws `t >= r`: the larger and the smaller of two logit-normal times (Sec. 4.3).

    Args:
      key: a PRNG key.
      batch: `B`.
      share: share of samples with `r < t`; the others have `r = t`, which gives flow matching.
      mean: mean of the logits.
      std: standard deviation of the logits.

    Returns:
      `(t[B], r[B])`.
    """
    times_key, equal_key = jax.random.split(key)
    logits = mean + std * jax.random.normal(times_key, (2, batch))
    times = jax.nn.sigmoid(logits)
    t, r = jnp.max(times, axis=0), jnp.min(times, axis=0)
    return t, jnp.where(jax.random.bernoulli(equal_key, share, (batch,)), r, t)


def meanflow_loss(
    network: MeanVelocity,
    x: jax.Array,
    velocity: jax.Array,
    t: jax.Array,
    r: jax.Array,
    *,
    power: float = 1.0,
    eps: float = 1e-3,
) -> tuple[jax.Array, jax.Array]:
    """The MeanFlow objective (Eqs. 8 to 10) with its adaptive weight (Sec. 4.3).

    The derivative along the path, `du/dt = v du/dx + du/dt` (Eq. 8), is one Jacobian-vector
    product with the tangent `(v, 1)` at fixed `r`.

    Args:
      network: the mean velocity.
      x: `[B, *sites, C]`, states at `t`.
      velocity: `[B, *sites, C]`, `eps - x_0`, or the velocity with guidance.
      t: `[B]`, noise levels.
      r: `[B]`, noise levels at most `t`.
      power: `p` of the weight `1 / (|residual|^2 + eps)^p`, where `|residual|^2` sums over a
        sample; 0 gives the plain squared error.
      eps: `eps` of the weight, `c` in the paper.

    Returns:
      `(loss[], residual[B, *sites, C])`; the loss is a mean over samples, the residual is the
      prediction minus its target.
    """
    interval = t - r

    def along(x, t):
        return network(x, t, t - r)

    prediction, derivative = jax.jvp(along, (x, t), (velocity, jnp.ones_like(t)))
    target = velocity - per_sample(interval, x.ndim) * derivative
    residual = prediction - jax.lax.stop_gradient(target)
    squares = jnp.sum(jnp.square(residual), axis=tuple(range(1, x.ndim)))
    weight = (jax.lax.stop_gradient(squares) + eps) ** -power
    return jnp.mean(weight * squares), residual


def _loss(setting: Setting, params, state, given, key, x0, labels):
    time_key, noise_key, label_key = jax.random.split(key, 3)
    t, r = meanflow_times(time_key, x0.shape[0])
    network = functools.partial(setting.bind, params)
    keys = noise_key, label_key
    x, velocity, labels = flow_states(setting, network, keys, x0, t, labels)
    return meanflow_loss(network(labels), x, velocity, t, r)[0]


MEANFLOW = flow_map_rival(
    name="meanflow", title="MeanFlow", step=gradient_step(_loss), sample=flow_map_sample
)
