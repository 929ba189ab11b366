"""Fingerprints add up over shards and see every bit."""

import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax.training.fingerprints import fingerprint


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool", "float64"])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (4, 6), (3, 4, 5), (0, 3)])
def test_fingerprint_adds_up_over_shards_and_sees_every_element(dtype, shape):
    rng = np.random.default_rng(0)
    values = (rng.standard_normal(shape) * 9).astype(jnp.dtype(dtype))
    whole = fingerprint(values)
    if shape and shape[0] > 1:
        k = shape[0] // 2
        if len(shape) == 1:
            parts = [(values[:k], (0,)), (values[k:], (k,))]
        else:
            rest = (0,) * (len(shape) - 2)
            parts = [
                (values[i : i + k if i == 0 else None, j : 2 if j == 0 else None], (i, j, *rest))
                for i in (0, k)
                for j in (0, 2)
            ]
        shares = [fingerprint(part, start, shape) for part, start in parts]
        assert sum(shares) % 2**64 == whole
    for place in np.ndindex(*shape):
        other = np.array(values)
        other.view(f"u{other.dtype.itemsize}")[place] ^= 1
        assert fingerprint(other) != whole
    if values.ndim > 1 and values.size:  # swapped elements
        other = np.array(values)
        other[0, 1], other[1, 0] = values[1, 0], values[0, 1]
        assert (fingerprint(other) == whole) == (other == values).all()
