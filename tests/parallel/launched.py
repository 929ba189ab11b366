"""Real processes on this machine, started as a cluster starts them."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "tests" / "tiny.py"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def by_hand(port, count, index):
    return {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(index),
    }


def by_slurm(port, count, index):
    """What `srun` sets in each task of a step."""
    return {
        "SLURM_JOB_ID": str(port),  # JAX makes the port of it
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_STEP_NUM_TASKS": str(count),
        "SLURM_NTASKS": str(count),
        "SLURM_PROCID": str(index),
        "SLURM_LOCALID": "0",
    }


def by_mpi(port, count, index):
    """What `mpirun` of Open MPI 5 sets, and the address that it does not."""
    return {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "OMPI_COMM_WORLD_SIZE": str(count),
        "OMPI_COMM_WORLD_RANK": str(index),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(index),
    }


@contextlib.contextmanager
def started(workdir, logs, count, *arguments, launcher=by_hand, port=None, command=None):
    """The processes, whose outputs go to `logs/<index>`; none outlives the test."""
    logs.mkdir(parents=True, exist_ok=True)
    port = port or free_port()
    running = []
    if command is None:
        main = [sys.executable, "-m", "piflow_jax.main", f"--config={CONFIG}"]
        command = [*main, f"--workdir={workdir}", *arguments]
    try:
        for index in range(count):
            environment = {
                key: value
                for key, value in os.environ.items()
                if not key.startswith(("SLURM_", "OMPI_", "JAX_COORD", "JAX_NUM", "JAX_PROC"))
            }
            environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "no_proxy": "*"}
            environment |= launcher(port, count, index) if count > 1 else {}
            with (logs / str(index)).open("w") as log:
                running.append(
                    subprocess.Popen(
                        command,
                        cwd=ROOT,
                        env=environment,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )
        yield running
    finally:
        for process in running:
            process.kill()
            process.wait()


def finish(running, logs, timeout=480):
    """Exit statuses, and what each process said."""
    deadline = time.monotonic() + timeout
    codes = [process.wait(max(deadline - time.monotonic(), 0.1)) for process in running]
    return codes, [(logs / str(index)).read_text() for index in range(len(running))]
