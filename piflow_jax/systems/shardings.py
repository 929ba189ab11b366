"""Sharding of the parameters of teacher and student over a run's mesh."""

from typing import Any

from jax.sharding import Mesh

from piflow_jax.config import Config
from piflow_jax.parallel import parameter_shardings, state_shardings
from piflow_jax.systems.network import Network
from piflow_jax.systems.networks import named_variables


def teacher_shardings(config: Config, mesh: Mesh, teacher: Network) -> Any:
    """Sharding of a teacher's parameters during distillation; see `config.mesh.teacher`."""
    split = config.mesh.teacher == "split"
    return parameter_shardings(mesh, named_variables(teacher), split=split)


def student_shardings(config: Config, mesh: Mesh, state: Any, student: Network) -> Any:
    """Sharding of a student's state; see `config.mesh.student` and `config.mesh.ema`."""
    trained, rules = student.trained(named_variables(student)), config.mesh
    split, ema = rules.student == "split", rules.ema == "split"
    return state_shardings(mesh, state, trained, split=split, ema=ema)
