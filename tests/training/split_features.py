"""A step of the corrector by features on one device and on eight; prints how far they are apart."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from piflow_jax.parallel import batch_sharding, device_mesh, replicated
from tests.training.test_corrector import RIGHT, corrector_of, first_state, part, settings


def run(count):
    """Gradients, moments and metrics of a batch that is split over some devices."""
    config = settings("frechet")
    corrector = corrector_of(config)
    mesh = device_mesh(count, 1, 1, devices=jax.devices()[:count])
    wrong = {"mean": jnp.asarray(-0.2), "logstd": jnp.asarray(0.3)}
    state = jax.device_put(first_state(config, wrong), replicated(mesh))
    noise = [jax.device_put(part(jax.random.key(i))["noise"], batch_sharding(mesh)) for i in (0, 1)]

    def step(state, first, second):
        inputs = [{"noise": one, "condition": None} for one in (first, second)]
        key = jax.random.key(2)
        state, followed = corrector.follow(state, RIGHT, inputs[0], key)
        ones = jax.tree.map(jnp.ones_like, RIGHT)
        corrected = corrector.correct(state.replace(step=5), ones, RIGHT, inputs[1], key)
        return state.moments, followed, corrected

    with jax.set_mesh(mesh):
        compiled = jax.jit(step).lower(state, *noise).compile()
    return compiled(state, *noise), compiled.as_text().count("all-reduce")


if __name__ == "__main__":
    (one, alone), (eight, together) = run(1), run(8)
    apart = jax.tree.map(
        lambda a, b: float(np.max(np.abs(np.asarray(a) - b)) / np.max(np.abs(np.asarray(a)))),
        one,
        eight,
    )
    print(json.dumps({"apart": max(jax.tree.leaves(apart)), "moved": [alone, together]}))
