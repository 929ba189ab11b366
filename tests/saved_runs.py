"""Work directories as runs leave them, without the runs."""

import jax
import jax.numpy as jnp

from piflow_jax.distillation.stages import flat_settings
from piflow_jax.runs.checkpoint import Checkpointer
from piflow_jax.systems.networks import student_network, teacher_network
from piflow_jax.systems.spec import student_spec, teacher_spec
from piflow_jax.training.state import TrainState


def save_stage(workdir, stage, params, spec, config=None):
    """The checkpoint of a stage after its only step, with an average like its parameters."""
    state = TrainState(step=jnp.int32(1), params=params, ema_params=params, opt_state=())
    with Checkpointer(workdir / stage / "checkpoints") as checkpointer:
        checkpointer.save(1, state, data_state={}, config=config or {}, spec=spec)


def save_run(settings, data, workdir, **recorded):
    """A work directory with a teacher and a student, whose settings have more entries."""
    networks = {
        "teacher": (teacher_network(settings.model, data), teacher_spec(settings, data)),
        "student": (
            student_network(settings.model, settings.policy, data),
            student_spec(settings, data),
        ),
    }
    for stage, (module, spec) in networks.items():

        def init(module=module):
            return jax.tree.map(lambda leaf: leaf + 0.05, module.init(jax.random.key(0)))

        params = module.trained(jax.jit(init)())
        # As `distillation/stages.py` keeps them: a teacher's do not know how it will be guided.
        kept = {name: getattr(settings, name) for name in ("model", "teacher", "train")}
        kept = flat_settings(kept | recorded if stage == "student" else {"model": settings.model})
        save_stage(workdir, stage, params, spec, kept)
    return workdir
