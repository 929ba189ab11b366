"""A teacher whose flow is known: data `N(mean, scale^2)` in every coordinate.

With `a = 1 - t` and `var(t) = a^2 scale^2 + t^2`, conditional means of jointly Gaussian variables
give the velocity, and `(x - a mean) / sqrt(var)` is constant along its paths.
"""

import functools

import jax
import jax.numpy as jnp

MEAN, SCALE = 0.4, 0.7


# Compiling op by op is most of the time of tests as small as these.
whole = functools.partial(jax.jit, static_argnames=("mean", "scale"))


def run(function):
    """Values of a function of nothing, compiled as one program."""
    return jax.jit(function)()


def variance(t, scale=SCALE):
    return (1 - t) ** 2 * scale**2 + t**2


def spread(t, x):
    return jnp.reshape(t, t.shape + (1,) * (x.ndim - 1))


@whole
def velocity(x, t, mean=MEAN, scale=SCALE):
    t = spread(t, x)
    centred = x - (1 - t) * mean
    return (t - (1 - t) * scale**2) / variance(t, scale) * centred - mean


@whole
def flow_map(x, t, r, mean=MEAN, scale=SCALE):
    t, r = spread(t, x), spread(r, x)
    ratio = jnp.sqrt(variance(r, scale) / variance(t, scale))
    return (1 - r) * mean + ratio * (x - (1 - t) * mean)


@jax.jit
def mean_velocity(x, t, interval):
    """`(x_t - x_r) / (t - r)`, and the velocity itself where the interval is 0."""
    empty = interval == 0
    length = jnp.where(empty, 1, interval)
    jump = (x - flow_map(x, t, t - length)) / spread(length, x)
    return jnp.where(spread(empty, x), velocity(x, t), jump)
