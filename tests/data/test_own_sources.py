"""Data of a caller's own: arrays, and sources that are not what `Source` says."""

import numpy as np
import pytest

from piflow_jax.data import as_source
from piflow_jax.data.source import check_source, source_digest

X = np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32)
LABELS = np.arange(8) % 2
BROKEN = np.where(np.arange(8)[:, None] == 5, np.nan, X)


class Examples:
    """A data set as PyTorch has them."""

    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        return X[index], LABELS[index]


class Own:
    """A source of one's own, of the examples of a function."""

    name, shape = "mine", (2,)

    def __init__(self, example, length=8, **more):
        self._example, self._length = example, length
        vars(self).update(more)

    def __len__(self):
        return self._length

    def __getitem__(self, index):
        return self._example(index)


NO_ARRAYS = {
    "iterator": iter([X]),
    "examples": Examples(),
    "list": [X, LABELS],
    "three": (X, LABELS, X),
    "mapping": {"x": X},
    "text": np.array(["a", "b"]),
    "complex": X * 1j,
    "number": 3.0,
}


@pytest.mark.parametrize("kind", NO_ARRAYS)
def test_what_is_no_array_says_what_to_pass(kind):
    words = r"arrays: x must be an array of numbers .*: pass arrays x\[N, .* or a piflow_jax.data"
    with pytest.raises(ValueError, match=words):
        as_source(NO_ARRAYS[kind])


CONDITIONS = {
    "a number": ({"pose": 3.0}, r"arrays: condition\.pose must be an array of numbers"),
    "text": ({"pose": np.array(["a"] * 8)}, r"condition\.pose must be .* got <U1\[8\]"),
    "mapping": ({"pose": {"a": X}}, r"condition\.pose must be .* got a mapping of a"),
    "NaN": ({"pose": BROKEN}, r"condition\.pose has NaN or infinity"),
    "beyond": (np.full(8, 2**40), "labels must be below 2,147,483,647, got 1099511627776"),
    "columns": (LABELS[:, None], r"labels must be integers \[N\], got int64\[8, 1\]"),
}


@pytest.mark.parametrize("kind", CONDITIONS)
def test_a_condition_that_cannot_be_one_is_named(kind):
    condition, words = CONDITIONS[kind]
    with pytest.raises(ValueError, match=words):
        as_source((X, condition))


def labelled(make):
    return Own(lambda i: {"x": X[i], "condition": make(i)}, num_classes=2)


WRONG = {
    "empty": (Own(lambda i: {"x": X[i]}, length=0), "mine is empty"),
    "pair": (Own(lambda i: (X[i], i)), "example 0 must be a mapping with `x`.* got a tuple of 2"),
    "array": (Own(lambda i: X[i]), r"must be a mapping with `x`.* got float32\[2\]"),
    "name": (Own(lambda i: {"image": X[i]}), "must be a mapping with `x`.* a mapping of image"),
    "shape": (Own(lambda i: {"x": X[i][:1]}), r"`x` is \[1\], the source says \[2\]"),
    "one shape": (Own(lambda i: {"x": X[i][: 2 - i // 7]}), r"example 7: `x` is \[1\]"),
    "NaN": (Own(lambda i: {"x": BROKEN[i]}), "mine: example 5: `x` has NaN or infinity"),
    "pixels": (Own(lambda i: {"x": np.uint8([i, 255])}), "example 0: `x` must be about .* uint8"),
    "no label": (labelled(lambda i: None), "example 0 has no `condition`, and .* num_classes = 2"),
    "label": (labelled(lambda i: np.int32(i % 3)), r"example 2: its label .* in \[0, 2\), got"),
    "label below": (labelled(lambda i: -1), r"its label must be an integer in \[0, 2\), got -1"),
    "fraction": (labelled(lambda i: 0.5), r"its label must be an integer in \[0, 2\), got 0\.5"),
    "labels": (labelled(lambda i: np.int32([i])), "its label must be an integer"),
    "condition": (
        Own(lambda i: {"x": X[i], "condition": {"pose": BROKEN[i]}}),
        r"example 5: condition\.pose has NaN or infinity",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_source_that_is_not_as_it_says_is_refused_by_example(kind):
    source, words = WRONG[kind]
    with pytest.raises(ValueError, match=words):
        check_source(source)


RIGHT = {
    "array": as_source(X.astype(np.float64)),
    "rows of a list": as_source(X.tolist()),
    "labels": as_source((X, LABELS.tolist())),
    "conditions": as_source((X, {"pose": X.tolist()})),
    "one": as_source(X[:1]),
    "float64": Own(lambda i: {"x": X[i].astype(np.float64)}),
    "a list": Own(lambda i: {"x": X[i].tolist(), "condition": i % 2}, num_classes=2),
    "drawn": Own(lambda i: {"x": np.zeros(5)}, draw=lambda key, x: x[:, :2]),
    "without states": Own(lambda i: {"x": np.zeros((0,), np.float32)}),
    "buckets": Own(lambda i: {"x": np.zeros((3 + i // 4, 2))}, bucket_sizes=(4, 4)),
}


@pytest.mark.parametrize("kind", RIGHT)
def test_what_is_a_source_passes(kind):
    check_source(RIGHT[kind])


def test_the_examples_that_are_checked_are_those_of_the_digest():
    seen = []
    source = Own(lambda i: seen.append(i) or {"x": X[0]}, length=1000)
    check_source(source)
    checked, seen[:] = list(seen), []
    source_digest(source)
    assert checked == seen and len(seen) == 256 and seen[0] == 0 and seen[-1] == 999
