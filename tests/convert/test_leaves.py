"""Parts of leaves are those of whole leaves, and need no more than rows of the files."""

import itertools

import ml_dtypes
import numpy as np
import pytest

from piflow_jax import safetensors_files
from piflow_jax.convert import load_torch_state, open_weights, write_safetensors
from piflow_jax.convert.rules import LazyPlace, Rule
from tests.convert.test_files import save_torch
from tests.doors.test_weights import load, state


@pytest.fixture
def counted(monkeypatch):
    """Lengths of the ranges that are read of files."""
    lengths, opened = [], safetensors_files._bytes_of

    def counting(path):
        size, fetch = opened(path)
        return size, lambda first, last: (lengths.append(last - first), fetch(first, last))[1]

    monkeypatch.setattr(safetensors_files, "_bytes_of", counting)
    return lengths


def leaves_of(name, arrays):
    """The leaves of a network, not read yet."""
    leaves = {}
    given = {"num_heads": 2, "sample_size": 4} if "dit" in name else {"axes_dims_rope": (4, 6, 6)}
    place = LazyPlace(lambda path, leaf: leaves.setdefault(path, leaf))
    load_torch_state(arrays, name, place=place, **given)
    return leaves


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("name", ["dit", "gm_dit", "flux", "gm_flux", "qwen_image"])
def test_any_part_is_that_of_the_whole(tmp_path, name, suffix):
    path = tmp_path / f"x{suffix}"
    save = save_torch if suffix == ".pth" else write_safetensors
    save(path, state(name))
    _, expected = load(name, state(name))
    rng = np.random.default_rng(0)
    for key, leaf in leaves_of(name, open_weights(path)).items():
        whole = expected["params"]
        for part in key:
            whole = whole[part]
        for _ in range(4):
            ends = [np.sort(rng.choice(size + 1, 2, replace=False)) for size in leaf.shape]
            index = tuple(slice(*map(int, pair)) for pair in ends)[: rng.integers(leaf.ndim) + 1]
            np.testing.assert_array_equal(leaf[index], np.asarray(whole)[index], err_msg=str(key))


@pytest.mark.parametrize(
    ("pattern", "rows", "index", "lengths"),
    [
        # Of two arrays of 3 x 4 rows of 6 numbers: rows, those of each piece, those of one array.
        ("n (s o) i -> i n s o", (1, 2, 3), (), [144, 144]),
        ("n (s o) i -> i n s o", (1, 2, 3), (slice(2, 3),), [144, 144]),
        ("n (s o) i -> i n s o", (1, 2, 3), (..., slice(1, 3)), [24] * 6),
        ("n (s o) i -> i n s o", (1, 2, 3), (..., slice(1, 3), slice(None)), [96, 96]),
        ("n (s o) i -> i n s o", (1, 2, 3), (slice(None), slice(1, 2), slice(1), slice(1)), [12]),
        # Axes in another order are read whole, and so are columns.
        ("n (s o) i -> i n (o s)", (1,), (..., slice(2)), [144, 144]),
        ("n o (s i) -> s i n o", (2, 3), (slice(1),), [144, 144]),
    ],
)
def test_no_other_rows_are_read(tmp_path, counted, pattern, rows, index, lengths):
    sizes = {"s": 3, "o": 4, "i": 6} if "(s o)" in pattern else {"s": 3, "o": 12, "i": 2}
    rule = Rule(("a", "b"), ("kernel",), pattern, sizes)
    rng = np.random.default_rng(0)
    arrays = {n: rng.normal(size=(12, 6)).astype(ml_dtypes.bfloat16) for n in ("a", "b")}
    write_safetensors(tmp_path / "x.safetensors", arrays)
    leaf = rule.leaf(open_weights(tmp_path / "x.safetensors"))
    assert leaf.rows == rows
    index = tuple(
        itertools.chain.from_iterable(
            [slice(None)] * (leaf.ndim + 1 - len(index)) if i is ... else [i] for i in index
        )
    )
    counted.clear()
    part = leaf[index]
    assert counted == lengths
    assert [12 * (rows.stop - rows.start) for _, rows in leaf.reads(index)] == lengths
    np.testing.assert_array_equal(part, rule.leaf(arrays)[()][index])


def test_numbers_are_checked_in_the_part_that_is_read(tmp_path):
    array = np.ones((4, 2), np.float32)
    array[3, 1] = np.nan
    write_safetensors(tmp_path / "x.safetensors", {"a": array})
    weights = open_weights(tmp_path / "x.safetensors")
    leaf = Rule(("a",), ("kernel",), "o i -> i o", {"o": 4, "i": 2}).leaf(weights)
    assert leaf[slice(None), slice(0, 3)].tolist() == [[1, 1, 1]] * 2
    with pytest.raises(ValueError, match="1 of the 2 numbers of a are not finite"):
        leaf[slice(None), slice(3, 4)]


def test_scaled_float8_is_read_in_parts(tmp_path, counted):
    rng = np.random.default_rng(0)
    small = rng.normal(size=(256, 130)).astype(ml_dtypes.float8_e4m3fn)
    for scale in (2.0, rng.random(256), rng.random((256, 1)), rng.random((2, 2))):
        scale = np.asarray(scale, np.float32)
        arrays = {"a.weight": small, "a.weight_scale": scale}
        write_safetensors(tmp_path / "x.safetensors", arrays)
        array = open_weights(tmp_path / "x.safetensors")["a.weight"]
        blocks = scale.shape == (2, 2)
        factor = scale.repeat(128, 0).repeat(128, 1)[:, :130] if blocks else scale.reshape(-1, 1)
        expected = small.astype(np.float32) * factor
        np.testing.assert_array_equal(np.asarray(array), expected)
        counted.clear()
        np.testing.assert_array_equal(array[slice(120, 140),], expected[120:140])
        assert sorted(counted) == sorted([scale.nbytes, 20 * 130])
