"""Data, a network and a teacher that are not ours, for tests of `distill` and `train_teacher`."""

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import piflow_jax
from piflow_jax import Schedule, Teacher
from piflow_jax.flow.policies.base import per_sample

CLASSES = 2
rng = np.random.default_rng(0)
POINTS = rng.normal(0, 0.5, (256, 2)).astype(np.float32)
TOKENS = rng.normal(0, 0.5, (64, 5, 2)).astype(np.float32)
LABELLED = (POINTS, np.arange(256) % CLASSES)
VOLUMES = rng.normal(0, 0.5, (32, 2, 3, 4, 2)).astype(np.float32)
IMAGES = np.tanh(rng.normal(0, 0.5, (64, 8, 8, 3))).astype(np.float32)


class Small(nn.Module):
    """As little as tells states and times, and conditions where there are some, apart."""

    outputs: int
    width: int = 6

    @nn.compact
    def __call__(self, x, t, labels=None, pose=None):
        h = nn.Dense(self.width)(t[:, None])
        if labels is not None:
            h = h + nn.Embed(CLASSES + 1, self.width)(labels)
        if pose is not None:
            h = h + nn.Dense(self.width)(pose)
        h = nn.Dense(self.width)(x) + h.reshape(-1, *[1] * (x.ndim - 2), self.width)
        return nn.Dense(self.outputs, name="out")(jnp.tanh(h))


def settings(**changes):
    config = piflow_jax.base_config()
    config.policy.num_components = 3
    config.train.steps, config.train.batch_size, config.train.total_substeps = 3, 8, 8
    config.train.optimizer.warmup_steps = 1
    config.evaluation.num_samples, config.evaluation.batch_size = 16, 16
    config.evaluation.teacher_steps, config.evaluation.substeps = (1,), 8
    config.evaluation.grid_samples = 4
    config.log_every, config.checkpoint_every = 1, 2
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return config


def exact(deviation=0.5, prediction="u", schedule=None):
    """The denoiser of a normal distribution, in closed form, as a prediction on a schedule."""
    schedule = schedule or Schedule.straight()

    def predict(params, z, s, cond=None):
        s = per_sample(s, z.ndim) / schedule.time_scale
        a, b = schedule.signal(s), schedule.noise(s)
        x0 = params["variance"] * a / (a**2 * params["variance"] + b**2) * z
        eps = (z - a * x0) / jnp.maximum(b, 1e-6)
        return {"x0": x0, "eps": eps, "v": a * eps - b * x0, "u": eps - x0}[prediction]

    params = {"variance": jnp.float32(deviation**2)}
    return Teacher(predict=predict, shape=None, prediction=prediction, schedule=schedule), params


SOURCES = {
    "points": (POINTS, None),
    "tokens": (TOKENS, None),
    "volumes": (VOLUMES, None),
    "labels": LABELLED,
    "mapping": (POINTS, {"pose": rng.normal(size=(256, 3))}),
}


def config_of_teacher():
    config = piflow_jax.base_config()
    config.teacher.steps, config.teacher.batch_size = 3, 8
    config.teacher.optimizer.warmup_steps = 1
    config.log_every, config.checkpoint_every = 1, 2
    return config
