"""Our Flax modules as networks of teacher and student."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict

from piflow_jax.models import VelocityHead, student_from_teacher
from piflow_jax.models.initial import initial_trained
from piflow_jax.models.lora import merge, split
from piflow_jax.models.quantized import is_quantized, quantize, quantized_stacks
from piflow_jax.systems.conditioning import Conditioning
from piflow_jax.systems.network import Network, Variables, abstract_variables


@dataclasses.dataclass(frozen=True)
class BuiltIn(Network):
    """One of our Flax modules, with its output head.

    Attributes:
      module: one of `piflow_jax.models`, such as a `DiT`.
      conditioning: turns conditions into the module's arguments.
      kernels: dtype of the kernels of its blocks, a key of `BLOCKS`; empty for the module's own.
    """

    module: nn.Module
    conditioning: Conditioning
    kernels: str = ""

    @property
    def adapted(self) -> bool:
        """See `Network`."""
        return getattr(self.module, "lora", None) is not None

    @functools.partial(jax.jit, static_argnums=0)  # traced once for equal networks
    def named(self, key: jax.Array) -> Variables:
        """See `Network`."""
        zeros = (jnp.zeros(leaf.shape, leaf.dtype) for leaf in self.module.example())
        variables = nn.Module.init(self.module, key, *zeros)
        return quantized_stacks(variables, self.kernels) if self.kernels else variables

    @property
    def exact(self) -> "BuiltIn":
        """See `Network`."""
        return dataclasses.replace(self, kernels="")

    def exact_in(self, base_dtype: str) -> "BuiltIn":
        """See `Network`."""
        return dataclasses.replace(self.exact, module=self.module.clone(param_dtype=base_dtype))

    @functools.cached_property
    def _kept(self) -> dict[tuple[str, ...], Any]:
        return flatten_dict(abstract_variables(self))

    def kept(self, path, leaf, shardings=None):
        """See `Network`."""
        kept = self._kept[path]
        if not is_quantized(kept):
            return leaf.astype(kept.dtype)
        return jax.jit(quantize, static_argnums=1, out_shardings=shardings)(leaf, self.kernels)

    @property
    def drops(self) -> bool:
        """See `Network`."""
        return self.adapted and self.module.lora.dropout > 0

    def apply(self, variables, x, t, condition):
        """See `Network`."""
        return self.module.apply(variables, x, t, **self.conditioning(condition))

    def train(self, variables, x, t, condition, key):
        """See `Network`; there are no carried variables."""
        rngs = None if key is None else {"dropout": key}
        return self.module.apply(variables, x, t, **self.conditioning(condition), rngs=rngs), ()

    def trained(self, variables: Variables) -> Variables:
        """See `Network`; with adapters: the adapters, the head and the last modulation."""
        return split(variables)[1] if self.adapted else variables

    def with_base(self, trained: Variables, base: Variables) -> Variables:
        """See `Network`; the base's own head is left out."""
        return merge(base, trained) if self.adapted else trained

    def start(
        self, key: jax.Array, teacher: "BuiltIn | None", teacher_variables: Variables
    ) -> Variables:
        """See `Network`."""
        keys = jax.random.split(key)
        module = None if teacher is None else teacher.module
        if self.adapted:
            return initial_trained(keys[1], self.module, teacher_variables, teacher=module)
        return student_from_teacher(
            keys[1], self.module, self.init(keys[0]), teacher_variables, teacher=module
        )

    def of_velocities(self) -> "BuiltIn":
        """See `Network`."""
        return dataclasses.replace(self, module=self.module.clone(head=VelocityHead()))

    def constrained(self, constrain) -> "BuiltIn":
        """See `Network`."""
        return dataclasses.replace(self, module=self.module.clone(constrain=constrain))

    def taking_guidance(self, default: float, scales: tuple[float, ...]) -> "BuiltIn":
        """The same network with the guidance scale as a further input.

        Args:
          default: scale of conditions that have none.
          scales: `(low, high)` of training.

        Returns:
          The network.
        """
        conditioning = dataclasses.replace(
            self.conditioning, guidance=default, guidance_range=scales
        )
        module = self.module.clone(guidance_embed=True)
        return dataclasses.replace(self, module=module, conditioning=conditioning)
