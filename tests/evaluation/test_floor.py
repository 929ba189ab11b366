import numpy as np
import pytest

from piflow_jax.evaluation import half_split_floor


def test_white_noise_meets_the_known_bias():
    n, d = 800, 8
    floor = half_split_floor(np.random.default_rng(0).normal(size=(n, d)), splits=6)
    assert floor.half_size == 400 and floor.splits == 6
    assert floor.frechet == pytest.approx((d * (d + 1) / 4 + d) * 2 / 400, rel=0.25)
    assert 0 < floor.frechet_std < floor.frechet
    assert floor.precision == pytest.approx(floor.recall, abs=0.03)
    assert floor.precision > 0.8


def test_splits_are_random_and_fixed():
    # In data that drifts along its index, a split in order would show a large distance.
    drifting = np.linspace(0, 10, 401)[:, None] + np.random.default_rng(1).normal(size=(401, 2))
    floor = half_split_floor(drifting)
    assert floor.half_size == 200  # the odd one is left out
    assert floor.frechet < 1
    assert half_split_floor(drifting) == floor
    assert half_split_floor(drifting, splits=1).frechet != floor.frechet


def test_malformed_input_is_refused_by_name():
    with pytest.raises(ValueError, match="`features` has 7 samples; at least 8"):
        half_split_floor(np.zeros((7, 2)))
    with pytest.raises(ValueError, match="`splits`"):
        half_split_floor(np.zeros((8, 2)), splits=0)
