"""A caller's conditions of a student: what is taken as it was in training, and what is refused."""

import numpy as np
import pytest

from piflow_jax.systems.conditioning import Arrays
from piflow_jax.systems.shapes import DataShape


def checked(values, dtype):
    data = DataShape(name="mine", channels=1, conditions=(f"part:{dtype}:",))
    condition, number = Arrays().checked({"part": values}, data)
    assert number == len(values) and condition["part"].dtype == dtype
    return condition["part"].tolist()


@pytest.mark.parametrize(
    ("values", "dtype", "expected"),
    [
        ([0, 1], "bool", [False, True]),
        ([3.0, 4.0], "int32", [3, 4]),
        ([True, False], "float32", [1.0, 0.0]),
        (np.array([2, 255], np.int64), "uint8", [2, 255]),
    ],
)
def test_numbers_that_are_those_of_training_are_taken(values, dtype, expected):
    assert checked(values, dtype) == expected


@pytest.mark.parametrize(
    ("values", "dtype", "words"),
    [
        ([1.0, 0.5], "int32", r"part must be int32 as in training, got 0\.5"),
        ([0, 2], "bool", "part must be bool as in training, got 2"),
        ([1, 256], "uint8", "part must be uint8 as in training, got 256"),
        ([-1, 1], "uint32", "part must be uint32 as in training, got -1"),
        (["1", "2"], "float32", "part must be finite, got an array of <U1"),
        ([1e300, 1.0], "float32", "part must be finite, got inf"),
        ([np.nan, 1.0], "int32", "part must be finite, got nan"),
        ([1j, 1.0], "float32", "part must be finite, got an array of complex128"),
    ],
)
def test_other_values_are_refused_by_name(values, dtype, words):
    with pytest.raises(ValueError, match=words):
        checked(values, dtype)
