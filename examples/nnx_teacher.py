"""A teacher that this package did not make, distilled: a DDPM written in Flax NNX, on two moons.

    python examples/nnx_teacher.py

The teacher is an ordinary denoiser: it predicts `eps`, at one of 1,000 integer times, along DDPM's
variance-preserving schedule. `piflow_jax.Teacher` says so, and that is all that imitation needs to
know. The student is the same NNX network with another head, started at the teacher's weights.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import make_moons

import piflow_jax
from piflow_jax import GMFlowPolicy, GMOutput, TimeWarp

COMPONENTS = 8
ALPHAS = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))  # DDPM's table
WARP = TimeWarp(shift=1.0)


class Denoiser(nnx.Module):
    """A multilayer perceptron of a point of the plane and a time in [0, 1000)."""

    def __init__(self, outputs: int, rngs: nnx.Rngs):
        sizes = (2 + 16, 128, 128, 128)
        self.hidden = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(sizes)])
        self.head = nnx.Linear(128, outputs, rngs=rngs)

    def __call__(self, z, s):
        """Predicts `[B, outputs]` of `z[B, 2]` and `s[B]`."""
        angles = s[:, None] / 1000 * jnp.pi * 2.0 ** jnp.arange(-2, 6)[None]
        h = jnp.concatenate([z, jnp.sin(angles), jnp.cos(angles)], axis=-1)
        for layer in self.hidden:
            h = nnx.silu(layer(h))
        return self.head(h)


def train_teacher(steps: int) -> Denoiser:
    """What somebody else has done: DDPM training, with nothing of ours."""
    data, _ = make_moons(4096, noise=0.05, random_state=0)
    data = jnp.asarray((data - data.mean(0)) / data.std(0), jnp.float32)
    graph, params = nnx.split(Denoiser(2, nnx.Rngs(0)))
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
    alphas = jnp.asarray(ALPHAS, jnp.float32)

    def step(carry, key):
        params, state = carry
        which, when, noise = jax.random.split(key, 3)
        x0 = data[jax.random.randint(which, (256,), 0, len(data))]
        s = jax.random.randint(when, (256,), 0, 1000)
        eps = jax.random.normal(noise, x0.shape)
        z = jnp.sqrt(alphas[s])[:, None] * x0 + jnp.sqrt(1 - alphas[s])[:, None] * eps
        grads = jax.grad(lambda p: jnp.mean((nnx.merge(graph, p)(z, s) - eps) ** 2))(params)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(1), steps)
    train = jax.jit(lambda params: jax.lax.scan(step, (params, optimizer.init(params)), keys)[0])
    return nnx.merge(graph, train(params)[0])


class Result(NamedTuple):
    """What a look at the student needs: distances, samples, and both as functions of `(x, t)`."""

    figures: dict
    samples: dict
    policy_fn: object
    velocity: object


def main(teacher_steps: int = 4000, student_steps: int = 1000) -> Result:
    """Trains both, and measures how far samples are from the teacher's at 128 evaluations."""
    denoiser = train_teacher(teacher_steps)

    # The teacher's description. `nnx.split` makes a function of parameters of the module.
    graph, weights = nnx.split(denoiser)
    schedule = piflow_jax.Schedule.discrete(ALPHAS)
    teacher = piflow_jax.Teacher(
        predict=lambda params, z, s, cond: nnx.merge(graph, params)(z, s),
        shape=(2,),
        prediction="eps",
        schedule=schedule,
    )
    velocity = teacher.bind(weights)

    # The student: the teacher's hidden layers under a head that predicts a mixture.
    network = Denoiser(COMPONENTS * 3 + 1, nnx.Rngs(2))
    for mine, theirs in zip(network.hidden, denoiser.hidden, strict=True):
        nnx.update(mine, nnx.state(theirs))
    graph_student, params = nnx.split(network)

    def policy_at(params, x, t):
        s = schedule.time(t)
        z = (schedule.signal(s) + schedule.noise(s))[:, None] * x  # as its hidden layers know it
        out = nnx.merge(graph_student, params)(z, s)
        means, logits, logstd = jnp.split(out, [COMPONENTS * 2, COMPONENTS * 3], axis=-1)
        means = means.reshape(-1, COMPONENTS, 2)
        output = GMOutput(means, jax.nn.log_softmax(logits), logstd[:, 0] - 2)
        return GMFlowPolicy.create(output, x, t)

    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(2e-3, student_steps))
    )

    def step(carry, key):
        params, state = carry
        noise_key, times_key = jax.random.split(key)
        noise, one = jax.random.normal(noise_key, (256, 2)), jnp.ones(256)
        times = piflow_jax.sample_intervals(times_key, 2, one, 0 * one, teacher_ratio=0)

        def loss_fn(params):  # one segment, from noise to data
            policy = policy_at(params, noise, one)
            return piflow_jax.imitation_loss(
                policy, velocity, noise, one, one, times, WARP, total_substeps=32
            )[0]

        updates, state = optimizer.update(jax.grad(loss_fn)(params), state)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(3), student_steps)
    train = jax.jit(lambda params: jax.lax.scan(step, (params, optimizer.init(params)), keys)[0])
    params, _ = train(params)

    noise = jax.random.normal(jax.random.key(4), (2000, 2))
    many, few = (piflow_jax.ode_sample(velocity, noise, n, WARP) for n in (128, 4))

    def policy_fn(x, t):
        return policy_at(params, x, t)

    ours = piflow_jax.few_step_sample(policy_fn, noise, 1, WARP)
    samples = {"teacher, 4 evaluations": few, "student, 1 evaluation": ours}
    figures = {name: float(jnp.mean((x - many) ** 2)) for name, x in samples.items()}
    for system, distance in figures.items():
        print(f"{system}: {distance:.3f} from the teacher's 128")
    samples["teacher, 128 evaluations"] = many
    return Result(figures, samples, policy_fn, velocity)


if __name__ == "__main__":
    main()
