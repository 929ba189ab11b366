"""The train state: everything that a step changes, and nothing else."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

__all__ = ["TrainState"]


@flax.struct.dataclass
class TrainState:
    """Parameters, their average and the optimiser's state after `step` steps.

    Randomness is not part of it: a step's key is `fold_in(root, step)`.

    Attributes:
      step: int32 scalar, optimiser steps done.
      params: variables of the module, `{"params": ...}`.
      ema_params: their Karras average, same structure; of several networks that train together
        (DMD2), that of the student alone.
      opt_state: state of the optax transformation.
    """

    step: jax.Array
    params: Any
    ema_params: Any
    opt_state: Any

    @classmethod
    def create(cls, params: Any, optimizer: optax.GradientTransformation) -> "TrainState":
        """The state before the first step; the average starts as a copy of the parameters."""
        return cls(
            step=jnp.zeros((), jnp.int32),
            params=params,
            ema_params=jax.tree.map(jnp.copy, params),
            opt_state=optimizer.init(params),
        )
