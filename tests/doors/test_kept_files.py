"""Files that a run keeps: good checkpoints, cached figures, events, and a disk that is full."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax.config import parse
from piflow_jax.convert import write_safetensors
from piflow_jax.data import load_digits_source
from piflow_jax.evaluation import save_grid
from piflow_jax.evaluation.image_sets import cached_features, open_images
from piflow_jax.evaluation.kept import KeptFileError
from piflow_jax.modes import adm, rivals
from piflow_jax.runs import metrics
from piflow_jax.runs.checkpoint import CheckpointError, read_spec
from piflow_jax.runs.loop import NonFiniteLossError, run_stage
from piflow_jax.runs.metrics import MetricWriter
from piflow_jax.systems.judges import open_judge
from tests import tiny
from tests.runs.test_loop import OPTIONS, make_stage

LAUNCH = Path(__file__).parents[2] / "launch"


# --- Which checkpoints are good, and what may change on continuing ----------------------------


def bursting(at, factor):
    """A stage whose update of one step multiplies the parameters; the loss sees it a step later."""
    stage = make_stage()

    def step(state, root, batch):
        state, metrics = stage.step(state, root, batch)
        burst = jnp.where(state.step == at, jnp.float32(factor), 1.0)
        params = jax.tree.map(lambda leaf: leaf * burst, state.params)
        return state.replace(params=params, ema_params=params), metrics

    return dataclasses.replace(stage, step=step, tunable=("rate",))


@pytest.mark.parametrize(
    ("at", "factor", "steps", "says"),
    [
        # Not finite itself: not saved.
        (8, np.inf, [4], "the state of toy is not finite after step 8; the last good .* step 4"),
        (4, np.nan, [], "the state of toy is not finite after step 4; there is no checkpoint yet"),
        # Finite, but its own loss is not: no checkpoint to go on from.
        (8, 1e30, [4, 8], r"inf at step 9; .*/8 gives it\. Delete .* to fall back to step 4"),
        (4, 1e30, [4], r"inf at step 5; .*/4 gives it\. Delete .* to start from the beginning"),
    ],
)
def test_a_checkpoint_is_good_if_its_parameters_are(tmp_path, at, factor, steps, says):
    with pytest.raises(NonFiniteLossError, match=says) as caught:
        run_stage(bursting(at, factor), tmp_path, **OPTIONS)
    assert "a run may go on with other config.rate" in str(caught.value)
    assert sorted(map(int, os.listdir(tmp_path / "toy" / "checkpoints"))) == steps


def test_the_advice_after_a_bad_loss_can_be_followed(tmp_path):
    """What the message says to delete, and another rate: the run goes on, and keeps the change."""
    with pytest.raises(NonFiniteLossError) as caught:
        run_stage(bursting(8, 1e30), tmp_path, **OPTIONS)
    directory, record = tmp_path / "toy" / "checkpoints", tmp_path / "toy" / "checkpoints.json"
    assert f"{directory / '8'} gives it. Delete this directory and {record}" in str(caught.value)
    shutil.rmtree(directory / "8")
    record.unlink()

    def at_rate(rate, steps):
        stage = dataclasses.replace(make_stage(steps, rate=rate), tunable=("rate",))
        return run_stage(stage, tmp_path, **OPTIONS)

    def changes():
        return read_spec(directory)[2]["changes"]

    at_rate(0.05, 6)
    change = {"step": 4, "key": "rate", "was": 0.1, "to": 0.05}
    assert change in changes()
    at_rate(0.05, 8)
    assert {"step": 6, "key": "steps", "was": 6, "to": 8} in changes()
    assert [entry for entry in changes() if entry["key"] == "rate"] == [change]
    # What was done to the end was done at that rate.
    with pytest.raises(CheckpointError, match=r"config\.rate: the checkpoint has 0\.05, asked"):
        at_rate(0.01, 8)


# --- Files that are made anew where they are missing ------------------------------------------


def compared(call):
    """A method of a comparison of rivals whose work directory is the file's."""

    def read(path):
        comparison = object.__new__(rivals._Comparison)
        comparison._workdir, comparison._config = path.parent, parse(tiny.get_config())
        comparison._methods = {}
        (path.parent / "teacher.json").touch()
        (path.parent / "endpoints.npy").touch()
        return call(comparison)

    return read


ANEW = "delete it to have it made anew"
# A file, what reads it, and what is to be done with a damaged one.
KEPT = [
    ("features.npz", lambda path: open_judge(load_digits_source(), path.parent), ANEW),
    ("plan.json", lambda path: adm._check_plan(path.parent, {}), "remove /"),
    *(
        (name, compared(lambda c, name=name: c._check_kept(name, "", {})), "pass another --workdir")
        for name in ("settings.json", "inputs.json")
    ),
    ("times.json", compared(lambda c: c._times()), ANEW),
    ("teacher.json", compared(lambda c: c._teacher_rows(None)), ANEW),
    ("result.json", lambda path: rivals.read_kept_json(path, list), ANEW),
]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 99_999])
@pytest.mark.parametrize(("name", "read", "says"), KEPT)
def test_what_an_earlier_start_left_damaged_is_named(tmp_path, name, read, says, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(KeptFileError, match=rf"{name} is damaged \(.*\); {says}") as caught:
        read(tmp_path / name)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [np.zeros((1, 3)), np.full((2, 3), np.nan), np.zeros(2), None])
def test_cached_features_are_those_of_the_pictures(tmp_path, bad):
    np.savez(tmp_path / "set.npz", images=np.zeros((2, 4, 4, 3), np.uint8))

    def read():
        images = open_images(tmp_path / "set.npz")
        return cached_features(images, lambda x: np.ones((len(x), 3)), tmp_path / "cache", "ones")

    np.testing.assert_array_equal(read(), np.ones((2, 3)))
    (chunk,) = (tmp_path / "cache").iterdir()
    chunk.write_bytes(b"\x93NUMPY") if bad is None else np.save(chunk, bad)
    with pytest.raises(KeptFileError, match=rf"{chunk} is damaged \(.*\); {ANEW}"):
        read()


# --- Event files ------------------------------------------------------------------------------


def events(directory):
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    # By numbers: of files of one second, the tenth comes after the ninth.
    files = sorted(
        Path(directory).glob("events.out.tfevents.*"),
        key=lambda path: [int(number) for number in re.findall(r"\d+", path.name)],
    )
    raw = [record for file in files for record in RawEventFileLoader(str(file)).Load()]
    return [(e.step, value.tag) for e in map(Event.FromString, raw) for value in e.summary.value]


@pytest.mark.parametrize("damage", [b"", b"\x01", bytes(range(256))])
def test_event_files_hold_a_step_once(tmp_path, damage):
    def write(*steps, first_step=0):
        with MetricWriter(tmp_path, "student", 10, first_step=first_step) as writer:
            for step in steps:
                writer.write(step, {"loss": float(step)})

    write(2, 4, 6)
    (file,) = (tmp_path / "student").glob("events.*")
    file.write_bytes(file.read_bytes() + damage)  # cut short by a kill, or edited
    write(6, 8, first_step=4)
    lines = [
        json.loads(line)
        for line in (tmp_path / "student" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    assert events(tmp_path / "student") == [(step, "loss") for step in (2, 4, 6, 8)]
    write(2)
    assert events(tmp_path / "student") == [(2, "loss")]


# --- A full disk, and a folder that is not there ----------------------------------------------


WRITES = {
    "grid": lambda path: save_grid(path, [("one", np.zeros((1, 8, 8, 1)))]),
    "weights": lambda path: write_safetensors(path, {"w": np.zeros(1)}),
}


@pytest.mark.parametrize("what", WRITES)
def test_a_folder_that_is_not_there_is_named(tmp_path, what):
    path = tmp_path / "absent" / "file.out"
    says = f"cannot write {path}: there is no folder {path.parent}; make it"
    with pytest.raises(FileNotFoundError, match=re.escape(says)):
        WRITES[what](path)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_said_with_the_directory(tmp_path, monkeypatch):
    full = open("/dev/full", "w", buffering=1)  # noqa: SIM115
    monkeypatch.setattr(metrics, "_open_lines", lambda *_: full)
    with pytest.raises(OSError, match=rf"metrics to {tmp_path}/student \(.*No space left.* free"):
        run_stage(dataclasses.replace(make_stage(4), name="student"), tmp_path, **OPTIONS)


# --- Launching --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--nodes=08", "--nodes=8 "),
        ("--nodes=010", "--nodes=10 "),
        ("--max-restarts=09", ">= 9)"),
        ("--grace=0180", "TERM@180 "),
        ("--nodes=00", "must be at least 1"),
        ("--nodes=0x8", "must be a whole number, got '0x8'"),
    ],
)
def test_counts_are_decimal(flag, says):
    arguments = [flag, "--dry-run", "--", "--config=c.py", "--workdir=/w"]
    done = subprocess.run(
        ["bash", LAUNCH / "gpu.sh", *arguments], capture_output=True, text=True, timeout=60
    )
    assert says in done.stdout + done.stderr
