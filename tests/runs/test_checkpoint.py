"""Checkpoints saved and restored, and what they refuse, on real files."""

import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
from etils import epath

from piflow_jax.runs import checkpoint
from piflow_jax.runs.checkpoint import (
    Checkpointer,
    CheckpointError,
    check_spec,
    read_spec,
    restore_subtree,
)
from tests.runs.checkpoints import (
    JSON,
    abstract,
    assert_same_bits,
    data_files,
    make_state,
    restore,
    save,
)


@pytest.mark.parametrize("concrete", [False, True])
def test_round_trip_is_exact(saved, concrete):
    like = make_state(7) if concrete else abstract(make_state(7))
    restored = restore(saved, like)
    assert restored.step == 2
    assert_same_bits(restored.state, make_state(2))
    assert (restored.data_state, restored.config, restored.spec) == tuple(JSON.values())
    assert_same_bits(restore(saved, like, step=1).state, make_state(1))


def test_restores_to_the_shardings_asked_for(saved):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), make_state()
    )
    state = restore(saved, like.replace(host=make_state().host)).state
    assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(state.replace(host=None)))
    with pytest.raises(CheckpointError, match=r"host: int64\[5\] in the checkpoint, int32\[5\]"):
        restore(saved, like)  # JAX would drop the upper halves without jax_enable_x64


def test_save_may_be_followed_by_donation(tmp_path):
    """The background write must not see what the next step writes into the donated buffers."""
    state = {"w": jnp.zeros((1 << 21,)), "step": jnp.zeros((), jnp.int32)}
    increment = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    with Checkpointer(tmp_path) as checkpointer:
        for step in range(1, 4):
            state = increment(state)
            checkpointer.save(step, state, **JSON)
        for _ in range(20):
            state = increment(state)
        restored = checkpointer.restore(state).state
    np.testing.assert_array_equal(np.asarray(restored["w"]), 3)
    np.testing.assert_array_equal(np.asarray(increment(restored)["w"]), 4)  # donatable itself


def test_relative_directories_are_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save("runs/x", 1)
    assert read_spec("runs/x") == (1, JSON["spec"], JSON["config"])


def test_keeps_the_last_steps(tmp_path):
    save(tmp_path, 1, 2, 3, 4, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.isdigit()) == ["3", "4"]


@pytest.mark.parametrize("make", [lambda p: None, Path.mkdir])
def test_none_for_an_absent_or_empty_directory(tmp_path, make):
    directory = tmp_path / "checkpoints"
    make(directory)
    with Checkpointer(directory) as checkpointer:
        assert checkpointer.latest_step() is None
        with pytest.raises(CheckpointError, match=f"no checkpoint in {directory}"):
            checkpointer.restore(abstract(make_state()))


def test_processes_that_see_other_directories_say_so(saved, monkeypatch):
    """One that goes on from another step, or begins anew, would wait for the others for ever."""
    gather = lambda step: np.stack([np.int32(4), step])  # noqa: E731
    with Checkpointer(saved) as checkpointer, monkeypatch.context() as two:
        two.setattr(jax, "process_count", lambda: 2)
        two.setattr(jax.experimental.multihost_utils, "process_allgather", gather)
        with pytest.raises(CheckpointError, match=r"different steps in .* \(step 4, step 2\): all"):
            checkpointer.latest_step()
    opened = lambda *_, **__: type("Opened", (), {"close": lambda self: None})()  # noqa: E731
    monkeypatch.setattr(checkpoint.ocp, "CheckpointManager", opened)  # makes it elsewhere
    with pytest.raises(
        CheckpointError, match=r"no .*elsewhere here, where process 0 made one: all"
    ):
        Checkpointer(saved / "elsewhere")


def test_foreign_files_alone_are_refused_and_beside_steps_ignored(saved, tmp_path):
    (tmp_path / "checkpoints.tar").touch()
    with pytest.raises(CheckpointError, match=r"other things: checkpoints\.tar"):
        Checkpointer(tmp_path)
    shutil.copytree(saved / "2", tmp_path / "2")
    assert restore(tmp_path).step == 2


def test_an_unfinished_step_that_vanishes_is_no_foreign_file(tmp_path, monkeypatch):
    """Another process's Orbax removes them while this one looks."""
    unfinished = tmp_path / "3.orbax-checkpoint-tmp"
    iterdir = epath.Path(tmp_path).__class__.iterdir
    monkeypatch.setattr(
        epath.Path(tmp_path).__class__, "iterdir", lambda self: [*iterdir(self), self / unfinished]
    )
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest_step() is None


def test_a_file_instead_of_a_directory(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=f"{tmp_path}/file is a file"):
        Checkpointer(tmp_path / "file")
    with pytest.raises(CheckpointError, match=f"cannot .* {tmp_path}/file/checkpoints"):
        Checkpointer(tmp_path / "file" / "checkpoints")


def test_absent_step_names_the_present_ones(saved):
    with pytest.raises(CheckpointError, match=r"no step 3 in .*; it has 1, 2"):
        restore(saved, step=3)


# -- incompatible ----------------------------------------------------------------------------------


def test_shapes_dtypes_and_names_that_differ_are_all_listed(saved):
    state = make_state(width=41)
    state = state.replace(
        step=jnp.asarray(0, jnp.int16),
        ema_params={"conv": jnp.zeros((3,))},
    )
    with pytest.raises(CheckpointError) as caught:
        restore(saved, abstract(state))
    message = str(caught.value)
    assert f"{saved}/2 does not fit" in message
    assert "step: int32[] in the checkpoint, int16[] here" in message
    assert "params/dense/kernel: float32[40, 40] in the checkpoint, float32[41, 41]" in message
    assert "ema_params/conv: nothing in the checkpoint, float32[3] here" in message
    assert "ema_params/dense/bias: bfloat16[40] in the checkpoint, nothing here" in message
    assert "--workdir" in message


def test_check_spec_lists_every_contradiction():
    saved = {"policy": "gm", "components": 16, "nfe": 1, "shift": [1, 2]}
    check_spec(saved, {"policy": "gm", "shift": (1, 2)}, "/runs/x/2")
    check_spec(saved, {}, "/runs/x/2")
    with pytest.raises(CheckpointError) as caught:
        check_spec(saved, {"policy": "dx", "components": 16, "nfe": 2, "labels": 3}, "/runs/x/2")
    message = str(caught.value)
    assert "/runs/x/2" in message and "components" not in message
    assert "policy: the checkpoint has 'gm', asked for 'dx'" in message
    assert "nfe: the checkpoint has 1, asked for 2" in message
    assert "labels: the checkpoint does not have it, asked for 3" in message


# -- parts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["ema_params", "ema_params/dense"])
def test_subtree(saved, key):
    wanted = make_state(2).ema_params
    wanted = wanted["dense"] if key.endswith("dense") else wanted
    assert_same_bits(restore_subtree(saved, key, abstract(wanted)), wanted)


def bytes_read() -> int:
    (metric,) = tensorstore.experimental_collect_matching_metrics(
        "/tensorstore/kvstore/file/bytes_read"
    )
    return metric["values"][0]["value"]


def test_subtree_reads_only_its_part(saved):
    """The part is a third of the state: it must take less than half of the reading."""
    counts = [bytes_read()]
    restore(saved)
    counts.append(bytes_read())
    restore_subtree(saved, "ema_params", abstract(make_state().ema_params))
    counts.append(bytes_read())
    whole, part = np.diff(counts)
    assert 40 * 40 * 4 < part < whole / 2


def test_subtree_errors(broken):
    with pytest.raises(CheckpointError, match="has no 'teacher'; its state has ema_params, host"):
        restore_subtree(broken, "teacher", {})
    with pytest.raises(CheckpointError, match=r"ema_params/dense/kernel: float32\[40, 40\]"):
        restore_subtree(broken, "ema_params", abstract(make_state(width=3).ema_params))
    messages = []
    for path in data_files(broken / "2"):
        content = path.read_bytes()
        for sixth in (1, 3, 5):  # three kernels share the files, one bit each
            flipped = bytearray(content)
            flipped[sixth * len(content) // 6] ^= 1
            path.write_bytes(flipped)
            try:
                restore_subtree(broken, "ema_params", abstract(make_state().ema_params))
            except CheckpointError as error:
                messages.append(str(error))
        path.write_bytes(content)
    assert any("corrupt: the values of ema_params/dense/kernel" in text for text in messages)


# -- saving ----------------------------------------------------------------------------------------


def test_saving_a_step_twice(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.save(3, make_state(3), **JSON)
        assert not checkpointer.save(3, make_state(3), **JSON)
        with pytest.raises(CheckpointError, match="already holds step 3 with a different state"):
            checkpointer.save(3, make_state(4), **JSON)
        with pytest.raises(CheckpointError, match="already holds step 3"):
            checkpointer.save(2, make_state(2), **JSON)
    with Checkpointer(tmp_path) as checkpointer:
        assert not checkpointer.save(3, make_state(3), **JSON)


@pytest.mark.parametrize(
    ("leaf", "message"),
    [(1.0, "leaf bad is a float"), (jax.random.key(0), "leaf bad has dtype key"), ("x", "str")],
)
def test_leaves_that_are_no_arrays(tmp_path, leaf, message):
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(TypeError, match=message):
        checkpointer.save(1, {"bad": leaf}, **JSON)


def test_json_that_is_none(tmp_path):
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(TypeError, match="config is not"):
        checkpointer.save(1, {"a": jnp.zeros(2)}, data_state={}, config={"f": print}, spec={})


def test_a_failed_background_write_surfaces(tmp_path):
    """The file size limit stands in for a full disk: writes fail with an OSError."""
    previous = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with Checkpointer(tmp_path) as checkpointer:
            checkpointer.save(1, make_state(1), **JSON)
            checkpointer.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, previous[1]))
            with pytest.raises(CheckpointError, match=f"cannot save .*{tmp_path}.*free space"):
                checkpointer.save(2, make_state(2, width=500), **JSON)
                checkpointer.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, previous)
            assert checkpointer.latest_step() == 1
            checkpointer.save(3, make_state(3), **JSON)  # space was made: goes on
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, previous)
        signal.signal(signal.SIGXFSZ, handler)
    assert_same_bits(restore(tmp_path).state, make_state(3))


def test_a_failed_write_surfaces_at_close_but_hides_no_other_exception(tmp_path, monkeypatch):
    def fail(self):
        raise OSError(28, "No space left on device")

    checkpointer = Checkpointer(tmp_path)
    close = checkpointer._manager.close
    monkeypatch.setattr(type(checkpointer._manager), "close", fail)
    with pytest.raises(CheckpointError, match="No space left on device"):
        checkpointer.close()
    with pytest.raises(ZeroDivisionError), Checkpointer(tmp_path):
        raise ZeroDivisionError
    monkeypatch.undo()
    close()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_directory(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(CheckpointError, match=f"cannot .*{tmp_path}"):
        Checkpointer(tmp_path)


def test_read_only_file_system(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(CheckpointError, match=f"cannot write checkpoints to {tmp_path}"):
        Checkpointer(tmp_path)


# -- fingerprints, noise ---------------------------------------------------------------------------


QUIET = """
import sys
from absl import logging
logging.set_verbosity(logging.INFO)
import jax.numpy as jnp
from piflow_jax.runs.checkpoint import Checkpointer, restore_subtree
state = {"ema_params": {"w": jnp.ones((8, 8))}}
with Checkpointer(sys.argv[1]) as checkpointer:
    for step in range(4):
        checkpointer.save(step, state, data_state={}, config={}, spec={})
with Checkpointer(sys.argv[1]) as checkpointer:
    checkpointer.restore(state)
restore_subtree(sys.argv[1], "ema_params", state["ema_params"])
"""


def test_nothing_on_a_newcomers_console(tmp_path):
    process = subprocess.run(
        [sys.executable, "-c", QUIET, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")
