"""Slices that are not here; compiling for one is in `tests/modes/test_compile.py`."""

import pytest

from piflow_jax.parallel.topology import topology_devices


def test_unknown_chips_are_refused_with_the_known_ones():
    with pytest.raises(
        ValueError, match=r"unknown topology 'a100:8'; it is a chip \(v5e, v5p, v6e\)"
    ):
        topology_devices("a100:8")
