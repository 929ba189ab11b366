"""The train state: everything that a step changes, and nothing else."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

__all__ = ["CarryingState", "TrainState"]


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

    # What the network has besides its parameters: nothing, see `CarryingState`.
    carried = ()

    @classmethod
    def create(
        cls, params: Any, optimizer: optax.GradientTransformation, carried: Any = ()
    ) -> "TrainState":
        """The state before the first step; the average starts as a copy of the parameters."""
        state = TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            ema_params=jax.tree.map(jnp.copy, params),
            opt_state=optimizer.init(params),
        )
        return state.carrying(carried)

    def carrying(self, carried: Any) -> "TrainState":
        """The same state with what the network carries; itself where that is nothing."""
        if not jax.tree.leaves(carried):
            return self
        return CarryingState(self.step, self.params, self.ema_params, self.opt_state, carried)


@flax.struct.dataclass
class CarryingState(TrainState):
    """The state of a network that has more than parameters; of ours none does.

    Attributes:
      carried: variables that no gradient changes, such as running averages and random state.
    """

    carried: Any
