"""Weight files: lazily in, atomically out, never running anything."""

import argparse
import builtins
import gc
import json
import os
import pickle
import stat
import subprocess
import sys
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from piflow_jax.convert import (
    load_torch_state,
    open_weights,
    to_torch_state,
    write_safetensors,
)
from piflow_jax.convert.files import LazyArray
from tests.compiled import on_devices
from tests.golden_files import load

MODELS = {
    "dit_teacher.npz": ("dit", {"num_heads": 2, "sample_size": 8}),
    "gmdit_student.npz": ("gm_dit", {"num_heads": 2, "sample_size": 8}),
    "dxdit_student.npz": ("dx_dit", {"num_heads": 2, "sample_size": 8}),
    "autoencoder_kl.npz": ("vae", {"norm_groups": 4}),
}
SMALL = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b.bias": np.ones(3, np.float16),
}


def recorded(name):
    return {n.removeprefix("sd/"): a for n, a in load(name)[1].items() if n.startswith("sd/")}


def save_torch(path, content, **options):
    torch = pytest.importorskip("torch")

    def tensors(value):
        if isinstance(value, dict):
            return {name: tensors(inner) for name, inner in value.items()}
        if not isinstance(value, np.ndarray):
            return value
        if value.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(value.view(np.int16).copy()).view(torch.bfloat16)
        return torch.from_numpy(value.copy())

    torch.save(tensors(content), path, **options)
    return path


def assert_bit_equal(actual, expected):
    assert set(actual) == set(expected)
    for name, array in expected.items():
        found = np.asarray(actual[name])
        assert (found.dtype, found.shape) == (array.dtype, array.shape), name
        assert found.tobytes() == array.tobytes(), name


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("name", MODELS)
def test_round_trip_is_bit_exact(tmp_path, name, suffix):
    state = recorded(name)
    path = tmp_path / f"weights{suffix}"
    save_torch(path, state) if suffix == ".pth" else write_safetensors(path, state)
    weights = open_weights(path)
    assert_bit_equal(weights, state)
    model, sizes = MODELS[name]
    module, params = load_torch_state(weights, model, **sizes)
    out = tmp_path / "out.safetensors"
    write_safetensors(out, to_torch_state(module, params))
    assert_bit_equal(open_weights(out), state)
    _, placed = load_torch_state(weights, model, **sizes, place=lambda path, leaf: leaf)
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(placed))
    assert_bit_equal(to_torch_state(module, placed), state)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_every_dtype_survives(tmp_path, suffix):
    dtypes = (np.float64, np.float16, ml_dtypes.bfloat16, np.int64, np.uint8, np.bool_)
    state = {np.dtype(d).name: np.array([[0, 1, 3]]).astype(d) for d in dtypes}
    state |= {"scalar": np.array(2.5, np.float32), "empty": np.zeros((0, 3), np.float32)}
    path = tmp_path / f"x{suffix}"
    save_torch(path, state) if suffix == ".pth" else write_safetensors(path, state)
    weights = open_weights(path)
    assert_bit_equal(weights, state)
    for name, array in state.items():
        assert (weights[name].dtype, weights[name].ndim) == (array.dtype, array.ndim)
        assert weights.shape(name) == np.shape(weights[name]) == array.shape


def test_views_are_written_as_they_look(tmp_path):
    table = np.arange(12, dtype=np.float32).reshape(3, 4)
    state = {"t": table.T, "step": table[::2, 1:], "jax": jnp.arange(3.0), "lazy": table}
    state["lazy"] = LazyArray((3, 4), np.float32, lambda: table)
    write_safetensors(tmp_path / "x.safetensors", state, {"policy_config": "{}"})
    weights = open_weights(tmp_path / "x.safetensors")
    assert weights.metadata == {"policy_config": "{}"}
    for name, array in state.items():
        np.testing.assert_array_equal(np.asarray(weights[name]), np.asarray(array))


def test_bfloat16_weights_become_a_bfloat16_model(tmp_path):
    state = {n: a.astype(ml_dtypes.bfloat16) for n, a in recorded("dit_teacher.npz").items()}
    path = save_torch(tmp_path / "x.pth", state)
    module, params = load_torch_state(open_weights(path), "dit", num_heads=2, sample_size=8)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert_bit_equal(to_torch_state(module, params), state)


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, SMALL)
    before = path.read_bytes()
    assert stat.S_IMODE(path.stat().st_mode) & 0o400
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_safetensors(path, {"other": np.zeros(100)})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


class Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_runs_code_is_refused(tmp_path, legacy):
    mark = tmp_path / "was_run"
    content = {"model": SMALL, "args": Bomb(mark)}
    path = save_torch(tmp_path / "bad.pth", content, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"bad\.pth.*could run code.*\.safetensors"):
        open_weights(path)
    assert not mark.exists()
    (tmp_path / "plain.bin").write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(ValueError, match=r"plain\.bin.*could run code"):
        open_weights(tmp_path / "plain.bin")
    assert not mark.exists()
    # The mark is one that the pickle does make.
    pickle.loads((tmp_path / "plain.bin").read_bytes())
    assert mark.exists()


def test_without_torch_the_error_names_file_and_remedy(tmp_path, monkeypatch):
    (tmp_path / "x.pth").write_bytes(b"")
    real = builtins.__import__

    def no_torch(name, *args, **kwargs):
        if name == "torch":
            raise ImportError("No module named 'torch'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_torch)
    with pytest.raises(ImportError, match=r"x\.pth.*pip install torch.*\.safetensors"):
        open_weights(tmp_path / "x.pth")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".legacy.pth"])
@pytest.mark.parametrize("keep", [0, 5, 40, -1, -60])
def test_a_file_cut_short_is_named(tmp_path, suffix, keep):
    path = tmp_path / f"x{suffix}"
    state = {f"layer.{i}": np.ones((9, 9), np.float32) for i in range(9)}
    if suffix == ".safetensors":
        write_safetensors(path, state)
    else:
        save_torch(path, state, _use_new_zipfile_serialization=suffix == ".pth")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"x(\.legacy)?\.(safetensors|pth) is damaged"):
        open_weights(path)


def test_a_file_cut_short_while_it_is_read_is_named(tmp_path):
    path = tmp_path / "w.safetensors"
    write_safetensors(path, {"w": np.arange(9.0)})
    arrays = open_weights(path)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 8)
    with pytest.raises(OSError, match=rf"{path} was cut short while it was read"):
        np.asarray(arrays["w"])


def test_files_that_are_no_longer_needed_are_closed(tmp_path):
    path = tmp_path / "w.safetensors"
    write_safetensors(path, {"w": np.arange(9.0)})

    def opened():
        links = [Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd")]
        return sum(os.path.realpath(link) == os.path.realpath(path) for link in links)

    arrays = open_weights(path)
    assert opened() == 1
    del arrays
    gc.collect()
    assert opened() == 0


def test_missing_and_unknown_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth: no such"):
        open_weights(tmp_path / "nowhere.pth")
    (tmp_path / "x.npz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"x\.npz: unknown kind.*\.safetensors"):
        open_weights(tmp_path / "x.npz")
    with pytest.raises(FileNotFoundError, match="directory without weight files"):
        open_weights(tmp_path)
    os.mkfifo(tmp_path / "pipe.safetensors")  # of which a reader would wait for ever
    with pytest.raises(ValueError, match=r"pipe\.safetensors is not a regular file"):
        open_weights(tmp_path / "pipe.safetensors")
    with pytest.raises(FileNotFoundError, match="directory without weight files"):
        open_weights(tmp_path)
    with pytest.raises(ValueError, match=r"list\.pth holds a list"):
        open_weights(save_torch(tmp_path / "list.pth", [1, 2]))
    with pytest.raises(ValueError, match=r"none\.pth holds no tensors"):
        open_weights(save_torch(tmp_path / "none.pth", {"step": 3, "opt": {"lr": 0.1}}))


def shards(folder):
    first, second = ({n: a} for n, a in SMALL.items())
    write_safetensors(folder / "m-00001-of-00002.safetensors", first)
    write_safetensors(folder / "m-00002-of-00002.safetensors", second)
    where = {"a.weight": "m-00001-of-00002.safetensors", "b.bias": "m-00002-of-00002.safetensors"}
    return folder / "m.safetensors.index.json", where


def test_shards_by_index_and_by_directory(tmp_path):
    index, where = shards(tmp_path)
    index.write_text(json.dumps({"metadata": {"total_size": 30}, "weight_map": where}))
    for path in (index, tmp_path):
        assert_bit_equal(open_weights(path), SMALL)


def test_faults_of_an_index(tmp_path):
    index, where = shards(tmp_path)
    first = where["a.weight"]
    for weight_map, error, message in [
        (where | {"c": first}, ValueError, f"{first} lacks c"),
        ({"b.bias": where["b.bias"], "c": first}, ValueError, f"{first} has the unlisted a.weight"),
        (where | {"c": "gone.safetensors"}, FileNotFoundError, "missing shards gone.safetensors"),
        (where | {"c": "../x.safetensors"}, ValueError, "outside its own directory"),
        ([1], ValueError, "no index of shards"),
    ]:
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(error, match=message):
            open_weights(index)
    for content in ('{"weight_map": {', "[" * 99_999):
        index.write_text(content)
        with pytest.raises(ValueError, match=r"index\.json is no index"):
            open_weights(index)
    many = {f"c{i}": first for i in range(99)}
    index.write_text(json.dumps({"weight_map": where | many}))
    with pytest.raises(ValueError, match=r"lacks c0\n(.*\n){19}  and 79 more$"):
        open_weights(index)


def test_a_directory_with_one_file_or_with_several(tmp_path):
    write_safetensors(tmp_path / "diffusion_pytorch_model.safetensors", SMALL)
    (tmp_path / "config.json").write_text("{}")
    assert_bit_equal(open_weights(tmp_path), SMALL)
    write_safetensors(tmp_path / "diffusion_pytorch_model.bf16.safetensors", SMALL)
    with pytest.raises(ValueError, match=r"several weight files.*model\.bf16\.safetensors, diff"):
        open_weights(tmp_path)


def test_the_part_of_a_pipeline_comes_before_files_beside_it(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    for place, by in ((".", 0), ("transformer", 1), ("vae", 2)):
        (tmp_path / place).mkdir(exist_ok=True)
        write_safetensors(tmp_path / place / "one.safetensors", shifted(by))
    assert_bit_equal(open_weights(tmp_path), shifted(1))
    assert_bit_equal(open_weights(tmp_path, part="vae"), shifted(2))
    (tmp_path / "transformer" / "one.safetensors").unlink()
    assert_bit_equal(open_weights(tmp_path), SMALL)


def shifted(by):
    return {name: array + np.asarray(by, array.dtype) for name, array in SMALL.items()}


def prefixed(*parts):
    return {f"{prefix}{n}": a for prefix, state in parts for n, a in state.items()}


PIFLOW = prefixed(
    ("diffusion.denoising.", SMALL),
    ("diffusion_ema.denoising.", shifted(1)),
    ("vae.encoder.", shifted(2)),
)
FULL = PIFLOW | prefixed(("teacher.denoising.", shifted(3)))


@pytest.mark.parametrize(
    ("content", "select", "by", "selected"),
    [
        (SMALL, None, 0, ""),
        (prefixed(("module.", SMALL)), None, 0, ""),
        (prefixed(("module.", SMALL)), "module", 0, "module"),
        ({"model": SMALL, "ema": shifted(1), "opt": {"state": {0: {}}}}, None, 1, "ema"),
        ({"model": SMALL, "ema": shifted(1)}, "model", 0, "model"),
        ({"state_dict": SMALL, "step": np.ones(())}, None, 0, "state_dict"),
        ({"net": prefixed(("module.", SMALL))}, None, 0, "net"),
        ({"state_dict": PIFLOW}, None, 1, "state_dict/diffusion_ema.denoising"),
        ({"state_dict": PIFLOW}, "diffusion.denoising", 0, "state_dict/diffusion.denoising"),
        (prefixed(("module.", FULL)), "teacher.denoising.", 3, "teacher.denoising"),
        (FULL, "diffusion_ema.denoising", 1, "diffusion_ema.denoising"),
        (prefixed(("denoising.", SMALL)), None, 0, "denoising"),
    ],
)
def test_the_network_in_a_checkpoint(tmp_path, content, select, by, selected):
    weights = open_weights(save_torch(tmp_path / "x.pt", content), select)
    assert_bit_equal(weights, shifted(by))
    assert weights.selected == selected


@pytest.mark.parametrize(
    ("content", "select", "message"),
    [
        ({"generator": SMALL, "encoder": SMALL}, None, "select one of: generator, encoder"),
        ({"generator": SMALL, "ema": SMALL}, None, "select one of: generator, ema"),
        ({"generator": SMALL, "ema": SMALL}, "model", "no part 'model'.*generator, ema"),
        (FULL, None, "one of: diffusion.denoising, diffusion_ema.denoising, teacher.denoising"),
        (SMALL, "ema", r"no part 'ema'.*\['a.weight', 'b.bias'\]"),
        ({"model": SMALL, "ema": SMALL}, "emma", r"no part 'emma'; keys are \['model', 'ema'\]"),
    ],
)
def test_an_unclear_choice_lists_what_there_is(tmp_path, content, select, message):
    with pytest.raises(ValueError, match=message):
        open_weights(save_torch(tmp_path / "x.pt", content), select)


def test_the_choice_is_logged(tmp_path, caplog):
    path = save_torch(tmp_path / "x.pt", {"model": SMALL, "ema": SMALL, "opt": {"lr": 1}})
    with caplog.at_level("INFO", logger="absl"):
        open_weights(path)
    assert "took ema, not model, opt" in caplog.text


def test_the_command_line_in_a_checkpoint_is_no_obstacle(tmp_path):
    args = argparse.Namespace(model="DiT-XL/2", image_size=256, ckpt=None)
    path = save_torch(tmp_path / "x.pt", {"model": SMALL, "ema": shifted(1), "args": args})
    assert_bit_equal(open_weights(path), shifted(1))


def test_names_of_a_file_may_be_taken_as_they_are(tmp_path):
    write_safetensors(tmp_path / "x.safetensors", PIFLOW)
    assert_bit_equal(open_weights(tmp_path / "x.safetensors", ""), PIFLOW)
    assert_bit_equal(open_weights(tmp_path / "x.safetensors", "vae.encoder"), shifted(2))


class Counter:
    """Lazy copies of a state that know how many of what they gave out is alive."""

    def __init__(self, state):
        self.alive = self.most = self.reads = 0
        self.state = {n: self._lazy(a) for n, a in state.items()}

    def _lazy(self, array):
        return LazyArray(array.shape, array.dtype, lambda: self._read(array))

    def _read(self, array):
        copy = array.copy()
        self.reads += 1
        self.alive += 1
        self.most = max(self.most, self.alive)
        weakref.finalize(copy, self._gone)
        return copy

    def _gone(self):
        self.alive -= 1


def test_leaves_are_built_and_placed_one_by_one():
    counter = Counter(recorded("dit_teacher.npz"))
    leaves, reads, most = [], {}, {}

    def place(path, leaf):
        # Nothing that was read, and no earlier leaf, is still in memory.
        assert counter.alive == 0 and not any(ref() is not None for ref in leaves)
        assert isinstance(leaf, np.ndarray) and leaf.flags["C_CONTIGUOUS"]
        leaves.append(weakref.ref(leaf))
        reads[path], most[path] = counter.reads, counter.most
        counter.reads = counter.most = 0
        return leaf.shape

    _, params = load_torch_state(counter.state, "dit", num_heads=2, sample_size=8, place=place)
    # The fused queries, keys and values of 2 blocks are 6 tensors, of which 3 meet in memory.
    assert (reads["blocks", "qkv", "kernel"], most["blocks", "qkv", "kernel"]) == (6, 3)
    assert (reads["blocks", "mlp_in", "kernel"], most["blocks", "mlp_in", "kernel"]) == (2, 1)
    assert params["params"]["blocks"]["qkv"]["kernel"] == (2, 16, 3, 16)


def test_nothing_is_read_before_all_names_and_shapes_fit():
    state = recorded("dit_teacher.npz")
    state["surplus"] = np.zeros(3)
    del state["proj_out_1.bias"]
    state = {n: a for n, a in state.items() if not n.startswith("proj_out_2")}
    counter = Counter(state)
    with pytest.raises(ValueError, match=r"missing proj_out_1\.bias[\s\S]*unexpected surplus"):
        load_torch_state(counter.state, "dit", num_heads=2, sample_size=8)
    assert counter.reads == 0


SHARDED = """
import sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from piflow_jax.convert import load_torch_state, open_weights
mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
def place(path, leaf):
    spec = P(*(None,) * (leaf.ndim - 1), "d") if leaf.shape[-1] % 8 == 0 else P()
    return jax.device_put(leaf, NamedSharding(mesh, spec))
sizes = dict(num_heads=2, sample_size=8)
weights = open_weights(sys.argv[1])
_, sharded = load_torch_state(weights, "dit", **sizes, place=place)
_, whole = load_torch_state(weights, "dit", **sizes)
kernel = sharded["params"]["blocks"]["qkv"]["kernel"]
assert len(kernel.addressable_shards) == 8, kernel.sharding
assert kernel.addressable_shards[0].data.shape == (2, 16, 3, 2)
jax.tree.map(np.testing.assert_array_equal, sharded, whole)
print("placed")
"""


def test_leaves_go_straight_onto_eight_devices(tmp_path):
    write_safetensors(tmp_path / "x.safetensors", recorded("dit_teacher.npz"))
    done = subprocess.run(
        [sys.executable, "-c", SHARDED, str(tmp_path / "x.safetensors")],
        cwd=Path(__file__).parents[2],
        env={"PATH": ""} | on_devices(8),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "placed" in done.stdout
