"""A small state with every kind of leaf, saved and restored by the tests of checkpoints."""

from pathlib import Path
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from piflow_jax.runs.checkpoint import (
    Checkpointer,
)

JSON = {"data_state": {"epoch": 2, "index": 17}, "config": {"lr": 1e-3}, "spec": {"policy": "gm"}}


class Moments(NamedTuple):
    count: jax.Array
    mu: dict


class Empty(NamedTuple):
    pass


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict
    opt_state: tuple
    ema_params: dict
    host: np.ndarray


def make_state(seed=0, width=40) -> State:
    def params(k):
        return {
            "dense": {
                "kernel": jax.random.normal(k, (width, width)),
                "bias": jnp.full((width,), jnp.nan, jnp.bfloat16),
            }
        }

    keys = jax.random.split(jax.random.key(seed), 3)
    return State(
        step=jnp.asarray(seed, jnp.int32),
        params=params(keys[0]),
        opt_state=(Moments(jnp.zeros((), jnp.int32), params(keys[1])), Empty(), None),
        ema_params=params(keys[2]),
        host=np.arange(5, dtype=np.int64),
    )


def abstract(tree):
    return jax.tree.map(
        lambda x: x if isinstance(x, np.ndarray) else jax.ShapeDtypeStruct(x.shape, x.dtype), tree
    )


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert type(x) is type(y) and x.dtype == y.dtype and x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def save(directory, *steps, **kwargs):
    with Checkpointer(directory, **kwargs) as checkpointer:
        for step in steps:
            checkpointer.save(step, make_state(step), **JSON)


def restore(directory, like=None, step=None):
    with Checkpointer(directory) as checkpointer:
        return checkpointer.restore(abstract(make_state()) if like is None else like, step)


def data_files(step: Path) -> list[Path]:
    """The files with array values: the largest in the state's own store."""
    files = [p for p in (step / "state").rglob("*") if p.is_file() and p.parent.name == "d"]
    return [p for p in files if p.stat().st_size > 2000]
