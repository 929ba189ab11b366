"""Slices that are not here; compiling for one is in `tests/modes/test_compile.py`."""

import os

import pytest

from piflow_jax.parallel.topology import gather_weights_whole, topology_devices


def test_unknown_chips_are_refused_with_the_known_ones():
    with pytest.raises(
        ValueError, match=r"unknown topology 'a100:8'; it is a chip \(v5e, v5p, v6e\)"
    ):
        topology_devices("a100:8")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000"),
        ("--a=1", "--a=1 --xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000"),
        *[(f"--xla_jf_spmd_threshold_for_windowed_einsum_mib={n} --a=1",) * 2 for n in (-1, 8)],
    ],
)
def test_flags_of_the_user_stay_beside_ours_and_before_it(monkeypatch, before, after):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", before)
    gather_weights_whole()
    assert os.environ["LIBTPU_INIT_ARGS"] == after
