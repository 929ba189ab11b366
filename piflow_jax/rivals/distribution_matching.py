"""DMD2: moves the student's distribution towards the teacher's (arXiv 2405.14867).

The gradient of the divergence between the two distributions, at noised samples of the student, is
the difference of their scores (Eq. 1). A second network gives the student's own score. Flow
matching on the student's samples keeps it up to date, with several updates per update of the
student (Sec. 4.2). The GAN loss of the paper's Sec. 4.3 is left out: it needs a discriminator and
adds real data, but this package compares distillations of one teacher.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from piflow_jax.flow.distribution import distribution_matching_loss
from piflow_jax.flow.policies.base import per_sample
from piflow_jax.flow.schedule import TimeWarp
from piflow_jax.rivals.base import (
    Rival,
    Setting,
    Velocity,
    changed,
    copy_of_teacher,
    interpolate,
    renoised_sample,
)
from piflow_jax.training.objectives import flow_matching_loss
from piflow_jax.training.optimizer import make_optimizer
from piflow_jax.training.state import TrainState
from piflow_jax.training.step import StepFn, advance

__all__ = ["DMD", "backward_simulation"]

# Noise levels at which scores are compared. At the ends one of the scores carries no information.
MATCHED_LEVELS = (0.02, 0.98)


def backward_simulation(
    generator: Velocity, key: jax.Array, noise: jax.Array, nfes: Sequence[int]
) -> tuple[jax.Array, jax.Array]:
    """States for training the student, taken from its own sampling (Sec. 4.5).

    For every sample a number of evaluations and one of its steps are drawn. The earlier steps are
    simulated without gradient: predict `x_0`, then add noise up to the next level.

    Args:
      generator: the student's velocity, `(x[B, *sites, C], t[B]) -> u[B, *sites, C]`.
      key: a PRNG key.
      noise: `[B, *sites, C]`, standard normal, used as the first states.
      nfes: numbers of evaluations for later sampling; levels are `1 - i / nfe`.

    Returns:
      `(x[B, *sites, C], t[B])`, without gradient.
    """
    nfe_key, step_key, noise_key = jax.random.split(key, 3)
    batch, dtype = noise.shape[0], noise.dtype
    nfe = jax.random.choice(nfe_key, jnp.asarray(nfes, dtype), (batch,))
    steps = jnp.floor(jax.random.uniform(step_key, (batch,), dtype) * nfe)
    steps = jnp.minimum(steps, nfe - 1)

    def simulate(carry, index):
        x, t = carry
        fresh = jax.random.normal(jax.random.fold_in(noise_key, index), x.shape, dtype)
        x0 = x - per_sample(t, x.ndim) * generator(x, t)
        after = 1 - (index + 1) / nfe
        goes_on = index < steps
        x = jnp.where(per_sample(goes_on, x.ndim), interpolate(x0, fresh, after), x)
        return (x, jnp.where(goes_on, after, t)), None

    start = (noise, jnp.ones((batch,), dtype))
    (x, t), _ = jax.lax.scan(simulate, start, jnp.arange(max(nfes) - 1))
    return jax.lax.stop_gradient((x, t))


def _optimizer(setting: Setting) -> optax.GradientTransformation:
    """The optimiser of the network that follows the student, at a constant rate."""
    train = changed(setting.config.train, {"optimizer.decay": "constant"})
    return make_optimizer(train.optimizer, train.steps)


def _init(setting: Setting, key: jax.Array, teacher_params) -> TrainState:
    """Both networks start at the teacher; parameters and moments are dictionaries with both."""
    state = copy_of_teacher(setting, key, teacher_params)
    return state.replace(
        params={"student": state.params, "fake": jax.tree.map(jnp.copy, state.params)},
        opt_state={"student": state.opt_state, "fake": _optimizer(setting).init(state.params)},
    )


def _step(setting: Setting) -> StepFn:
    """Makes one update of the student, then several of the network of its distribution."""
    config, data = setting.config, setting.data
    settings, fake_optimizer = config.train.optimizer, _optimizer(setting)

    def generate(params, key, labels, shape):
        noise_key, walk_key = jax.random.split(key)
        generator = setting.bind(params, labels)
        noise = jax.random.normal(noise_key, shape)
        x, t = backward_simulation(generator, walk_key, noise, config.rivals.nfes)
        return x - per_sample(t, x.ndim) * generator(x, t)

    def step(state: TrainState, given, root: jax.Array, batch):
        labels = batch["condition"]
        shape = (labels.shape[0], *data.shape)
        step_key = jax.random.fold_in(root, state.step)
        keys = jax.random.split(step_key, 1 + config.rivals.fake_updates)
        both, moments = state.params, state.opt_state

        def student_loss(params):
            sample_key, time_key, noise_key = jax.random.split(keys[0], 3)
            generated = generate(params, sample_key, labels, shape)
            low, high = MATCHED_LEVELS
            t = jax.random.uniform(time_key, shape[:1], minval=low, maxval=high)
            noise = jax.random.normal(noise_key, shape)
            real = setting.guided(given["teacher"], labels)
            fake = setting.bind(both["fake"], labels)
            return distribution_matching_loss(generated, real, fake, noise, t)

        loss, grads = jax.value_and_grad(student_loss)(both["student"])
        student = state.replace(params=both["student"], opt_state=moments["student"])
        student, metrics = advance(student, grads, loss, setting.optimizer, settings)

        def follow(carry, key):
            params, opt_state = carry
            sample_key, loss_key = jax.random.split(key)
            x0 = jax.lax.stop_gradient(generate(student.params, sample_key, labels, shape))

            def fake_loss(params):
                def network(carried, *inputs):
                    return setting.teacher.train(params, *inputs)

                inputs = loss_key, x0, labels, None, 0.0, TimeWarp()
                return flow_matching_loss(network, (), *inputs)[0]

            loss, grads = jax.value_and_grad(fake_loss)(params)
            updates, opt_state = fake_optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), loss

        start = both["fake"], moments["fake"]
        (fake, fake_moments), losses = jax.lax.scan(follow, start, keys[1:])
        state = student.replace(
            params={"student": student.params, "fake": fake},
            opt_state={"student": student.opt_state, "fake": fake_moments},
        )
        return state, metrics | {"fake_loss": jnp.mean(losses)}

    return step


def _sample(velocity: Velocity, noise: jax.Array, nfe: int, warp: TimeWarp) -> jax.Array:
    # No `warp`: the student is trained at levels uniform in t.
    return renoised_sample(velocity, noise, nfe, TimeWarp())


DMD = Rival(
    name="dmd",
    title="DMD2",
    given="teacher",
    follows=lambda nfe: False,  # distributions have no paths to compare
    step=_step,
    sample=_sample,
    init=_init,
    rate=0.1,
)
