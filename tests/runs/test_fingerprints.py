"""Fingerprints add up over shards and see every bit."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax.runs.fingerprints import fingerprint, leaf_table, tree_fingerprint


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


def test_a_trees_fingerprint_sees_names_types_and_values_and_not_where_they_lie():
    tree = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": {"c": np.ones(4, np.float16)}}
    found = tree_fingerprint(tree)
    keys = [tree_fingerprint(tree | {"key": jax.random.key(seed)}) for seed in (0, 0, 1)]
    assert keys[0] == keys[1] != keys[2]
    assert tree_fingerprint(jax.device_put(tree)) == found
    lines = [
        f"{name} {entry['type']} {entry['fingerprint']}\n"
        for name, entry in leaf_table(tree, fingerprints=True).items()
    ]
    assert found == hashlib.sha256("".join(lines).encode()).hexdigest()[:16]
    others = [
        tree | {"a": tree["a"] + np.eye(2, 3, dtype=np.float32)},
        tree | {"a": tree["a"].reshape(3, 2)},
        tree | {"b": {"d": tree["b"]["c"]}},
        tree | {"b": {"c": tree["b"]["c"].view(np.int16)}},
    ]
    assert len({found, *map(tree_fingerprint, others)}) == 5
