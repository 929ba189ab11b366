"""Checks of arguments whose values are known only outside of `jit`.

A traced value has no number to check, so these checks pass it and add nothing to the program.
Docstrings say what wrong values do there.
"""

import contextlib
import math
import operator
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

ROUNDING = 1e-5
"""What sums of times in float32 may be off by: less than a hundredth of a substep of 1,000."""


def known(value: Any) -> np.ndarray | None:
    """The values of an argument, on the host.

    Args:
      value: a number, or an array of NumPy or JAX.

    Returns:
      The values; None of a traced array, and of one that is partly in other processes.
    """
    if isinstance(value, jax.core.Tracer):
        return None
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return None
    return np.asarray(value)


def check_between(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    open_low: bool = False,
    slack: float = 0.0,
    finite: bool = True,
) -> None:
    """Refuses known values outside of an interval, and what is no number.

    Args:
      name: the argument's name.
      value: a number or an array of any shape.
      low: least value.
      high: largest value.
      open_low: whether `low` itself is out, too.
      slack: what rounding may add to either end.
      finite: whether infinities are out, too.

    Raises:
      ValueError: a known value is outside.
    """
    values = known(value)
    if values is None:
        return
    wanted = _interval(low, high, open_low, finite)
    if values.dtype.kind in "cmMOSU":
        found = f"an array of {values.dtype}" if values.ndim else repr(value)
        raise ValueError(f"{name} must be {wanted}, got {found}")
    # NumPy compares the small types of JAX, too, but not with numbers of Python.
    numbers = values if values.dtype.kind in "biuf" else values.astype(np.float32)
    inside = (numbers <= high + slack) & ((numbers > low) if open_low else (numbers >= low - slack))
    if finite:
        inside &= np.isfinite(numbers)
    if not inside.all():
        raise ValueError(f"{name} must be {wanted}, got {values[~inside][0]}")


def _interval(low: float, high: float, open_low: bool, finite: bool) -> str:
    least = f"{'above' if open_low else 'at least'} {low:g}"
    if math.isinf(high):
        parts = ["finite"] * finite + [least] * (not math.isinf(low))
        return " and ".join(parts)
    if math.isinf(low):
        return f"finite and at most {high:g}"
    return f"in {'(' if open_low else '['}{low:g}, {high:g}]"


def check_number(name: str, value: Any, *limits: float, **options: Any) -> None:
    """Refuses what is not one number within limits; see `check_between`.

    Args:
      name: the argument's name.
      value: the number; it may be traced.
      *limits: of `check_between`, as are the options.
      **options: see `limits`.

    Raises:
      ValueError: it is several, or a known one is outside.
    """
    if np.ndim(value):
        raise ValueError(f"{name} must be one number, got an array {list(np.shape(value))}")
    check_between(name, value, *limits, **options)


def check_no_pixels(name: str, value: Any) -> None:
    """Refuses pixels where networks see numbers about [-1, 1].

    Args:
      name: the argument's name.
      value: an array.

    Raises:
      ValueError: it is uint8.
    """
    if value.dtype == np.uint8:
        raise ValueError(f"{name} must be about [-1, 1], got uint8: turn pixels into x / 127.5 - 1")


def check_shape(name: str, value: Any, shape: tuple[int, ...], of: str) -> None:
    """Refuses an array of another shape.

    Args:
      name: the argument's name.
      value: the array; shapes are known under `jit`, too.
      shape: the shape that it must have.
      of: what asks for this shape.

    Raises:
      ValueError: the shape is another one.
    """
    if np.shape(value) != tuple(shape):
        raise ValueError(f"{name} has shape {np.shape(value)}; {of} asks for {tuple(shape)}")


def as_dtype(name: str, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Values in another dtype, in which they are finite and, if it is one of integers, the same.

    Args:
      name: the argument's name.
      values: an array of any shape.
      dtype: the dtype.

    Returns:
      The array.

    Raises:
      ValueError: a value is not finite, or `dtype` does not have it.
    """
    check_between(name, values)
    with np.errstate(over="ignore", invalid="ignore"):
        cast = values.astype(dtype)
    check_between(name, cast)
    if dtype.kind in "biu" and not np.array_equal(cast, values):
        raise ValueError(f"{name} must be {dtype} as in training, got {values[cast != values][0]}")
    return cast


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Refuses a name that is not among the choices.

    Args:
      name: what is chosen.
      value: the choice.
      choices: all that there are.

    Raises:
      ValueError: it is another one.
    """
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}; it is {' or '.join(map(repr, choices))}")


def differing(was: Mapping[str, Any], now: Mapping[str, Any], text: str) -> list[str]:
    """What is different in two mappings.

    Args:
      was: values by key; one that is absent is None.
      now: the same.
      text: a format of the key and of both values.

    Returns:
      A text for each key with different values, in the order that they have now.
    """
    pairs = {key: (was.get(key), now.get(key)) for key in (*now, *was)}
    return [text.format(key, *pair) for key, pair in pairs.items() if pair[0] != pair[1]]


@contextlib.contextmanager
def prefixed(
    what: Any,
    errors: type[Exception] | tuple[type[Exception], ...] = ValueError,
    to: type[Exception] = ValueError,
) -> Iterator[None]:
    """Puts what an error is about before its message.

    Args:
      what: what is being worked on, such as a path.
      errors: which errors.
      to: what they become.
    """
    try:
        yield
    except errors as error:
        raise to(f"{what}: {error}") from error


def class_labels(labels: Any, num_classes: int) -> np.ndarray:
    """Labels of samples, checked.

    Args:
      labels: `[N]`, at least one.
      num_classes: of the data.

    Returns:
      `int32[N]`.

    Raises:
      ValueError: they are no integers in `[0, num_classes)`.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer) or not len(labels):
        raise ValueError(f"labels must be integers [N], got {labels.dtype}{list(labels.shape)}")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"labels must be in [0, {num_classes}), got {labels.min()} to {labels.max()}"
        )
    return labels.astype(np.int32)


def whole(name: str, value: Any, low: int, high: int = 2**31 - 1) -> int:
    """A whole number within limits.

    Args:
      name: the argument's name.
      value: an integer, or another number that is whole.
      low: least value.
      high: largest value, by default that of an int32.

    Returns:
      The number.

    Raises:
      ValueError: it is traced, not a whole number, or outside of the limits.
    """
    if isinstance(value, jax.core.Tracer):
        raise ValueError(f"{name} decides the program's size and cannot be traced")
    try:
        number = operator.index(int(value) if value == int(value) else value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} must be a whole number, got {value!r}") from None
    if number < low:
        raise ValueError(f"{name} must be at least {low}, got {number}")
    if number > high:
        raise ValueError(f"{name} must be at most {high}, got {number}")
    return number


def guidance_scales(scale: ArrayLike, number: int) -> np.ndarray:
    """Guidance scales of samples, checked.

    Args:
      scale: a number or `[number]`.
      number: of samples.

    Returns:
      `float32[number]`.

    Raises:
      ValueError: it has another shape, or a scale is negative or not finite.
    """
    scale = np.asarray(scale)
    if scale.shape not in ((), (number,)):
        raise ValueError(f"guidance must be a number or [{number}], got {list(scale.shape)}")
    check_between("guidance", scale, 0)
    return np.broadcast_to(np.float32(scale), (number,))


def guidance_cautions(scales: ArrayLike, trained: Sequence[float]) -> list[str]:
    """Finds guidance scales that a student was not trained for.

    Args:
      scales: guidance scales, any number of them.
      trained: `(low, high)` of the scales of training; empty if the scale is no input.

    Returns:
      At most one sentence.
    """
    if not trained:
        return []
    (low, high), scales = trained, np.unique(np.float32(scales))
    outside = scales[(scales < np.float32(low)) | (scales > np.float32(high))]
    return [
        f"this student was trained for guidance from {low:g} to {high:g}; guidance={scale:g} is "
        "outside, where samples may be poor"
        for scale in outside[-1:]
    ]


def lora_strengths(loras: Any) -> dict[str, float]:
    """Strengths of LoRA files.

    Args:
      loras: a mapping from paths to strengths, or a list of entries `path` or `path@strength`, or
        one such entry.

    Returns:
      The strengths by path, in order.

    Raises:
      ValueError: a strength is not one finite number.
    """
    if isinstance(loras, str | os.PathLike):
        loras = [loras]
    pairs = loras.items() if isinstance(loras, Mapping) else map(_parsed, loras)
    found: dict[str, float] = {}
    for path, strength in pairs:
        check_number(f"the strength of {path}", strength, finite=True)
        found[os.fspath(path)] = found.get(os.fspath(path), 0.0) + float(strength)
    return found


def _parsed(entry: str | os.PathLike) -> tuple[str, float]:
    entry = os.fspath(entry)
    path, at, strength = entry.rpartition("@")
    try:
        return (path, float(strength)) if at else (entry, 1.0)
    except ValueError:  # the sign belongs to the path
        return entry, 1.0
