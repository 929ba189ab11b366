"""Random keys, and the noise of samples by their index.

`JAX_DEFAULT_PRNG_IMPL` decides what a key of `jax.random.key(seed)` draws. Under `rbg`, which many
set on TPUs, the draws of a batch of keys depend on the whole batch and on the devices that share
it. All keys of this package are made here and name their implementation, so that a seed gives the
same numbers everywhere.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from piflow_jax.arguments import known

_IMPLEMENTATION = "threefry2x32"


def seed_key(seed: int) -> jax.Array:
    """The key of a seed.

    Args:
      seed: an integer of at most 64 bits.

    Returns:
      What `jax.random.key(seed)` is where JAX's defaults are not changed.

    Raises:
      ValueError: the seed has more bits.
    """
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"a seed has at most 64 bits, got {seed}")
    # As in JAX with 32-bit types, where the upper word of a negative seed is 0.
    words = np.array([max(seed, 0) >> 32, seed & 0xFFFFFFFF], np.uint32)
    return jax.random.wrap_key_data(jax.device_put(words), impl=_IMPLEMENTATION)


def is_typed_key(array: jax.Array | np.ndarray) -> bool:
    """Whether an array holds typed PRNG keys, whose dtype is of JAX alone."""
    return jnp.issubdtype(array.dtype, jax.dtypes.prng_key)


def key_numbers(array: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """The numbers of typed PRNG keys; any other array as it is."""
    return jax.random.key_data(array) if is_typed_key(array) else array


def as_key(key: Any) -> jax.Array:
    """The key of a seed, of a typed key or of a legacy key.

    Args:
      key: an integer, a key of `jax.random.key`, or the words of `jax.random.PRNGKey`. Of another
        implementation's key the first two words are taken: those of `rbg` are the key that the
        same seed has here.

    Returns:
      The typed key.

    Raises:
      ValueError: it is none of these, or several.
    """
    if isinstance(key, int):
        return seed_key(key)
    array = key if isinstance(key, jax.Array) else np.asarray(key)
    found = f"{array.dtype}{list(array.shape)}"
    array = array if array.ndim else key_numbers(array)
    if jnp.issubdtype(array.dtype, jnp.integer) and not array.ndim:
        seed = known(array)
        return jax.random.key(array, impl=_IMPLEMENTATION) if seed is None else seed_key(int(seed))
    if array.dtype == jnp.uint32 and array.ndim == 1 and len(array) >= 2:
        return jax.random.wrap_key_data(array[:2], impl=_IMPLEMENTATION)
    raise ValueError(f"key must be a seed or one PRNG key, got an array {found}")


def shuffled(length: int, key: tuple[int, int]) -> np.ndarray:
    """A permutation on the host, the same with every version of NumPy.

    Args:
      length: Number of entries.
      key: Two whole numbers of 64 bits.

    Returns:
      The numbers below `length`, int64[length].
    """
    words = np.random.Philox(key=np.array(key, np.uint64)).random_raw(length)
    return np.argsort(words, kind="stable")


def index_keys(key: jax.Array, indices: jax.Array) -> jax.Array:
    """The keys of samples, each of its index alone.

    Args:
      key: of `seed_key` or `as_key`.
      indices: `uint32[B]`, numbers of samples.

    Returns:
      Typed keys `[B]`.
    """
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(indices)


def index_noise(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal noise of samples: the one stream that a seed stands for in this package.

    It depends on seed and index alone, not on the size of the batch, nor on the number of devices
    or processes.

    Args:
      keys: of `index_keys`, `[B]`.
      shape: of one sample, `(*sites, C)`.

    Returns:
      `float32[B, *shape]`.
    """
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)


def keys_of_noise(noise: jax.Array) -> jax.Array:
    """Keys for further draws of samples, each a function of the bits of its own noise.

    A sample that is known by its noise alone then stays the same at any size of batch.

    Args:
      noise: `[B, *shape]`, from `index_noise`.

    Returns:
      Typed keys `[B]`.
    """
    bits = jax.lax.bitcast_convert_type(jnp.asarray(noise, jnp.float32), jnp.uint32)
    bits = bits.reshape(len(bits), -1)
    first = index_keys(seed_key(0), bits[:, 0])
    return jax.vmap(jax.random.fold_in)(first, bits[:, -1])


def folded_noise(keys: jax.Array, number: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
    """Standard normal noise of a number within a stream, such as that of a segment.

    Args:
      keys: one key for the batch, or typed keys `[B]`, with which a sample's noise does not depend
        on the others.
      number: of the draw.
      shape: `[B, *sites, C]`.
      dtype: of the noise.

    Returns:
      The noise.

    Raises:
      ValueError: there is another number of keys.
    """

    def draw(key, shape):
        return jax.random.normal(jax.random.fold_in(key, number), shape, dtype)

    if is_typed_key(keys) and keys.ndim == 1:
        if keys.shape != shape[:1]:
            raise ValueError(f"keys must be one or [{shape[0]}], got {list(keys.shape)}")
        return jax.vmap(lambda key: draw(key, shape[1:]))(jax.vmap(as_key)(keys))
    return draw(keys, shape)
