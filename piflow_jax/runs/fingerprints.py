"""Fingerprints of arrays that lie on many devices of many processes, without gathering them."""

import hashlib
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from piflow_jax.keys import key_numbers


def fingerprint(values: np.ndarray, start: tuple | None = None, shape: tuple | None = None) -> int:
    """A sum over elements of (bits times an odd weight made of the position), modulo 2^64.

    It is additive over the pieces of an array, so that shards need no gathering and a run may be
    restored on another mesh; any change to a single element changes it.

    Args:
      values: the array, or a piece of it.
      start: where the piece starts; by default at the origin.
      shape: shape of the whole; by default that of `values`.

    Returns:
      An integer in [0, 2^64).
    """
    start = (0,) * values.ndim if start is None else start
    shape = values.shape if shape is None else shape
    words = values.view(f"u{values.dtype.itemsize}")
    total, stride = int(words.sum(dtype=np.uint64)), 1
    for axis in reversed(range(words.ndim)):
        others = tuple(i for i in range(words.ndim) if i != axis)
        sums = words.sum(axis=others, dtype=np.uint64)
        place = np.arange(start[axis], start[axis] + words.shape[axis], dtype=np.uint64)
        total += 2 * stride * int(np.dot(sums, place))
        stride *= shape[axis]
    return total % 2**64


def leaf_table(tree: Any, *, fingerprints: bool = False) -> dict[str, dict]:
    """What a tree's leaves are, by their paths.

    Args:
      tree: arrays of the host or of all processes' devices, or shapes.
      fingerprints: fingerprints of the values too; if an array lies on devices of several
        processes, all of these must call it then.

    Returns:
      By path, `type`, such as `float32[2, 3]`, and `fingerprint`, 16 hexadecimal digits.

    Raises:
      TypeError: a leaf is no array, or one of typed keys.
      ValueError: two leaves have the same path.
    """
    table, leaves = {}, jax.tree_util.tree_flatten_with_path(tree)[0]
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
            raise TypeError(f"the state's leaf {name} is a {type(leaf).__name__}, not an array")
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended):
            raise TypeError(f"the state's leaf {name} has dtype {leaf.dtype}; save its key_data")
        if name in table:
            raise ValueError(f"two leaves of the state are called {name}")
        table[name] = {"type": f"{np.dtype(leaf.dtype)}{list(leaf.shape)}"}
    if fingerprints:
        arrays = [leaf for _, leaf in leaves]
        shares = [_local_fingerprint(leaf) for leaf in arrays]
        for entry, total in zip(table.values(), _over_processes(arrays, shares), strict=True):
            entry["fingerprint"] = f"{total:016x}"
    return table


def tree_fingerprint(tree: Any) -> str:
    """One fingerprint of all of a tree's arrays and their paths, wherever they lie.

    It takes about a second per GB. If an array lies on devices of several processes, all of these
    must call it.

    Args:
      tree: arrays.

    Returns:
      16 hexadecimal digits.
    """
    leaves = jax.tree_util.tree_flatten_with_path(jax.tree.map(key_numbers, tree))[0]
    arrays = [leaf for _, leaf in leaves]
    shares = [_local_fingerprint(leaf, keep=False) for leaf in arrays]
    totals = _over_processes(arrays, shares)
    digest = hashlib.sha256()
    for (path, leaf), total in zip(leaves, totals, strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        digest.update(f"{name} {leaf.dtype}{list(leaf.shape)} {total:016x}\n".encode())
    return digest.hexdigest()[:16]


def _local_fingerprint(leaf: jax.Array | np.ndarray, keep: bool = True) -> int:
    """This process's share of a leaf's fingerprint: each shard counts in one place.

    An array keeps on the host what was fetched of it. With `keep=False` a copy on the device is
    fetched instead, for arrays that stay.
    """
    if isinstance(leaf, np.ndarray):
        return fingerprint(leaf)
    total = 0
    for shard in (s for s in leaf.addressable_shards if s.replica_id == 0):
        start = tuple(s.indices(n)[0] for s, n in zip(shard.index, leaf.shape, strict=True))
        data = shard.data if keep else jax.device_put(shard.data, may_alias=False)
        total += fingerprint(np.asarray(data), start, leaf.shape)
    return total % 2**64


def _over_processes(leaves: list[jax.Array | np.ndarray], shares: list[int]) -> list[int]:
    """The leaves' fingerprints: sums of shares, or the share where each process has all of a leaf.

    Shares are sent as 32-bit halves, since JAX may have no 64-bit types, and only if a leaf needs
    it: a process may load for itself what the others do not.
    """
    spread = np.array([isinstance(x, jax.Array) and not x.is_fully_addressable for x in leaves])
    if not spread.any():
        return shares
    halves = np.asarray(shares, np.uint64).view(np.uint32)
    gathered = np.ascontiguousarray(multihost_utils.process_allgather(halves)).view(np.uint64)
    return [int(total) for total in np.where(spread, gathered.sum(axis=0), gathered[0])]
