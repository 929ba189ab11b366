"""Work directories as runs leave them, without the runs."""

import jax.numpy as jnp

from piflow_jax.training.checkpoint import Checkpointer
from piflow_jax.training.state import TrainState


def save_stage(workdir, stage, params, spec, config=None):
    """The checkpoint of a stage after its only step, with an average like its parameters."""
    state = TrainState(step=jnp.int32(1), params=params, ema_params=params, opt_state=())
    with Checkpointer(workdir / stage / "checkpoints") as checkpointer:
        checkpointer.save(1, state, data_state={}, config=config or {}, spec=spec)
