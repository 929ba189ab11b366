"""Policies of a formula and a tiny student, for the tests of calls from Python."""

import jax
import jax.numpy as jnp
import numpy as np

import piflow_jax
from piflow_jax.config import parse
from piflow_jax.keys import seed_key
from piflow_jax.systems.networks import student_network
from piflow_jax.systems.shapes import DataShape
from piflow_jax.systems.spec import StudentSettings
from tests import tiny

NAN = float("nan")
ONE = np.ones(2, np.float32)
X = np.random.default_rng(0).normal(size=(2, 4, 1)).astype(np.float32)
WARP = piflow_jax.TimeWarp(3.2)


def mixture(x, t):
    """A policy of two components that depend on what the network sees."""
    means = jnp.stack([jnp.tanh(x), 0.5 * jnp.asarray(x)], axis=-2)
    output = piflow_jax.GMOutput(means, jnp.zeros(means.shape[:-1]), -jnp.asarray(t))
    return piflow_jax.GMFlowPolicy.create(output, jnp.asarray(x), jnp.asarray(t))


def grid(x, t):
    return piflow_jax.DXPolicy.create(jnp.stack([x, 0.5 * x], axis=-2), x, t)


def few(nfe=2, noise=X, policy_fn=mixture, warp=WARP, **options):
    return piflow_jax.few_step_sample(policy_fn, noise, nfe, warp, total_substeps=8, **options)


def moved(params, by=0.1):
    """Parameters away from the beginning, where much is zero; by NumPy, which compiles nothing."""

    def move(leaf):
        wave = np.sin(np.arange(leaf.size, dtype=np.float32)).reshape(leaf.shape)
        return jnp.asarray(np.asarray(leaf) + np.float32(by) * wave)

    return jax.tree.map(move, params)


def tiny_student(nfe=2, shift=1.0, final=1.0):
    config = tiny.get_config()
    config.train.nfe, config.train.shift, config.train.final_step_size_scale = nfe, shift, final
    config = parse(config)
    data = DataShape(name="digits", sample_size=8, channels=1, num_classes=10)
    network = student_network(config.model, config.policy, data)
    params = moved(jax.jit(network.init)(seed_key(0)))
    settings = StudentSettings(
        model=config.model, policy=config.policy, train=config.train, data=data
    )
    return piflow_jax.Student(network, params, settings)


LABELS = np.arange(3)
IMAGES = np.random.default_rng(1).normal(size=(2, 8, 8, 1)).astype(np.float32)


def sampled(student):
    return np.asarray(student.sample(5, LABELS, substeps=8, h=0.5, temperature=0.7))
