"""Several processes: what their environment says, and what they say when one of them is lost.

A case is one line: an environment and the place or the words that come of it, a moment at which a
process dies, an error of reading. What needs real processes is shared by the tests that look at it.
"""

import dataclasses
import json
import re
import signal
import sys

import jax
import numpy as np
import pytest

from piflow_jax.config import ConfigError, parse
from piflow_jax.convert import to_torch_state, write_safetensors
from piflow_jax.parallel.processes import Place, find
from piflow_jax.runs import checkpoint
from piflow_jax.runs.checkpoint import CheckpointError
from piflow_jax.systems.networks import teacher_network
from piflow_jax.systems.shapes import DataShape
from tests import tiny
from tests.compiled import on_devices
from tests.doors import two_processes
from tests.parallel.launched import by_hand, by_mpi, by_slurm, finish, started
from tests.saved_runs import save_run

ADDRESS = {"JAX_COORDINATOR_ADDRESS": "a:1"}
MPICH = {"PMI_SIZE": "4", "PMI_RANK": "2"} | ADDRESS


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        ({}, None),
        (by_hand(1234, 4, 3), Place("environment", "127.0.0.1:1234", 4, 3)),
        (by_hand(1234, 1, 0), None),
        (by_slurm(4321, 8, 7), Place("slurm", None, 8, 7)),
        (by_slurm(4321, 1, 0), None),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, None),  # a batch script, no step
        (by_slurm(4321, 1, 0) | ADDRESS, None),
        ({"PMI_SIZE": "1", "PMI_RANK": "0"} | ADDRESS, None),
        (dict.fromkeys(by_hand(1, 2, 0), ""), None),  # empty is not set
        (by_mpi(1234, 2, 1), Place("mpi", "127.0.0.1:1234", 2, 1, gpu=1)),
        (MPICH, Place("mpi", "a:1", 4, 2)),
        (MPICH | {"MPI_LOCALRANKID": "0"}, Place("mpi", "a:1", 4, 2, gpu=0)),
        (MPICH | {"PMI_LOCAL_RANK": "3"}, Place("mpi", "a:1", 4, 2, gpu=3)),
        # Alone on its host, by its user's word, or with one that the launcher chose.
        (MPICH | {"MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "1"}, Place("mpi", "a:1", 4, 2)),
        (MPICH | {"MPI_LOCALRANKID": "1", "JAX_LOCAL_DEVICE_IDS": "2"}, Place("mpi", "a:1", 4, 2)),
        (MPICH | {"MPI_LOCALRANKID": "1", "CUDA_VISIBLE_DEVICES": "1"}, Place("mpi", "a:1", 4, 2)),
        (
            MPICH | {"MPI_LOCALRANKID": "1", "CUDA_VISIBLE_DEVICES": "4,5"},
            Place("mpi", "a:1", 4, 2, gpu=1),
        ),
        (by_slurm(4321, 2, 0) | by_hand(1234, 2, 1), Place("environment", "127.0.0.1:1234", 2, 1)),
    ],
)
def test_a_process_finds_its_place(environ, place):
    assert find(environ) == place
    # The machine counts where nothing else says anything.
    said = environ.get("JAX_PROCESS_ID")
    place = place and dataclasses.replace(place, gpu=None)
    assert find(environ, tpu=True) == (place if said else place or Place("tpu"))


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"JAX_PROCESS_ID": "1"}, "JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES must be set too"),
        (ADDRESS, "JAX_NUM_PROCESSES and JAX_PROCESS_ID must be set too, or none of the three"),
        (ADDRESS | {"JAX_NUM_PROCESSES": "2"}, "JAX_PROCESS_ID must be set too"),
        (by_hand(1, 2, ""), "JAX_PROCESS_ID must be set too"),
        (by_hand(1, 2, 2), r"JAX_PROCESS_ID must be in \[0, JAX_NUM_PROCESSES = 2\), got 2"),
        (by_hand(1, 2, -1), r"JAX_PROCESS_ID must be at least 0 and below 2\^63, got -1"),
        (
            by_hand(1, 2, 0) | {"JAX_LOCAL_DEVICE_IDS": "0,-1"},
            "JAX_LOCAL_DEVICE_IDS must be at least 0",
        ),
        (MPICH | {"MPI_LOCALRANKID": "9" * 30}, "MPI_LOCALRANKID must be at least 0 and below"),
        (by_hand(1, 2, "x"), "JAX_PROCESS_ID must be an integer, got 'x'"),
        (by_hand(1, 2, 0) | {"JAX_COORDINATOR_ADDRESS": "host"}, "must be HOST:PORT, got 'host'"),
        (by_hand(1, 2, 0) | {"JAX_COORDINATOR_ADDRESS": ":1"}, "must be HOST:PORT, got ':1'"),
        (by_hand(1, 2, 0) | {"JAX_COORDINATOR_ADDRESS": "h:²"}, "must be HOST:PORT, got 'h:²'"),
        (by_hand(1, 2, 0) | {"JAX_COORDINATOR_ADDRESS": "//h:1"}, "must be HOST:PORT"),
        (by_hand(0, 2, 0), "must be HOST:PORT, got '127.0.0.1:0'"),
        (by_hand(65536, 2, 0), "must be HOST:PORT, got '127.0.0.1:65536'"),
        (by_hand(1, 10**10, 0), "JAX_NUM_PROCESSES must be at most 1000000, got 10000000000"),
        (
            by_hand(1, 2, 0) | {"JAX_LOCAL_DEVICE_IDS": "0,"},
            "JAX_LOCAL_DEVICE_IDS must be an integer",
        ),
        (by_slurm(1, 2, 0) | {"SLURM_JOB_ID": "x"}, "SLURM_JOB_ID must be an integer, got 'x'"),
        (by_slurm(1, 2, 0) | {"SLURM_LOCALID": ""}, "SLURM_LOCALID must be an integer, got ''"),
        (MPICH | {"MPI_LOCALRANKID": "a"}, "MPI_LOCALRANKID must be an integer, got 'a'"),
        ({"PMI_SIZE": "2", "PMI_RANK": "0"}, "set JAX_COORDINATOR_ADDRESS=HOST:PORT"),
    ],
)
def test_variables_that_make_no_sense_are_named(environ, message):
    with pytest.raises(ConfigError, match=message):
        find(environ)


DYING = """
import os, signal, sys, time
import jax, jax.numpy as jnp, numpy as np
from piflow_jax.parallel.processes import over_devices
from piflow_jax.modes import command
from piflow_jax.runs.checkpoint import Checkpointer
from tests import tiny

victim, moment, workdir = int(sys.argv[1]), *sys.argv[2:]

def work(config, workdir):
    with Checkpointer(workdir) as checkpointer:
        for step in range(1, 1000):
            if step == 3 and jax.process_index() == victim:
                os.kill(os.getpid(), signal.SIGKILL)
            ones = over_devices(np.ones(jax.local_device_count(), np.int32))
            if moment == "sum":
                int(jax.jit(jnp.sum)(ones))
            elif moment == "save":
                checkpointer.save(step, {"ones": ones}, data_state={}, config={}, spec={})
            else:
                time.sleep(0.1)

config = tiny.get_config()
config.processes.heartbeat_seconds = 5
command.MODES["train"] = command.Mode(run=work)
sys.exit(command.run("train", config, workdir))
"""


@pytest.mark.parametrize(
    ("count", "victim", "moment"),
    [
        (2, 0, "idle"),
        (4, 1, "save"),
        pytest.param(2, 0, "save", marks=pytest.mark.slow),
        pytest.param(2, 0, "sum", marks=pytest.mark.slow),
        pytest.param(2, 1, "idle", marks=pytest.mark.slow),
        pytest.param(2, 1, "sum", marks=pytest.mark.slow),
    ],
)
def test_those_that_lose_another_say_that_and_nothing_else(tmp_path, count, victim, moment):
    (tmp_path / "dying.py").write_text(DYING)
    command = [sys.executable, str(tmp_path / "dying.py"), str(victim), moment]
    command.append(str(tmp_path / "run"))
    with started(tmp_path, tmp_path / "logs", count, command=command) as running:
        codes, said = finish(running, tmp_path / "logs", timeout=100)
    assert codes.pop(victim) == -signal.SIGKILL and codes == [1] * (count - 1), "\n".join(said)
    for left in set(range(count)) - {victim}:
        last = said[left].splitlines()[-1]
        assert re.match(f"error: process {left} of {count} .*lost another one", last), said[left]
        assert "the same command goes on from the last checkpoint" in last
        for blamed in ("free space", "Fatal Python error", "Delete this directory"):
            assert blamed not in said[left]


def two(task, folder):
    """What two processes say of a task of `two_processes.py`."""

    def two_devices(*place):
        return by_hand(*place) | on_devices(2)

    command = [sys.executable, two_processes.__file__, task, str(folder)]
    with started(folder, folder, 2, command=command, launcher=two_devices) as running:
        codes, said = finish(running, folder, timeout=250)
    assert codes == [0, 0], "\n".join(said)
    return said


def test_each_process_loads_for_itself(tmp_path):
    """Case 18 of November 2026."""
    data = DataShape(name="digits", sample_size=8, channels=1, num_classes=10)
    save_run(parse(tiny.get_config()), data, tmp_path)
    said = two("load", tmp_path)
    expected = pytest.approx(two_processes.loaded(tmp_path), rel=1e-5)
    assert [json.loads(log.splitlines()[-1]) for log in said] == [expected] * 2


def test_one_refuses_its_part_of_weights_and_ends_the_other(tmp_path):
    config = parse(tiny.get_config())
    data = DataShape(name="digits", sample_size=8, channels=1, num_classes=10)
    network = teacher_network(config.model, data)
    arrays = to_torch_state(network.module, jax.jit(network.init)(jax.random.key(0)))
    name = "transformer_blocks.0.ff.net.2.weight"
    arrays[name] = np.where(np.arange(len(arrays[name]))[:, None] == 0, np.nan, arrays[name])
    write_safetensors(tmp_path / "x.safetensors", arrays)
    given = (f"--config.teacher.weights={tmp_path}/x.safetensors", "--config.mesh.fsdp=2")
    with started(tmp_path / "run", tmp_path / "logs", 2, *given) as running:
        codes, said = finish(running, tmp_path / "logs", timeout=250)
    assert codes == [2, 1], "\n".join(said)
    assert re.search(
        f"error: config.teacher.weights = .* numbers of {name} are not finite", said[0]
    )
    assert re.search("error: process 1 of 2 .*lost another one", said[1])


@pytest.mark.slow
def test_processes_differ_from_one_by_orders_of_sums_alone(tmp_path):
    """In float64, by nothing that another example, another draw or a lost one could be."""
    two("train", tmp_path)
    names = "processes_0", "processes_1", "devices_0", "device_0"
    first, second, devices, device = (dict(np.load(tmp_path / f"{name}.npz")) for name in names)
    assert first.keys() == second.keys() == devices.keys() == device.keys()
    for name, values in first.items():
        np.testing.assert_array_equal(values, second[name], err_msg=name)
        np.testing.assert_array_equal(values, devices[name], err_msg=name)
        scale = np.abs(device[name]).max()
        np.testing.assert_allclose(values, device[name], rtol=0, atol=1e-11 * scale, err_msg=name)


# An error of reading, and whether it says that the files are damaged.
READING = [
    (ValueError('DATA_LOSS: Error opening "zarr" driver: ...'), True),
    (ValueError('Error opening "cast" driver: Error decoding local file ...'), True),
    (ValueError('NOT_FOUND: Metadata at "step/.zarray" does not exist'), True),
    (FileNotFoundError("manifest.ocdbt"), True),
    (json.JSONDecodeError("Expecting value", "", 0), True),
    (PermissionError(13, "Permission denied"), False),
    (OSError(116, "Stale file handle"), False),
    (ValueError('PERMISSION_DENIED: Error opening "zarr" driver: ...'), False),
    (ValueError('UNAVAILABLE: Error reading "step/.zarray"'), False),
    (ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer"), False),
    (ValueError("Cannot copy array to non-addressable device TFRT_CPU_2"), False),
    (AssertionError("sync_global_devices name mismatch"), False),
    (KeyError("value_type"), False),  # as another version of Orbax might
]


@pytest.mark.parametrize(("error", "damaged"), READING)
def test_only_what_was_found_damaged_is_called_so(error, damaged, tmp_path, monkeypatch):
    like = {"w": np.ones(2, np.float32)}
    with checkpoint.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, like, data_state={}, config={}, spec={})

        def restore(*_, **__):
            raise RuntimeError("Orbax's words") from error

        monkeypatch.setattr(checkpointer._manager, "restore", restore)
        with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / "1"))) as caught:
            checkpointer.restore(like)
    words = ("corrupt", "Delete") if damaged else ("cannot restore", "keep the files")
    others = ("keep the files",) if damaged else ("corrupt", "Delete")
    assert all(word in str(caught.value) for word in words)
    assert not any(word in str(caught.value) for word in others)
