"""A small DiT with parameters that leave nothing hidden behind a zero, for the tests beside it."""

import functools

import jax
import jax.numpy as jnp

SMALL = dict(
    patch_size=2, in_channels=3, hidden=16, num_heads=2, depth=3, num_classes=5, sample_size=4
)


def small_inputs(batch=3):
    x = jax.random.normal(jax.random.key(0), (batch, 4, 4, SMALL["in_channels"]))
    return x, jnp.linspace(0.1, 1.0, batch), jnp.arange(batch) % 6


@functools.cache
def random_params(module, scale=0.3):
    @jax.jit
    def draw():
        params = module.init(jax.random.key(1), *small_inputs())
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.key(2), len(leaves))
        pairs = zip(leaves, keys, strict=True)
        return jax.tree.unflatten(
            tree, [a + scale * jax.random.normal(k, a.shape) for a, k in pairs]
        )

    return draw()


@functools.partial(jax.jit, static_argnums=0)
def apply(module, params, x, t, labels):
    return module.apply(params, x, t, labels)
