"""A batch that is computed in parts."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def accumulate(loss_and_grads: Callable, batch, count: int, carried: Any = ()):
    """Mean loss and gradients of a batch, computed in `count` parts one after the other.

    All parts have the same number of examples, so the result equals that of the whole batch, with
    the memory of one part. Part `i` takes the examples `i, i + count, ...`. A batch that is split
    over devices then has equally many examples of each part on every device, and nothing moves
    between devices.

    Args:
      loss_and_grads: `(part, carried) -> ((loss, grads), carried)`; loss and gradients are means
        over the examples of the part.
      batch: arrays with examples on the leading axis.
      count: number of parts; divides the number of examples.
      carried: variables that one part hands to the next.

    Returns:
      `((loss, grads), carried)`.
    """
    if count == 1:
        return loss_and_grads(batch, carried)
    parts = _parts(batch, count)
    first = jax.tree.map(lambda a: a[0], parts)
    shapes, _ = jax.eval_shape(loss_and_grads, first, carried)
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)

    def body(carry, part):
        total, carried = carry
        new, carried = loss_and_grads(part, carried)
        with jax.named_scope("optimizer"):
            return (jax.tree.map(jnp.add, total, new), carried), None

    (total, carried), _ = jax.lax.scan(body, (zeros, carried), parts)
    with jax.named_scope("optimizer"):
        return jax.tree.map(lambda a: a / count, total), carried


def in_parts(function: Callable, batch: Any, count: int) -> Any:
    """What a function makes of each example of a batch, computed in the parts of `accumulate`.

    Args:
      function: from a part to arrays with its examples on the leading axis.
      batch: arrays with examples on the leading axis.
      count: number of parts; divides the number of examples.

    Returns:
      The arrays for the whole batch, in its order.
    """
    if count == 1:
        return function(batch)
    found = jax.lax.map(function, _parts(batch, count))
    return jax.tree.map(
        lambda a: jnp.swapaxes(a, 0, 1).reshape(count * a.shape[1], *a.shape[2:]), found
    )


def _parts(batch: Any, count: int) -> Any:
    return jax.tree.map(
        lambda a: jnp.swapaxes(a.reshape(len(a) // count, count, *a.shape[1:]), 0, 1), batch
    )
