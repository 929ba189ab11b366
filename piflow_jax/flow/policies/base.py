"""The interface of every policy, a network-free velocity field, and its broadcasting helpers.

Source: arXiv 2510.14974, Sec. 3.1.
"""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from piflow_jax.arguments import check_shape

__all__ = [
    "Policy",
    "check_mask",
    "check_output",
    "check_query",
    "per_batch",
    "per_sample",
    "promote",
]


class Policy(Protocol):
    """A velocity field predicted once at a segment's source and queried at later times.

    Implementations are frozen pytrees with arrays as leaves. A policy therefore passes through
    `jit`, `scan` and `jax.lax.stop_gradient`, and `vmap` maps over its leaves.

    A policy with a known integral also has `displacement(x, sigma_start, sigma_end)`, the change of
    the state between two noise levels. Its rollouts take no substeps.
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
    """Per-sample scalars `[B]` for a batch; a single number stands for all samples.

    Args:
      name: name of the scalars, for the error.
      value: a scalar, `[1]` or `[B]`.
      x: `[B, *sites, C]`.

    Returns:
      `[B]`.

    Raises:
      ValueError: `value` has another number of entries.
    """
    if value.shape not in ((), (1,), x.shape[:1]):
        raise ValueError(f"{name} has shape {value.shape}; x of shape {x.shape} asks for [B]")
    return jnp.broadcast_to(value, x.shape[:1])


def check_output(output: Any, x_src: jax.Array, sigma_src: jax.Array) -> None:
    """Refuses a network's output that is no mixture at its source.

    Args:
      output: a dataclass of `means[B, *sites, K, C]`, of a `logstd[B]` if it has one, and of other
        fields `[B, *sites, K]`.
      x_src: `[B, *sites, C]`, the state that the network saw.
      sigma_src: `[B]`, its noise level.

    Raises:
      ValueError: shapes do not match, or there is no component.
    """
    if np.ndim(x_src) < 2:
        raise ValueError(f"x_src must be [B, *sites, C], got shape {np.shape(x_src)}")
    batch, *sites, channels = np.shape(x_src)
    kind, means = type(output).__name__, np.shape(output.means)
    components = means[-2] if len(means) > 1 else 0
    if not components:
        raise ValueError(f"{kind}.means has shape {means}, without a component")
    others = {"means": (batch, *sites, components, channels), "logstd": (batch,)}
    for field in dataclasses.fields(output):
        shape = others.get(field.name, (batch, *sites, components))
        of = f"x_src of shape {np.shape(x_src)}"
        check_shape(f"{kind}.{field.name}", getattr(output, field.name), shape, of)
    if np.shape(sigma_src) != (batch,):
        raise ValueError(f"sigma_src has shape {np.shape(sigma_src)}, expected {(batch,)}")


def check_query(x: jax.Array, sigma: jax.Array, states: tuple[int, ...]) -> None:
    """Refuses states and noise levels that do not fit a policy.

    Args:
      x: `[B, *sites, C]`, the states of a query.
      sigma: `[B]`, their noise levels, or one number.
      states: `(B, *sites, C)` of the policy; a policy of one sample takes any number of states.

    Raises:
      ValueError: shapes do not match.
    """
    if np.shape(x)[1:] != states[1:] or states[0] not in (1, *np.shape(x)[:1]):
        raise ValueError(f"x has shape {np.shape(x)}; the policy is of states {states}")
    if np.shape(sigma) not in ((), (1,), np.shape(x)[:1]):
        raise ValueError(
            f"sigma has shape {np.shape(sigma)}; x of shape {np.shape(x)} asks for [B]"
        )


def check_mask(mask: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Converts a mask of components to booleans.

    Args:
      mask: `[B, K]`, booleans or integers.
      shape: `(B, K)` of the policy.

    Returns:
      `bool[B, K]`; where a sample would lose all K, none is marked.

    Raises:
      ValueError: it has another shape, or fractional values.
    """
    mask = jnp.asarray(mask)
    check_shape("mask", mask, shape, "the policy")
    if not jnp.issubdtype(mask.dtype, jnp.integer) and mask.dtype != bool:
        raise ValueError(f"mask must be bool, got {mask.dtype}")
    mask = mask != 0
    return mask & ~jnp.all(mask, axis=-1, keepdims=True)


def promote(*values: jax.Array) -> tuple[jax.Array, ...]:
    """Casts arrays to their common type, at least float32.

    Policy arithmetic squares signal-to-noise ratios that reach 1e6, which neither bfloat16 nor
    float16 can represent next to the state.
    """
    arrays = [jnp.asarray(value) for value in values]
    dtype = jnp.result_type(jnp.float32, *arrays)
    return tuple(array.astype(dtype) for array in arrays)
