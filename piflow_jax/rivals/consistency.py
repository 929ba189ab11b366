"""Continuous-time consistency distillation in its stabilised form, sCM (arXiv 2410.11081).

The paper works on the circle: `z_a = cos(a) x_0 + sin(a) eps` (TrigFlow, Sec. 3). A network `F`
predicts `dz/da`, and the consistency function is `f = cos(a) z - sin(a) F` (`sigma_d` is 1 here,
the standard deviation of the noise). Our straight path visits the same states up to a factor, `x_t
= z_a / (cos a + sin a)` at `t = sin a / (cos a + sin a)`. `trigflow` therefore turns a velocity
network into `F` without loss.
"""

import jax
import jax.numpy as jnp

from piflow_jax.flow.policies.base import per_sample
from piflow_jax.rivals.base import Rival, Setting, Velocity, gradient_step, renoised_sample

__all__ = [
    "CONSISTENCY",
    "consistency_loss",
    "consistency_tangent",
    "consistency_times",
    "trigflow",
]

# Constant of the normalised tangent, Sec. 4.2.
TANGENT_EPS = 0.1
# Share of the training over which the tangent warms up.
WARMUP_SHARE = 0.25


def trigflow(velocity: Velocity) -> Velocity:
    """Our velocity network as the paper's `F(z, a) = dz/da` (Sec. 3, Eq. 4).

    Args:
      velocity: `(x[B, *sites, C], t[B]) -> u[B, *sites, C]`, `u = eps - x_0`.

    Returns:
      `(z[B, *sites, C], a[B]) -> F[B, *sites, C]` for angles `a` in [0, pi / 2].
    """

    def prediction(z, angle):
        cosine, sine = (per_sample(f(angle), z.ndim) for f in (jnp.cos, jnp.sin))
        scale = cosine + sine
        x, t = z / scale, sine / scale
        u = velocity(x, jnp.sin(angle) / (jnp.cos(angle) + jnp.sin(angle)))
        # eps = x + (1 - t) u and x_0 = x - t u
        return cosine * (x + (1 - t) * u) - sine * (x - t * u)

    return prediction


def consistency_times(
    key: jax.Array, batch: int, mean: float = -0.3, std: float = 1.4
) -> jax.Array:
    """Draws angles `a` with a log-normal tangent (Sec. 4.2).

    Args:
      key: a PRNG key.
      batch: `B`.
      mean: mean of `log tan a`. The paper draws `log(sigma_d tan a)` with mean -1.0 and has a
        `sigma_d` of 0.5, which gives about -0.3.
      std: standard deviation of `log tan a`.

    Returns:
      `a[B]` in (0, pi / 2).
    """
    return jnp.arctan(jnp.exp(mean + std * jax.random.normal(key, (batch,))))


def consistency_tangent(
    network: Velocity,
    teacher: Velocity,
    z: jax.Array,
    angle: jax.Array,
    warmup: float | jax.Array = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """`cos(a) df/da` along the teacher's path, rearranged to keep products small (Eq. 7, Alg. 1).

        g = -cos(a)^2 (F - dz/da) - r cos(a) sin(a) (z + dF/da)

    Both products with `cos(a) sin(a)` are taken inside the Jacobian-vector product. Its tangents
    then stay bounded as `a` approaches `pi / 2`.

    Args:
      network: `F` of the student, see `trigflow`.
      teacher: `F` of the teacher, which gives `dz/da`.
      z: `[B, *sites, C]`, states at `a`.
      angle: `[B]`.
      warmup: `r`, a scalar that rises from 0 to 1 over the first steps of training.

    Returns:
      `(F[B, *sites, C], g[B, *sites, C])`, with the tangent `g` not normalised.
    """
    cosine, sine = (per_sample(f(angle), z.ndim) for f in (jnp.cos, jnp.sin))
    slope = teacher(z, angle)
    tangents = (cosine * sine * slope, jnp.cos(angle) * jnp.sin(angle))
    prediction, derivative = jax.jvp(network, (z, angle), tangents)
    pull = jnp.square(cosine) * (prediction - slope)
    return prediction, -pull - warmup * (cosine * sine * z + derivative)


def consistency_loss(
    network: Velocity,
    teacher: Velocity,
    z: jax.Array,
    angle: jax.Array,
    warmup: float | jax.Array = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """The sCM objective with tangent normalisation (Eq. 8, Alg. 1), without its learned weight.

    `|F - stop(F + g / (|g| + 0.1))|^2 / D`. The tangent's factor `cos(a)` is the paper's prior
    weight `1 / tan(a)`, applied to the consistency function's own gradient, `-sin(a)`. The paper
    also learns a weight that depends on time alone. It is left out here, because normalised
    tangents make the loss nearly constant over time.

    Args:
      network: `F` of the student.
      teacher: `F` of the guided teacher; it gets no gradient.
      z: `[B, *sites, C]`, states at `a`.
      angle: `[B]`.
      warmup: a scalar, see `consistency_tangent`.

    Returns:
      `(loss[], tangent[B, *sites, C])`, the tangent `g` before its normalisation.
    """
    prediction, tangent = consistency_tangent(network, teacher, z, angle, warmup)
    tangent = jax.lax.stop_gradient(tangent)
    over = tuple(range(1, z.ndim))
    norm = jnp.sqrt(jnp.sum(jnp.square(tangent), over, keepdims=True))
    target = jax.lax.stop_gradient(prediction) + tangent / (norm + TANGENT_EPS)
    return jnp.mean(jnp.square(prediction - target)), tangent


def _loss(setting: Setting, params, state, given, key, x0, labels):
    time_key, noise_key = jax.random.split(key)
    angle = consistency_times(time_key, x0.shape[0])
    noise = jax.random.normal(noise_key, x0.shape, x0.dtype)
    cosine, sine = (per_sample(f(angle), x0.ndim) for f in (jnp.cos, jnp.sin))
    warmup = jnp.minimum(state.step / (WARMUP_SHARE * setting.config.train.steps), 1.0)
    loss, _ = consistency_loss(
        trigflow(setting.bind(params, labels)),
        trigflow(setting.guided(given["teacher"], labels)),
        cosine * x0 + sine * noise,
        angle,
        warmup,
    )
    return loss


CONSISTENCY = Rival(
    name="consistency",
    title="consistency (sCM)",
    given="teacher",
    follows=lambda nfe: nfe == 1,  # fresh noise leaves no common endpoint to compare
    step=gradient_step(_loss),
    sample=renoised_sample,
    rate=0.3,
)
