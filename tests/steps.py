"""Steps of teachers and students of a configuration, as the tests of training take them."""

import shutil

from piflow_jax.systems.assembly import Systems, guided
from piflow_jax.training.step import distill_step


def step_of(config, data, optimizer, student=None, teacher=None, caption=None):
    """The pi-ID step of a configuration's networks, or of others in their place."""
    systems = Systems.of(config, data, caption)
    student = systems.student_network if student is None else student
    network = systems.teacher_network if teacher is None else teacher
    return distill_step(
        student, guided(network, config.teacher, systems.null), optimizer, config, data.channels
    )


def call(network):
    """A function `(x, sigma, condition) -> output` as losses take networks: nothing is carried."""
    return lambda carried, x, sigma, condition, key: (network(x, sigma, condition), carried)


def without_step(step, workdir, copy):
    """Copies a run as it was before a student's step was saved."""
    shutil.copytree(workdir, copy)
    shutil.rmtree(copy / "student" / "checkpoints" / str(step))
    (copy / "student" / "checkpoints.json").unlink()
