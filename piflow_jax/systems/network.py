"""A network as teacher and student see it: pure functions of its variables."""

import abc
import types
from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn

from piflow_jax.keys import seed_key
from piflow_jax.models.blocks import Constrain
from piflow_jax.systems.conditioning import Condition, Conditioning

Variables = Any


class Network(abc.ABC):
    """A network as pure functions of its variables.

    Attributes:
      conditioning: turns conditions into the network's arguments.
      adapted: a student trains adapters on its teacher's variables.
      drops: training takes a key for dropout.
      carries: it has other variables besides its parameters, see `train`.
      spec: its entries in a checkpoint, beyond settings and data.
    """

    conditioning: Conditioning
    adapted: bool = False
    drops: bool = False
    carries: bool = False
    spec: Mapping[str, Any] = types.MappingProxyType({})

    def init(self, key: jax.Array) -> Variables:
        """Fresh variables; traceable."""
        return nn.unbox(self.named(key))

    @abc.abstractmethod
    def named(self, key: jax.Array) -> Variables:
        """The same, in boxes (`flax.linen.Partitioned`) where parameters have named axes."""

    @abc.abstractmethod
    def apply(self, variables: Variables, x: jax.Array, t: jax.Array, condition: Condition) -> Any:
        """The output at states `x[B, *sites, C]` of noise levels `t[B]`.

        It is a velocity `u[B, *sites, C]`, or an output that the policy's row takes.
        """

    @abc.abstractmethod
    def train(
        self,
        variables: Variables,
        x: jax.Array,
        t: jax.Array,
        condition: Condition,
        key: jax.Array | None,
    ) -> tuple[Any, Any]:
        """The output in training, with the dropout of `key`, and variables for the next call.

        These carried variables change without gradients: running averages, random state.
        """

    @abc.abstractmethod
    def trained(self, variables: Variables) -> Variables:
        """The part of variables, or of their shapes, that gradients change."""

    @property
    def exact(self) -> "Network":
        """The same network with the parameters that weight files have; see `kept`."""
        return self

    def exact_in(self, base_dtype: str) -> "Network":
        """`exact` with a base of this dtype, as in the checkpoints of the run that trained it."""
        return self.exact

    def kept(self, path: tuple[str, ...], leaf: jax.Array, shardings: Any = None) -> Any:
        """A parameter of `exact` as this network keeps it, such as a kernel in few bits.

        `shardings` are those of what is returned; None leaves them to JAX.
        """
        return leaf

    def carried(self, variables: Variables) -> Any:
        """The carried variables for the first call in training; see `train`."""
        return ()

    @abc.abstractmethod
    def with_base(self, trained: Variables, base: Any) -> Variables:
        """The inverse of `trained`; copies nothing.

        `base` is the teacher's variables if the network is adapted, otherwise the carried
        variables.
        """

    def of_student(self, trained: Variables, carried: Any, teacher: Variables) -> Variables:
        """A student's variables for a call, with its teacher's as the base if it is adapted."""
        return self.with_base(trained, teacher if self.adapted else carried)

    @abc.abstractmethod
    def start(
        self, key: jax.Array, teacher: "Network | None", teacher_variables: Variables
    ) -> Variables:
        """The trained part of a student that starts at its teacher; traceable.

        Settings are compared with those of `teacher`, if it is given.
        """

    def of_velocities(self) -> "Network":
        """The same adapted network with its teacher's output, a velocity."""
        raise NotImplementedError(f"{type(self).__name__} has no adapters")

    def constrained(self, constrain: Constrain) -> "Network":
        """The same network with its activations pinned to a mesh, where it can pin them."""
        return self

    def check(self, teacher: "Network | None" = None) -> None:
        """Refuses, before any training, errors that only a call can reveal; computes little.

        `teacher` is the network where a student starts.
        """
        del teacher


def abstract_variables(network: Network) -> Variables:
    """Shapes and dtypes of a network's variables, without computing any."""
    return jax.eval_shape(network.init, seed_key(0))
