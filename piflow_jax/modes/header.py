"""What a mode says before it starts: which code, where, of what size, and what it will make."""

import contextlib
import math
import os

import jax
from absl import logging

from piflow_jax.origin import origin
from piflow_jax.runs.loop import checkpoint_dir
from piflow_jax.runs.steps import CheckpointError, latest_step
from piflow_jax.runs.workdir import user_path
from piflow_jax.systems.assembly import Systems
from piflow_jax.systems.network import Network, abstract_variables


def say_header(systems: Systems, workdir: str | os.PathLike, makes: str) -> None:
    """Logs the header of a run, in process 0.

    Args:
      systems: teacher and student.
      workdir: the run's directory.
      makes: what the mode will make there.
    """
    if jax.process_index():
        return
    devices = jax.devices()
    number = f"{len(devices)} device{'s' * (len(devices) > 1)}"
    logging.info("%s, jax %s, %s (%s)", origin(), jax.__version__, number, devices[0].device_kind)
    logging.info("work directory: %s (%s)", user_path(workdir), _found(workdir))
    sizes = {"teacher": systems.teacher_network, "student": systems.student_network}
    counted = [f"{name} {_count(network):,}" for name, network in sizes.items() if network]
    network = systems.config.model.network
    logging.info("parameters of the %s: %s", network, ", ".join(counted))
    logging.info("makes: %s", makes)


def say_next(workdir: str | os.PathLike, look_at: str) -> None:
    """Logs what to do with a run that has ended, in process 0.

    Args:
      workdir: the run's directory.
      look_at: a file in it.
    """
    if not jax.process_index():
        path = os.fspath(user_path(workdir))
        logging.info(
            "next: look at %s/%s; draw more samples by the same command with --mode=sample; or in "
            "Python, student = piflow_jax.load(%r)",
            path,
            look_at,
            path,
        )


def _found(workdir: str | os.PathLike) -> str:
    """The steps of the stages that a run has."""
    found = []
    for stage in ("teacher", "student"):
        with contextlib.suppress(CheckpointError):  # which is said where it is read
            step = latest_step(checkpoint_dir(workdir, stage))
            if step is not None:
                found.append(f"{stage} at step {step:,}")
    return ", ".join(found) or "no checkpoint yet"


def _count(network: Network) -> int:
    leaves = jax.tree.leaves(abstract_variables(network.exact)["params"])
    return sum(math.prod(leaf.shape) for leaf in leaves)
