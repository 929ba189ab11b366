"""Checkpoints that were damaged, are partial, or whose process was killed, on real files."""

import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from piflow_jax.runs import fingerprints
from piflow_jax.runs.checkpoint import (
    Checkpointer,
    CheckpointError,
    read_spec,
)
from tests.runs.checkpoints import (
    JSON,
    abstract,
    assert_same_bits,
    data_files,
    make_state,
    restore,
)


def truncate(path: Path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x01
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [Path.unlink, truncate, flip])
@pytest.mark.parametrize("what", ["values", "structure", "manifest", "json"])
def test_damage_raises_with_path_and_remedy(broken, damage, what):
    step = broken / "2"
    if what == "values":
        files = data_files(step)
    elif what == "structure":
        files = [p for p in (step / "state" / "d").iterdir()]
    elif what == "manifest":
        files = [step / "state" / "manifest.ocdbt"]
    else:
        files = [step / "meta" / "metadata"]
    assert files
    for path in files:
        damage(path)
    with pytest.raises(CheckpointError) as caught:
        restore(broken)
    assert str(step) in str(caught.value)
    assert "fall back to step 1" in str(caught.value) and "--workdir" in str(caught.value)
    shutil.rmtree(step)  # the remedy
    assert_same_bits(restore(broken).state, make_state(1))


def test_a_flipped_bit_in_one_data_file_is_found(broken):
    """TensorStore itself returns such values as if they were right."""
    for path in data_files(broken / "2"):
        content = path.read_bytes()
        flip(path)
        with pytest.raises(CheckpointError, match="corrupt"):
            restore(broken)
        path.write_bytes(content)
    assert restore(broken).step == 2


def test_one_wrong_element_is_named(broken, monkeypatch):
    real = fingerprints._local_fingerprint
    monkeypatch.setattr(
        fingerprints,
        "_local_fingerprint",
        lambda leaf: real(leaf.at[3, 4].multiply(1.0001) if leaf.ndim == 2 else leaf),
    )
    with pytest.raises(CheckpointError, match=r"corrupt: the values of .*params/dense/kernel"):
        restore(broken)


def test_a_changed_digit_in_the_json_is_found(broken):
    path = broken / "2" / "meta" / "metadata"
    text = path.read_text()
    path.write_text(text.replace('"index": 17', '"index": 18'))
    assert path.read_text() != text
    for read in (restore, read_spec):
        with pytest.raises(CheckpointError, match="was changed after it was written"):
            read(broken)


@pytest.mark.parametrize("item", ["state", "meta"])
def test_partial_step(broken, item):
    shutil.rmtree(broken / "2" / item)
    with Checkpointer(broken) as checkpointer:
        assert checkpointer.latest_step() == 2
        with pytest.raises(CheckpointError, match=rf"{broken}/2 is partial: it lacks {item}"):
            checkpointer.restore(abstract(make_state()))
        assert checkpointer.restore(abstract(make_state()), step=1).step == 1


def test_partial_only_step_says_start_again(broken):
    shutil.rmtree(broken / "1")
    shutil.rmtree(broken / "2" / "state")
    with pytest.raises(CheckpointError, match="Delete this directory to start from the beginning"):
        restore(broken)


KILLED = """
import sys, os, signal
import jax, jax.numpy as jnp
import orbax.checkpoint as ocp
from piflow_jax.runs.checkpoint import Checkpointer
step, directory = int(sys.argv[1]), sys.argv[2]
rename = os.rename
def die(source, target, *args, **kwargs):
    # The commit of the step: everything is written, the rename is not done.
    if str(target).endswith(f"/{step}"):
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(source, target, *args, **kwargs)
os.rename = os.replace = die
with Checkpointer(directory, record=True) as checkpointer:
    checkpointer.save(step, {"w": jnp.ones((8, 8))}, data_state={}, config={}, spec={})
"""


@pytest.mark.parametrize("earlier", [True, False])
def test_killed_while_saving(tmp_path, earlier, caplog):
    directory = tmp_path / "checkpoints"
    like = {"w": jnp.zeros((8, 8))}
    if earlier:
        with Checkpointer(directory) as checkpointer:
            checkpointer.save(1, {"w": jnp.ones((8, 8))}, **JSON)
    process = subprocess.run(
        [sys.executable, "-c", KILLED, "2", str(directory)], capture_output=True, timeout=120
    )
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    left = [p.name for p in directory.iterdir() if "orbax-checkpoint-tmp" in p.name]
    assert left
    caplog.set_level(logging.INFO)
    logging.getLogger("absl").addHandler(caplog.handler)
    try:
        with Checkpointer(directory) as checkpointer:
            assert "unfinished" in caplog.text and left[0] in caplog.text
            assert checkpointer.latest_step() == (1 if earlier else None)
            if earlier:
                assert checkpointer.restore(like).step == 1
            checkpointer.save(2, like, **JSON)
    finally:
        logging.getLogger("absl").removeHandler(caplog.handler)
    assert read_spec(directory)[0] == 2
    assert not [p for p in directory.iterdir() if "orbax-checkpoint-tmp" in p.name]
