"""Low-rank adapters (LoRA, arXiv 2106.09685); splits a student into base and trained parameters.

A student consists of a frozen base and trained parameters (pi-Flow, arXiv 2510.14974, section 5).
The base holds its teacher's own parameters. The trained parameters are adapters, the output head
and the modulation of the last norm. Both are plain trees of one network's parameters. `merge`
combines them without copying an array, so teacher, student and average share one base. Only the
trained parameters have an optimiser state, an average and checkpoints.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike

from piflow_jax.models.layers import Axes, Linear, contract, named

__all__ = ["AdaptedLinear", "LoRA", "fuse", "merge", "split"]

DOWN, UP = "lora_a", "lora_b"
# Top-level modules that are trained directly, in addition to the adapters.
TRAINED = ("head", "final_modulation")


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Layers of a network that have adapters, and the adapters' settings.

    Attributes:
        targets: Names of the layers.
        rank: Inner size `r` of an adapter.
        scale: Factor of the adapters' outputs (alpha / rank; 1 in pi-Flow).
        dropout: Probability of dropping an input of an adapter in training. Dropout is active where
            `apply` gets an rng called "dropout".
        param_dtype: Dtype of fresh adapters, for any dtype of the base.
    """

    targets: tuple[str, ...]
    rank: int = 256
    scale: float = 1.0
    dropout: float = 0.0
    param_dtype: DTypeLike = jnp.float32


class AdaptedLinear(Linear):
    """A linear layer, with an adapter if it is a target: `x W + b + scale (x A) B`.

    `A[*ins, r]` starts at `N(0, 1 / r^2)` and `B[r, *features]` at zero, as in the release. Both
    take the kernel's axis names, and the name `rank` where that leaves them without `embed`.

    Attributes:
        lora: The network's adapters; None for none.
    """

    lora: LoRA | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `x[..., *ins]` to `[..., *features]`."""
        y = super().__call__(x)
        lora = self.lora
        if lora is None or self.name not in lora.targets:
            return y
        down_init = nn.initializers.normal(1 / lora.rank)
        ins = x.shape[-self.in_axes :]
        down_axes, up_axes = self._factor_axes()
        shape = (*ins, lora.rank)
        down = self.param(DOWN, named(down_init, down_axes), shape, lora.param_dtype)
        shape = (lora.rank, *self.features)
        up = self.param(UP, named(nn.initializers.zeros, up_axes), shape, lora.param_dtype)
        dtype = y.dtype if self.dtype is None else self.dtype
        if lora.dropout and self.has_rng("dropout"):
            x = nn.Dropout(lora.dropout, deterministic=False)(x)
        inner = contract(x.astype(dtype), down.astype(dtype), self.in_axes)
        return y + (lora.scale * contract(inner, up.astype(dtype))).astype(y.dtype)

    def _factor_axes(self) -> tuple[Axes | None, Axes | None]:
        if self.axes is None:
            return None, None
        ins, outs = self.axes[: self.in_axes], self.axes[self.in_axes :]
        rank_of = [None if "embed" in axes else "rank" for axes in (ins, outs)]
        return (*ins, rank_of[0]), (rank_of[1], *outs)


def split(params: Mapping) -> tuple[dict, dict]:
    """Splits a student's parameters into base and trained.

    Args:
        params: `{"params": ...}`.

    Returns:
        `(base, trained)`, both `{"params": ...}`, with the same arrays. The base has no entries for
        the trained modules.
    """
    parts = {}, {}
    for path, leaf in flatten_dict(params).items():
        parts[path[1] in TRAINED or path[-1] in (DOWN, UP)][path] = leaf
    base, trained = map(unflatten_dict, parts)
    return {"params": {}} | base, {"params": {}} | trained


def merge(base: Mapping, trained: Mapping) -> dict:
    """Combines a student's parameters without copying an array.

    Args:
        base: `{"params": ...}` of the teacher, or the base from `split`. Its own output head and
            last modulation are left out.
        trained: `{"params": ...}`.

    Returns:
        `{"params": ...}` of the student.

    Raises:
        ValueError: An adapter has no layer in the base, or a trained module is missing.
    """
    absent = [name for name in TRAINED if name not in trained["params"]]
    if absent:
        raise ValueError(f"the trained parameters lack {absent}")
    leaves = {k: v for k, v in flatten_dict(base).items() if k[1] not in TRAINED}
    layers = {path[:-1] for path in leaves}
    for path, leaf in flatten_dict(trained).items():
        if path[1] not in TRAINED and path[:-1] not in layers:
            raise ValueError(f"no layer {'/'.join(path[1:-1])} in the base")
        leaves[path] = leaf
    return unflatten_dict(leaves)


def fuse(params: Mapping, scale: float = 1.0) -> dict:
    """Adds the adapters to the kernels, for networks without adapters (merged weights).

    Args:
        params: `{"params": ...}` of a student.
        scale: See `LoRA`.

    Returns:
        `{"params": ...}` without adapters. Products are taken in at least float32, and the sum is
        rounded once, to the dtype of the kernel.
    """
    leaves = flatten_dict(params)
    for layer in [path[:-1] for path in leaves if path[-1] == DOWN]:
        down, up = leaves.pop((*layer, DOWN)), leaves.pop((*layer, UP))
        kernel = leaves[*layer, "kernel"]
        wide = jnp.promote_types(down.dtype, jnp.float32)
        rank = down.shape[-1]
        # The factors have the kernel's axes and two of the rank; a stacked adapter has the axis of
        # the layers in both.
        lead = kernel.shape[:1] if down.ndim + up.ndim - 2 > kernel.ndim else (1,)
        left = jnp.asarray(down, wide).reshape(*lead, -1, rank)
        right = jnp.asarray(up, wide).reshape(*lead, rank, -1)
        delta = jnp.einsum("lir,lro->lio", left, right, precision="highest").reshape(kernel.shape)
        fused = jnp.asarray(kernel, wide) + scale * delta
        leaves[*layer, "kernel"] = fused.astype(kernel.dtype)
    return unflatten_dict(leaves)
