"""Many processes as one program: how they connect, and how they end together.

Every process runs the same command. It learns its place from its environment, in this order:

* `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`, set by hand;
* Slurm's variables for a step (`srun`), read by JAX;
* rank and size from Open MPI or PMI (MPICH, Intel), with `JAX_COORDINATOR_ADDRESS` where JAX cannot
  find the address;
* the metadata of a Cloud TPU or of GKE, read by JAX.

Without any of these there is a single process, and nothing is started.
"""

import contextlib
import ctypes
import dataclasses
import functools
import logging as std_logging
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import PartitionSpec

from piflow_jax.config import ConfigError, ProcessesConfig
from piflow_jax.parallel.mesh import AXES, device_mesh

_ADDRESS, _COUNT, _INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
# Variables of MPI launchers: size and rank.
_MPI = (("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"), ("PMI_SIZE", "PMI_RANK"))
# The same among the processes of a host: for Open MPI, for MPICH and Intel, for Cray.
_MPI_LOCAL = (
    ("OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("MPI_LOCALNRANKS", "MPI_LOCALRANKID"),
    ("PMI_LOCAL_SIZE", "PMI_LOCAL_RANK"),
)
_DEVICES = "JAX_LOCAL_DEVICE_IDS"
_ORTE = "OMPI_MCA_orte_hnp_uri"  # Open MPI up to 4: JAX reads the address from it
_LARGEST_PORT = 2**16 - 1
_MOST = 10**6  # processes; JAX allocates memory for each before it looks for the first
# Names in error messages of the systems that carry data and messages between processes.
_CARRIERS = re.compile(r"\bGloo |\bNCCL\b|[Cc]oordination ?[Ss]ervice|\bBarrier\b")
# Long enough for process 0 to write a report alone. If it died, heartbeats show it sooner.
_SHUTDOWN_SECONDS = 7 * 24 * 3600


class ProcessError(RuntimeError):
    """The processes of a run did not find each other, or one of them was lost."""


@dataclasses.dataclass(frozen=True)
class Place:
    """The place of a process among the others.

    Attributes:
      source: where the place comes from: `environment`, `slurm`, `mpi` or `tpu`.
      address: `host:port` of process 0; None lets JAX find it.
      count: number of processes; None lets JAX find it.
      index: index of this process; None lets JAX find it.
      gpu: the only GPU of its host that this process uses; None lets JAX choose.
    """

    source: str
    address: str | None = None
    count: int | None = None
    index: int | None = None
    gpu: int | None = None


def find(environ: Mapping[str, str], *, tpu: bool = False) -> Place | None:
    """Reads this process's place from its environment.

    Args:
      environ: the environment.
      tpu: whether the machine has TPUs, which the environment does not show.

    Returns:
      The place, or None if there is only one process.

    Raises:
      ConfigError: variables contradict each other, or some are missing; the message names them.
    """
    if devices := environ.get(_DEVICES):
        for device in devices.split(","):
            _integer(_DEVICES, device)
    given = [name for name in (_ADDRESS, _COUNT, _INDEX) if environ.get(name)]
    if _COUNT in given or _INDEX in given:
        if len(given) < 3:
            raise _incomplete(given)
        return _place(
            "environment", environ[_ADDRESS], (_COUNT, environ[_COUNT]), (_INDEX, environ[_INDEX])
        )
    alone = False  # a launcher declares that it started one process
    # SLURM_NTASKS also exists in a batch script, which is one process and not a step.
    if "SLURM_STEP_NODELIST" in environ and "SLURM_PROCID" in environ:
        size = environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS", "1")
        place = _place(
            "slurm", None, ("SLURM_STEP_NUM_TASKS", size), ("SLURM_PROCID", environ["SLURM_PROCID"])
        )
        if place is not None:
            for name in ("SLURM_JOB_ID", "SLURM_LOCALID"):  # from which JAX computes port and GPU
                _integer(name, environ.get(name, ""))
            return place
        alone = True
    for size, rank in _MPI:
        if size in environ and rank in environ:
            address = environ.get(_ADDRESS)
            place = _place("mpi", address, (size, environ[size]), (rank, environ[rank]))
            if place is None:
                alone = True
                continue
            if not address and _ORTE not in environ:
                raise ConfigError(
                    f"{size}={environ[size]} says that there are several processes, but not where "
                    f"the first one is; set {_ADDRESS}=HOST:PORT to the host of rank 0"
                )
            return place if tpu else dataclasses.replace(place, gpu=_mpi_gpu(environ))
    if tpu:
        return Place(source="tpu")
    if given and not alone:
        raise _incomplete(given)
    return None


def _incomplete(given: Sequence[str]) -> ConfigError:
    missing = [name for name in (_ADDRESS, _COUNT, _INDEX) if name not in given]
    return ConfigError(
        f"{' and '.join(missing)} must be set too, or none of the three: only "
        f"{' and '.join(given)} is there"
    )


def _mpi_gpu(environ: Mapping[str, str]) -> int | None:
    """One GPU for each of several processes on a host, as JAX itself does on Slurm."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if environ.get(_DEVICES) or (visible is not None and "," not in visible):
        return None  # the launcher gave the process its own GPU
    for size, rank in _MPI_LOCAL:
        if rank in environ:
            return None if environ.get(size) == "1" else _integer(rank, environ[rank])
    return None


def _integer(name: str, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise ConfigError(f"{name} must be an integer, got {text!r}") from None
    if not 0 <= number < 2**63:
        raise ConfigError(f"{name} must be at least 0 and below 2^63, got {text}")
    return number


def _place(
    source: str, address: str | None, count: tuple[str, str], index: tuple[str, str]
) -> Place | None:
    numbers = [_integer(*count), _integer(*index)]
    if not 0 <= numbers[1] < numbers[0]:
        raise ConfigError(f"{index[0]} must be in [0, {count[0]} = {numbers[0]}), got {index[1]}")
    port = re.fullmatch(r"[^\s/]+:([0-9]{1,5})", address or f"host:{_LARGEST_PORT}")
    if not port or not 0 < int(port[1]) <= _LARGEST_PORT:
        raise ConfigError(f"{_ADDRESS} must be HOST:PORT, got {address!r}")
    if numbers[0] == 1:
        return None
    if numbers[0] > _MOST:
        raise ConfigError(f"{count[0]} must be at most {_MOST}, got {count[1]}")
    return Place(source=source, address=address, count=numbers[0], index=numbers[1])


def start(settings: ProcessesConfig, environ: Mapping[str, str] | None = None) -> None:
    """Connects this process with the others, if any; call it before JAX looks at devices.

    It ends with a sum over all devices, so that a network that connects but does not carry data
    fails before anything is compiled. Processes other than the first log warnings only.

    Args:
      settings: time limits.
      environ: by default this process's environment.

    If the others are not found or do not answer in time, the process exits with an error and status
    1. The wait for them cannot be interrupted, and JAX's own time limit aborts without a message.

    Raises:
      ConfigError: the environment does not give this process's place, see `find`.
      ProcessError: connecting or the sum failed immediately.
    """
    environ = os.environ if environ is None else environ
    place = find(environ, tpu=_has_tpu(environ))
    if place is None:
        return
    if place.index:
        logging.set_verbosity(logging.WARNING)
    # It warns about proxies.
    std_logging.getLogger("jax._src.distributed").setLevel(std_logging.ERROR)
    # JAX's own SIGTERM handler would swallow the signal outside training as well. The training loop
    # agrees on a step by itself (`runs.loop`).
    jax.config.update("jax_enable_preemption_service", False)
    method = {"slurm": "slurm", "mpi": "ompi", "tpu": None, "environment": "deactivate"}
    unconnected = _unconnected(place, environ)
    try:
        with _time_limit(settings, unconnected):
            jax.distributed.initialize(
                place.address,
                place.count,
                place.index,
                None if place.gpu is None else [place.gpu],
                cluster_detection_method="deactivate" if place.address else method[place.source],
                initialization_timeout=2 * settings.start_seconds,  # our own limit comes first
                heartbeat_timeout_seconds=settings.heartbeat_seconds,
                shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
            )
    except Exception as error:  # JAX reads further variables and checks none of them
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ProcessError(f"{unconnected} ({reason})") from error
    ctypes.pythonapi.PyOS_setsig(signal.SIGABRT, _on_abort(_name(place)))
    _preflight(place, settings)
    count, devices = jax.process_count(), jax.device_count()
    logging.info("%d processes (%s), %d devices", count, place.source, devices)


@contextlib.contextmanager
def _time_limit(settings: ProcessesConfig, message: str) -> Iterator[None]:
    def give_up():
        limit = f"config.processes.start_seconds = {settings.start_seconds}"
        print(f"error: {message} (waited {limit})", file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(settings.start_seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _unconnected(place: Place, environ: Mapping[str, str]) -> str:
    nodes = environ.get("SLURM_STEP_NODELIST")
    where = place.address or (f"the first of {nodes}" if nodes else "the address that JAX found")
    return (
        f"process {_name(place)} did not join the others at {where}. Check that all processes were "
        "started and process 0 still runs, that its port is free and open to the others, and that "
        "no proxy variable stands in the way"
    )


def _name(place: Place) -> str:
    return "?" if place.index is None else f"{place.index} of {place.count}"


def lost(error: BaseException) -> str | None:
    """The message for an error that only shows that another process is gone.

    The operation that failed at that moment, such as a save, is not the cause.

    Args:
      error: the error, with its causes.

    Returns:
      A sentence, or None if there is only one process or the error has another cause.
    """
    if not jax.distributed.is_initialized():
        return None
    found, link = None, error
    while link is not None:
        text = " ".join(str(link).split())
        # Both of these quote paths, which may contain any name.
        files = isinstance(link, OSError) or "tensorstore" in text
        if not files and _CARRIERS.search(text):
            found = text  # the last one is the first cause
        link = link.__cause__ or link.__context__
    if found is None:
        return None
    here = f"{jax.process_index()} of {jax.process_count()}"
    return _gone(here, f"lost another one, or got no answer from it ({found[:200]})")


def _gone(process: str, what: str) -> str:
    return (
        f"process {process} {what}. The output of the others says why; the same command goes on "
        "from the last checkpoint"
    )


@functools.cache  # keeps the callback that C calls
def _on_abort(process: str):
    """A handler of SIGABRT, with which JAX ends a process that lost process 0, bypassing Python."""
    text = _gone(process, "was ended by JAX, see above; most likely it lost another one")

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def handler(_):
        os.write(2, f"error: {text}\n".encode())
        os._exit(1)

    return handler


def over_devices(values: np.ndarray, mesh=None) -> jax.Array:
    """An array with one entry per device, from the entries of this process's devices.

    Args:
      values: `[devices of this process]`.
      mesh: by default a mesh of all devices.

    Returns:
      A global array `[devices]`.
    """
    sharding = jax.NamedSharding(mesh or device_mesh(), PartitionSpec(AXES))
    return jax.make_array_from_process_local_data(sharding, values)


def _preflight(place: Place, settings: ProcessesConfig) -> None:
    head = f"process {_name(place)}: the first sum over all devices"
    check = "Check that the processes reach each other on all ports, not only on process 0's"
    try:
        with _time_limit(settings, f"{head} did not end. {check}"):
            ones = np.ones(jax.local_device_count(), np.int32)
            found = int(jax.jit(jnp.sum)(over_devices(ones)))
    except RuntimeError as error:
        text = " ".join(str(error).split())[:300]
        raise ProcessError(f"{head} failed: {text}. {check}") from error
    if found != jax.device_count():
        raise ProcessError(f"{head} is {found}, but there are {jax.device_count()}. {check}")


def _has_tpu(environ: Mapping[str, str]) -> bool:
    """Whether JAX would use TPUs on this machine."""
    platforms = environ.get("JAX_PLATFORMS", "tpu")
    chips = [*Path("/dev").glob("accel*"), *Path("/dev").glob("vfio/[0-9]*")]
    # GPUs passed through to a virtual machine are also in /dev/vfio.
    gpu = Path("/dev/nvidiactl").exists()
    return "tpu" in platforms.split(",") and bool(chips) and not gpu


def end(code: int, *, agreed: bool = False) -> int:
    """Ends this process's part in the run.

    After a success it waits for the others. After an error, or a Ctrl-C that only this process may
    have heard of, it does not return, because Python's normal exit would wait for processes that
    wait for this one. The others notice at once that its connections are closed, or after
    `config.processes.heartbeat_seconds`.

    Args:
      code: the exit status.
      agreed: all processes end now, although it is no success.

    Returns:
      The same exit status.
    """
    if not jax.distributed.is_initialized():
        return code
    if code and not agreed:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    jax.distributed.shutdown()
    signal.signal(signal.SIGABRT, signal.SIG_DFL)
    return code
