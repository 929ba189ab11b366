"""Several real processes on this machine, started as a cluster starts them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from absl import logging
from PIL import Image

from piflow_jax.config import ProcessesConfig, parse
from piflow_jax.data import images
from piflow_jax.modes.prepare_images import prepare_missing
from piflow_jax.parallel import processes
from piflow_jax.runs.workdir import user_path
from tests.compiled import on_devices
from tests.parallel import prepared_images
from tests.parallel.launched import (
    CONFIG,
    ROOT,
    by_hand,
    by_mpi,
    by_slurm,
    finish,
    free_port,
    started,
)

# Enough steps for a signal to come in the middle; the evaluation is short.
STUDENT_STEPS = 24
APART = 8  # steps between saves, where they are not to be in the way
JOB = [
    f"--config.train.steps={STUDENT_STEPS}",
    "--config.checkpoint_every=5",
    "--config.log_every=1",
    "--config.evaluation.teacher_steps=(1,)",
    "--config.processes.heartbeat_seconds=5",
    "--config.processes.start_seconds=60",
]


PATIENT = """
import sys, time
from piflow_jax.config import ProcessesConfig
from piflow_jax.parallel import processes

processes.start(ProcessesConfig(heartbeat_seconds=5, start_seconds=60))
import jax
print("devices", jax.local_device_count())
time.sleep(9 * (1 - jax.process_index()))
sys.exit(processes.end(0))
"""


@pytest.mark.slow
def test_one_that_is_done_waits_longer_than_for_a_heartbeat(tmp_path):
    """As the others do while the first alone writes its report. CPUs are not shared out by MPI."""
    (tmp_path / "patient.py").write_text(PATIENT)
    command = [sys.executable, str(tmp_path / "patient.py")]
    with started(tmp_path, tmp_path / "logs", 2, command=command, launcher=by_mpi) as running:
        codes, logs = finish(running, tmp_path / "logs", timeout=120)
    assert codes == [0, 0], logs
    assert all("devices 1\n" in log for log in logs)


BATCHES = """
import sys
import jax, numpy as np
from piflow_jax.config import ProcessesConfig
from piflow_jax.parallel import global_batch, local_rows, processes, replicated
from piflow_jax.parallel.mesh import AXES

processes.start(ProcessesConfig(start_seconds=60))
whole = np.arange(24).reshape(12, 2)
for shape in ((6, 1, 1), (1, 3, 2), (1, 2, 3), (1, 1, 6)):
    for order in ([0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5]):  # the second, by turns
        grid = np.array(jax.devices())[order].reshape(shape)
        mesh = jax.sharding.Mesh(grid, AXES)
        batch = global_batch({"x": whole[local_rows(mesh, 12)]}, mesh)["x"]
        gathered = jax.jit(lambda x: x, out_shardings=replicated(mesh))(batch)
        for shard in (*batch.addressable_shards, *gathered.addressable_shards):
            np.testing.assert_array_equal(shard.data, whole[shard.index], str((shape, order)))
sys.exit(processes.end(0))
"""


def test_a_batch_is_the_same_however_processes_share_it(tmp_path):
    def three_devices(*place):
        return by_hand(*place) | on_devices(3)

    (tmp_path / "batches.py").write_text(BATCHES)
    options = {"command": [sys.executable, str(tmp_path / "batches.py")], "launcher": three_devices}
    with started(tmp_path, tmp_path / "logs", 2, **options) as running:
        codes, logs = finish(running, tmp_path / "logs", timeout=120)
    assert codes == [0, 0], logs


@pytest.mark.slow
def test_processes_look_at_a_student_with_adapters_as_one_does(tmp_path):
    """Of the student each has a copy of its own; of the teacher beneath it, a part."""
    command = [sys.executable, str(Path(__file__).parent / "look_at_adapters.py")]
    figures = []
    for count in (1, 2):
        logs = tmp_path / str(count)
        with started(tmp_path, logs, count, command=command) as running:
            codes, said = finish(running, logs)
        assert codes == [0] * count, said
        figures += [json.loads(log.splitlines()[-1]) for log in said]
    for found in figures[1:]:
        assert found == pytest.approx(figures[0], rel=1e-3)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Seven pictures of two classes."""
    folder = tmp_path_factory.mktemp("pictures")
    for index in range(7):
        path = folder / ("dark", "light")[index % 2] / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 256, (9 + index, 12, 3), np.uint8)
        Image.fromarray(pixels).save(path)
    return folder


def preparation(mode, pictures, place):
    script = Path(__file__).parent / "prepared_images.py"
    return {"command": [sys.executable, str(script), mode, str(pictures), str(place)]}


def contents(place):
    """Files of a set by name; the folder of the preparation is no part of it."""
    return {p.name: p.read_bytes() for p in user_path(place).iterdir() if p.is_file()}


def prepared_alone(pictures, place, monkeypatch):
    """The set of these pictures that one process makes, as `contents` has it."""
    monkeypatch.setattr(images, "_SHARD_IMAGES", prepared_images.SHARD)
    prepare_missing(parse(prepared_images.settings_of(str(pictures), str(place))), place)
    return contents(place)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["prepare", "train"])
def test_two_processes_prepare_the_pixels_that_one_does(
    place, tmp_path, pictures, monkeypatch, mode
):
    """Each writes shards of its own, and none reads before all are there."""
    options = preparation(mode, pictures, place / "set")
    with started(None, tmp_path, 2, **options) as running:
        codes, said = finish(running, tmp_path)
    assert codes == [0, 0], "\n".join(said)
    alone = prepared_alone(pictures, tmp_path / "alone", monkeypatch)
    assert contents(place / "set") == alone and len(alone) == 5
    if mode == "train":
        digests = [log.splitlines()[-1] for log in said]
        assert digests[0] == digests[1] and len(digests[0]) == 64


@pytest.mark.slow
def test_a_preparation_of_which_a_process_was_killed_is_continued(
    service, tmp_path, pictures, monkeypatch
):
    """The other one does not wait for it for ever; and one process may go on with it."""
    killed = []

    def kill(name):
        if "array_record-00003" not in name or not killed or killed[0].poll() is not None:
            return False
        killed[0].send_signal(signal.SIGKILL)
        return True

    service.written = kill
    options = preparation("train", pictures, "gs://bucket/set")
    with started(None, tmp_path, 2, **options) as running:
        killed.append(running[1])
        codes, said = finish(running, tmp_path, timeout=200)
    assert codes[1] == -signal.SIGKILL and codes[0] != 0, "\n".join(said)
    service.written = lambda name: False
    assert "images.json" not in contents("gs://bucket/set")
    found = prepared_alone(pictures, "gs://bucket/set", monkeypatch)
    assert found == prepared_alone(pictures, tmp_path / "alone", monkeypatch)


@pytest.mark.slow
def test_a_picture_that_one_process_cannot_read_ends_both(tmp_path, pictures):
    broken = shutil.copytree(pictures, tmp_path / "pictures")
    (broken / "light" / "3.png").write_bytes(b"no picture")
    options = preparation("prepare", broken, tmp_path / "set")
    with started(None, tmp_path / "logs", 2, **options) as running:
        codes, said = finish(running, tmp_path / "logs", timeout=200)
    assert sorted(codes) in ([0, 2], [1, 2]), "\n".join(said)
    (refusal,) = (log for log, code in zip(said, codes, strict=True) if code == 2)
    assert "light/3.png" in refusal and "config.data.skip_refused" in refusal
    assert "Traceback" not in refusal


def run(workdir, logs, count, *arguments, **options):
    with started(workdir, logs, count, *JOB, *arguments, **options) as running:
        codes, said = finish(running, logs)
    assert codes == [0] * count, "\n".join(said)
    return said


def steps_done(workdir):
    path = workdir / "student" / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def until(happened, running):
    deadline = time.monotonic() + 200
    while not happened():
        assert time.monotonic() < deadline and all(p.poll() is None for p in running)
        time.sleep(0.002)


def until_step(workdir, step, running):
    until(lambda: steps_done(workdir) >= step, running)


def arrays(workdir, step=STUDENT_STEPS):
    """All arrays of the student's checkpoint, flat."""
    path = workdir / "student" / "checkpoints" / str(step) / "state"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        # As NumPy's: the devices it was saved from are not here.
        on_host = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
            reader.metadata(path).item_metadata.tree,
        )
        tree = reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=on_host))
    return dict(flat(tree))


def flat(tree, prefix=""):
    if isinstance(tree, dict | list | tuple):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, value in items:
            yield from flat(value, f"{prefix}/{key}")
    elif tree is not None:
        yield prefix, tree


def assert_close(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        if name.startswith(("/params", "/ema_params")) and "/qkv/bias" not in name:
            difference = np.linalg.norm(ours[name] - values)
            assert difference <= tolerance * np.linalg.norm(values), name


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("one")
    run(workdir, workdir / "logs", 1)
    return workdir


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("two")
    return workdir, run(workdir, workdir / "logs", 2)


def assert_results_of(ours, said, theirs, processes):
    assert_close(arrays(ours), arrays(theirs), 1e-5)
    rows, others = (json.loads((w / "report.json").read_text())["rows"] for w in (ours, theirs))
    for row, other in zip(rows, others, strict=True):
        assert row["figures"] == pytest.approx(other["figures"], rel=1e-3)
        assert (row["endpoint_mse"] is None) == (other["endpoint_mse"] is None)
        assert (row["endpoint_mse"] or 0) == pytest.approx(other["endpoint_mse"] or 0, rel=1e-3)
    assert processes in said[0]
    # The others are silent, and their numbers are in no file.
    for other in said[1:]:
        assert [line for line in other.splitlines() if not line.startswith("[Gloo]")] == []
    lines = [json.loads(line)["step"] for line in (ours / "student/metrics.jsonl").open()]
    assert lines == list(range(1, STUDENT_STEPS + 1))


@pytest.mark.slow
def test_two_processes_give_the_result_of_one(one, two):
    assert_results_of(*two, one, "2 processes (environment), 2 devices")


def teacher_of(workdir):
    return f"--config.teacher.checkpoint={workdir / 'teacher' / 'checkpoints'}"


SPLIT = ("--config.mesh.data=2", "--config.mesh.fsdp=2")


@pytest.mark.slow
@pytest.mark.parametrize(("count", "data"), [(2, 1), (4, 2)])
def test_processes_that_share_their_rows_give_the_result_of_one(one, tmp_path, count, data):
    """Heads and hidden layers split over processes, which need the same examples then."""
    more = [teacher_of(one), f"--config.mesh.data={data}", "--config.mesh.tensor=2"]
    said = run(tmp_path, tmp_path / "logs", count, *more)
    assert_results_of(tmp_path, said, one, f"{count} processes (environment), {count} devices")


@pytest.mark.slow
def test_four_processes_and_another_mesh_give_the_result_of_one(one, tmp_path):
    """Under Slurm's variables, the parameters split over the processes."""
    more = [teacher_of(one), *SPLIT]
    said = run(tmp_path, tmp_path / "logs", 4, *more, launcher=by_slurm)
    assert_results_of(tmp_path, said, one, "4 processes (slurm), 4 devices")


def stop(workdir, *more):
    """A pre-emption notice reaches one of two processes; both save the same step and leave."""
    logs = workdir / "logs"
    with started(workdir, logs, 2, *JOB, *more) as running:
        until_step(workdir, 3, running)
        running[1].send_signal(signal.SIGTERM)
        codes, said = finish(running, logs)
    assert codes == [0, 0], said
    stopped = re.search(r"SIGTERM: saved student at step (\d+)", said[0])
    assert stopped and 3 <= int(stopped[1]) < STUDENT_STEPS
    return int(stopped[1])


def kill(workdir, count, saved, every, *more, launcher=by_hand):
    """One of the processes dies, after a save; the others end with an error, soon."""
    logs = workdir / "logs"
    seldom = f"--config.checkpoint_every={every}"
    with started(workdir, logs, count, *JOB, *more, seldom, launcher=launcher) as running:
        step = workdir / "student" / "checkpoints" / str(saved)
        until(lambda: step.is_dir(), running)
        until_step(workdir, saved + 1, running)
        running[1].kill()
        killed = time.monotonic()
        codes, said = finish(running, logs)
    assert codes.pop(1) == -signal.SIGKILL and not {0, None} & set(codes)
    assert time.monotonic() - killed < 60, "it hung"
    assert f"error: process 0 of {count} " in said[0] and "lost another one" in said[0]
    assert not (workdir / "report.json").exists()


@pytest.mark.slow
def test_two_processes_lose_one_and_two_others_give_the_result_of_one(one, tmp_path):
    """Of four devices under Slurm's variables, parameters split; two of one go on under MPI's."""

    def two_devices(*place):
        return by_slurm(*place) | on_devices(2)

    teacher = teacher_of(one)
    kill(tmp_path, 2, APART, APART, teacher, *SPLIT, launcher=two_devices)
    said = run(tmp_path, tmp_path / "logs", 2, teacher, launcher=by_mpi)
    assert_results_of(tmp_path, said, one, "2 processes (mpi), 2 devices")


@pytest.mark.slow
def test_stopped_and_killed_processes_continue_exactly(two, tmp_path):
    kill(tmp_path, 2, stop(tmp_path), STUDENT_STEPS)
    run(tmp_path, tmp_path / "logs", 2)
    ours, theirs = arrays(tmp_path), arrays(two[0])
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        np.testing.assert_array_equal(ours[name], values, err_msg=name)


@pytest.mark.slow
def test_when_the_first_one_dies_the_others_stop(tmp_path):
    logs = tmp_path / "logs"
    with started(tmp_path, logs, 2, *JOB) as running:
        until_step(tmp_path, 2, running)
        running[0].kill()
        killed = time.monotonic()
        codes, said = finish(running, logs)
    assert codes[1] == 1
    assert time.monotonic() - killed < 60, "it hung"
    assert "error: process 1 of 2 " in said[1] and "lost another one" in said[1]


@pytest.mark.parametrize("index", [0, 1])
def test_processes_that_are_not_all_there_say_so(tmp_path, index):
    environment = os.environ | by_hand(free_port(), 2, index) | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "piflow_jax.main", f"--config={CONFIG}"]
    command += [f"--workdir={tmp_path}", "--config.processes.start_seconds=3"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    error = done.stderr[done.stderr.rindex("error: ") :]
    address = environment["JAX_COORDINATOR_ADDRESS"]
    for part in (f"process {index} of 2 did not join the others at {address}", "start_seconds = 3"):
        assert part in error
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("environ", "devices"), [(by_mpi(1234, 2, 1), [1]), (by_hand(1234, 2, 1), None)]
)
def test_a_process_among_several_of_a_host_takes_its_gpu(environ, devices, monkeypatch):
    given = {}

    def initialize(address, count, index, devices, **options):
        given.update(process_id=index, local_device_ids=devices)

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr(processes, "_preflight", lambda *_: None)
    verbosity = logging.get_verbosity()
    processes.start(ProcessesConfig(), environ)
    logging.set_verbosity(verbosity)
    # Not given, JAX reads JAX_LOCAL_DEVICE_IDS.
    assert (given["process_id"], given["local_device_ids"]) == (1, devices)
