"""Checks shared by the statistics of this package."""

import numpy as np
from numpy.typing import ArrayLike


def checked_features(features: ArrayLike, argument: str, minimum: int = 2) -> np.ndarray:
    """Returns features as an array, or raises an error that names the fault.

    Args:
      features: Any value that converts to a real array [N, D].
      argument: Name of the argument, for the error.
      minimum: Smallest permitted N.

    Returns:
      The array [N, D], float64 (not copied if it is already).

    Raises:
      ValueError: If it is not [N, D] with `N >= minimum` and `D >= 1`, or has a NaN or infinity.
    """
    array = np.asarray(features)
    if array.ndim != 2 or array.shape[1] == 0:
        raise ValueError(f"`{argument}` must have the shape [N, D], got {list(array.shape)}")
    if array.shape[0] < minimum:
        raise ValueError(
            f"`{argument}` has {array.shape[0]} samples; at least {minimum} are needed"
        )
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"`{argument}` must be floating point, got {array.dtype}")
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).any(axis=1).sum())
        raise ValueError(f"`{argument}` has NaN or infinity in {bad} of {len(array)} samples")
    return array.astype(np.float64, copy=False)


def check_same_dimension(a: np.ndarray, b: np.ndarray, names: tuple[str, str]) -> None:
    """Raises ValueError, naming both arguments, if the last axes of `a` and `b` differ."""
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(
            f"`{names[0]}` has dimension {a.shape[-1]} and `{names[1]}` {b.shape[-1]}; "
            "they must come from the same feature space"
        )
