"""What every policy is: a network-free velocity field, and the broadcasting it relies on.

Policies are those of arXiv 2510.14974, Sec. 3.1.
"""

from typing import Protocol

import jax
import jax.numpy as jnp

__all__ = ["Policy", "per_batch", "per_sample", "promote"]


class Policy(Protocol):
    """A velocity field predicted once at a segment's source and queried at later times.

    Implementations are frozen pytrees whose leaves are arrays, so that a policy passes through
    `jit`, `scan`, `vmap` over nothing but its leaves, and `jax.lax.stop_gradient`.

    A policy whose integral is known has `displacement(x, sigma_start, sigma_end)` besides, the
    change of the state between two noise levels; rollouts then take no substeps.
    """

    def velocity(self, x: jax.Array, sigma: jax.Array) -> jax.Array:
        """Velocity at a state.

        Args:
          x: states `[B, *sites, C]`.
          sigma: noise levels `[B]` in [0, 1]; 1 is noise.

        Returns:
          `u[B, *sites, C]`, the derivative of the state with respect to sigma.
        """
        ...


def per_sample(value: jax.Array, ndim: int) -> jax.Array:
    """Reshapes per-sample scalars `[B]` to `[B, 1, ..., 1]` of rank `ndim`."""
    return jnp.reshape(value, value.shape + (1,) * (ndim - value.ndim))


def per_batch(name: str, value: jax.Array, x: jax.Array) -> jax.Array:
    """Per-sample scalars of states; one number is that of all samples.

    Args:
      name: of the scalars.
      value: a scalar, `[1]` or `[B]`.
      x: `[B, *sites, C]`.

    Returns:
      `[B]`.

    Raises:
      ValueError: there is another number of them.
    """
    if value.shape not in ((), (1,), x.shape[:1]):
        raise ValueError(f"{name} has shape {value.shape}; x of shape {x.shape} asks for [B]")
    return jnp.broadcast_to(value, x.shape[:1])


def promote(*values: jax.Array) -> tuple[jax.Array, ...]:
    """Casts arrays to their common type, at least float32.

    Policy arithmetic squares signal-to-noise ratios that reach 1e6, which neither bfloat16 nor
    float16 can represent next to the state.
    """
    arrays = [jnp.asarray(value) for value in values]
    dtype = jnp.result_type(jnp.float32, *arrays)
    return tuple(array.astype(dtype) for array in arrays)
