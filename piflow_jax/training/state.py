"""The train state: everything that a step changes, and nothing else."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax


@flax.struct.dataclass
class TrainState:
    """Parameters, their average and the optimiser's state after `step` steps.

    Randomness is not part of it: a step's key is `fold_in(root, step)`.

    Attributes:
      step: int32 scalar, optimiser steps done.
      params: the trained variables, see `Network.trained`.
      ema_params: their Karras average, same structure; if several networks train together (DMD2),
        the average of the student alone.
      opt_state: state of the optax transformation.
    """

    step: jax.Array
    params: Any
    ema_params: Any
    opt_state: Any

    # Variables of the network other than its parameters: none here, see `CarryingState`.
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
        """The same state with the network's carried variables; unchanged if there are none."""
        if isinstance(self, CarryingState):
            return self.replace(carried=carried)
        if not jax.tree.leaves(carried):
            return self
        return CarryingState(self.step, self.params, self.ema_params, self.opt_state, carried)


@flax.struct.dataclass
class CarryingState(TrainState):
    """The state of a network with more variables than its parameters; none of ours has any.

    Attributes:
      carried: variables that change without gradients, such as running averages and random state.
    """

    carried: Any
