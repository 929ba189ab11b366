"""Improved precision and recall: coverage of one set's k-NN balls by the other's samples.

T. Kynkaanniemi et al., "Improved precision and recall metric for assessing generative models"
(arXiv 1904.06991). Precision is the share of generated samples inside the manifold of the real
ones. Recall is the share of real samples inside the manifold of the generated ones. A manifold is
the union of balls around samples. Each ball reaches to the k-th nearest neighbour within the same
set.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from piflow_jax.evaluation.checks import check_same_dimension, checked_features

_CHUNK_ELEMENTS = 2**20  # distances held at once, 4 MiB, which stay in a core's cache
_LANES = 32


class PrecisionRecall(NamedTuple):
    """Precision and recall, each in [0, 1]."""

    precision: float
    recall: float


def precision_recall(real: ArrayLike, generated: ArrayLike, *, k: int = 3) -> PrecisionRecall:
    """Measures the share of each set that the other set covers.

    Recall grows with the number of generated samples. Compare only figures with equal counts.

    Args:
      real: Features [N, D], `N > k`.
      generated: Features [M, D], `M > k`, in the same feature space.
      k: The nearest neighbour (excluding the sample itself) that sets a sample's radius; 3 in the
        paper.

    Returns:
      `PrecisionRecall(precision, recall)`.

    Raises:
      ValueError: If an argument is malformed, has too few samples, a NaN or infinity.
    """
    if not isinstance(k, (int, np.integer)) or k < 1:
        raise ValueError(f"`k` must be a positive integer, got {k!r}")
    real = checked_features(real, "real", minimum=k + 1)
    generated = checked_features(generated, "generated", minimum=k + 1)
    check_same_dimension(real, generated, ("real", "generated"))
    centre = real.mean(axis=0)  # in float64, to reduce cancellation in the float32 products below
    real = jnp.asarray(real - centre, jnp.float32)
    generated = jnp.asarray(generated - centre, jnp.float32)
    real_radii = _squared_radii(real, k)
    generated_radii = _squared_radii(generated, k)
    return PrecisionRecall(
        precision=float(_covered(generated, real, real_radii)),
        recall=float(_covered(real, generated, generated_radii)),
    )


def _squared_distances(rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Squared Euclidean distances [R, C] between `rows: [R, D]` and `columns: [C, D]`."""
    products = jnp.matmul(rows, columns.T, precision=jax.lax.Precision.HIGHEST)
    row_squares = jnp.sum(rows * rows, axis=1)[:, None]
    column_squares = jnp.sum(columns * columns, axis=1)[None, :]
    return row_squares + column_squares - 2 * products


def _in_chunks(rows: jax.Array, columns: int) -> tuple[jax.Array, jax.Array]:
    """Rows [n, size, D] padded with zeros, and their indices [n, size]."""
    size = max(1, min(len(rows), _CHUNK_ELEMENTS // columns))
    count = -(-len(rows) // size)
    padded = jnp.pad(rows, ((0, count * size - len(rows)), (0, 0)))
    return padded.reshape(count, size, -1), jnp.arange(count * size).reshape(count, size)


def _kth_smallest(values: jax.Array, k: int) -> jax.Array:
    """The k-th smallest value [R] in each row of `values: [R, C]`, counting duplicates, `k <= C`.

    `jax.lax.top_k` takes 200 ns per element on a CPU. This function first keeps the k smallest
    values in each of a few lanes, by an insertion that vectorises over lanes and rows. It then
    sorts only these.
    """
    rows, columns = values.shape
    groups = -(-columns // _LANES)
    padding = ((0, 0), (0, groups * _LANES - columns))
    values = jnp.pad(values, padding, constant_values=jnp.inf).reshape(rows, groups, _LANES)

    def insert(group, smallest):
        value = values[:, group]
        kept = []
        for best in smallest:
            kept.append(jnp.minimum(best, value))
            value = jnp.maximum(best, value)
        return tuple(kept)

    empty = jnp.full((rows, _LANES), jnp.inf, values.dtype)
    smallest = jax.lax.fori_loop(0, groups, insert, (empty,) * k)
    return -jax.lax.top_k(-jnp.concatenate(smallest, axis=1), k)[0][:, -1]


@functools.partial(jax.jit, static_argnames="k")
def _squared_radii(points: jax.Array, k: int) -> jax.Array:
    """Squared distance [N] of each of `points: [N, D]` to its k-th neighbour except itself."""

    def chunk(rows_and_indices):
        rows, indices = rows_and_indices
        itself = indices[:, None] == jnp.arange(len(points))[None, :]
        distances = jnp.where(itself, jnp.inf, _squared_distances(rows, points))
        return _kth_smallest(distances, k)

    chunks = _in_chunks(points, len(points))
    return jax.lax.map(chunk, chunks).reshape(-1)[: len(points)]


@jax.jit
def _covered(queries: jax.Array, centres: jax.Array, squared_radii: jax.Array) -> jax.Array:
    """Share of `queries: [M, D]` inside a ball around any of `centres: [N, D]`."""

    def chunk(rows_and_indices):
        rows, indices = rows_and_indices
        inside = _squared_distances(rows, centres) <= squared_radii[None, :]
        return jnp.sum(jnp.any(inside, axis=1) & (indices < len(queries)))

    counts = jax.lax.map(chunk, _in_chunks(queries, len(centres)))
    return jnp.sum(counts) / len(queries)
