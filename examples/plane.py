"""The whole method in one file: a teacher in the plane is distilled into one evaluation.

    python examples/plane.py

The teacher is the exact flow from noise to six Gaussians on a circle, so nothing has to be trained
or downloaded before the distillation. The student is a small network that predicts a
Gaussian-mixture policy. Training takes about 20 seconds on a CPU core. The script prints the mean
squared distance from the teacher's samples at 128 evaluations: about 2.0 for the teacher at one
evaluation, and about 0.04 for the student at one.

To use another teacher, replace `teacher` by any function
`(x[B, *sites, C], t[B]) -> u[B, *sites, C]` that gives the velocity `u = dx/dt`, with `t = 1` at
noise and `t = 0` at data. `docs/concepts.md` shows the paths of this example, and
`tools/draw_concepts.py` draws them.
"""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from piflow_jax.flow.imitation import imitation_loss, sample_intervals
from piflow_jax.flow.policies import GMFlowPolicy, GMOutput
from piflow_jax.flow.sampling import few_step_sample, ode_sample
from piflow_jax.flow.schedule import TimeWarp

angles = 2 * jnp.pi * jnp.arange(6) / 6
centres = 2 * jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-1)
warp = TimeWarp(shift=1.0)


def teacher(x, t):
    """The velocity of the exact flow; each Gaussian has the standard deviation 0.1."""
    t = jnp.maximum(t, 1e-3)[:, None]
    variance = t**2 + (0.1 * (1 - t)) ** 2
    offsets = x[:, None] - (1 - t)[..., None] * centres[None]
    mean = nn.softmax(-jnp.sum(offsets**2, -1) / (2 * variance)) @ centres
    x0 = mean + 0.01 * (1 - t) / variance * (x - (1 - t) * mean)
    return (x - x0) / t


class Student(nn.Module):
    """Predicts a mixture of six Gaussians: their means, weights and common standard deviation."""

    @nn.compact
    def __call__(self, x, t):
        """The mixture over velocities at `x[B, 2]` and `t[B]`."""
        h = jnp.concatenate([x, t[:, None]], axis=-1)
        for _ in range(3):
            h = nn.silu(nn.Dense(128)(h))
        means, logits, logstd = jnp.split(nn.Dense(19)(h), [12, 18], axis=-1)
        return GMOutput(means.reshape(-1, 6, 2), nn.log_softmax(logits), logstd[:, 0])


student = Student()
optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, 1000))


def policy_at(params, x, t):
    """The policy that one evaluation of the student gives at `x[B, 2]` and `t[B]`."""
    return GMFlowPolicy.create(student.apply(params, x, t), x, t)


@jax.jit
def step(params, opt_state, key):
    """One step of pi-ID from pure noise: draw noise and times, match the teacher's velocities."""
    noise_key, times_key = jax.random.split(key)
    noise, one = jax.random.normal(noise_key, (256, 2)), jnp.ones(256)
    times = sample_intervals(times_key, 2, one, 0 * one, teacher_ratio=0)

    def loss_fn(params):  # one segment, from raw time 1 (noise) over a length of 1
        policy = policy_at(params, noise, one)
        return imitation_loss(policy, teacher, noise, one, one, times, warp, total_substeps=32)[0]

    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, opt_state = optimizer.update(grads, opt_state)
    return optax.apply_updates(params, updates), opt_state, loss


params = student.init(jax.random.key(0), jnp.zeros((1, 2)), jnp.ones(1))
opt_state = optimizer.init(params)
for i in range(1000):
    params, opt_state, loss = step(params, opt_state, jax.random.fold_in(jax.random.key(1), i))

noise = jax.random.normal(jax.random.key(2), (1000, 2))
many, once = (ode_sample(teacher, noise, steps, warp) for steps in (128, 1))
ours = few_step_sample(lambda x, t: policy_at(params, x, t), noise, 1, warp)
print(f"teacher at 1: {jnp.mean((once - many) ** 2):.3f} from itself at 128 evaluations")
print(f"student at 1: {jnp.mean((ours - many) ** 2):.3f}")
