"""Slices that are not here; compiling for one is in `tests/stages/test_compile.py`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from piflow_jax.parallel.topology import fully_sharded, topology_mesh


class EightDevices:
    """As much of a mesh as the rule reads."""

    axis_names = ("data",)
    size = 8


def test_the_last_axis_that_divides_is_split(monkeypatch):
    monkeypatch.setattr("piflow_jax.parallel.topology.NamedSharding", lambda mesh, spec: spec)
    shapes = {
        "kernel": (24, 16, 3, 64),  # stacked layers divide too, and are left whole
        "odd": (24, 16, 5),
        "bias": (24, 5),
        "scalar": (),
        "nothing": (3, 5),
    }
    tree = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    assert fully_sharded(EightDevices(), tree) == {
        "kernel": P(None, None, None, "data"),
        "odd": P(None, "data", None),
        "bias": P("data", None),
        "scalar": P(),
        "nothing": P(None, None),
    }


def test_unknown_chips_are_refused_with_the_known_ones():
    with pytest.raises(
        ValueError, match=r"unknown topology 'a100:8'; it is a chip \(v5e, v5p, v6e\)"
    ):
        topology_mesh("a100:8")


def test_shardings_work_on_a_real_mesh():
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("data",))
    placed = jax.device_put(jnp.ones((2, 4)), fully_sharded(mesh, jnp.ones((2, 4))))
    assert placed.sharding.spec == P(None, "data")
