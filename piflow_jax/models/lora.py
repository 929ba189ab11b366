"""Low-rank adapters (LoRA, arXiv 2106.09685) and the split of a student into base and trained.

A student is a frozen base, which is its teacher's own parameters, plus what is trained: adapters,
the output head and the modulation of the last norm (pi-Flow, arXiv 2510.14974, section 5). Both are
plain trees of one network's parameters: `merge` puts them together without copying an array, so
teacher, student and average share one base, and only what is trained has an optimiser, an average
and checkpoints.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from piflow_jax.models.layers import Axes, Linear, contract, named, xavier_uniform

__all__ = ["AdaptedLinear", "LoRA", "fuse", "initial_trained", "merge", "split"]

DOWN, UP = "lora_a", "lora_b"
# Top-level modules that are trained as they are, besides the adapters.
TRAINED = ("head", "final_modulation")


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Which layers of a network have adapters, and of what kind.

    Attributes:
        targets: Names of the layers.
        rank: Inner size `r` of an adapter.
        scale: Factor of the adapters' outputs (alpha / rank; 1 in pi-Flow).
        dropout: Probability with which an input of an adapter is dropped in training. It is active
            where `apply` gets an rng called "dropout".
        param_dtype: Dtype of fresh adapters, whatever that of the base.
    """

    targets: tuple[str, ...]
    rank: int = 256
    scale: float = 1.0
    dropout: float = 0.0
    param_dtype: DTypeLike = jnp.float32


class AdaptedLinear(Linear):
    """A linear layer with an adapter if it is a target: `x W + b + scale (x A) B`.

    `A[*ins, r]` starts at `N(0, 1 / r^2)`, `B[r, *features]` at zero, as in the release. They have
    the kernel's axes, and the axis `rank` where that leaves them without `embed`.

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
    """Parts a student's parameters.

    Args:
        params: `{"params": ...}`.

    Returns:
        `(base, trained)`, both `{"params": ...}`, of the same arrays. The base lacks the trained
        modules altogether.
    """
    base, trained = _split(params["params"])
    return {"params": base}, {"params": trained}


def _split(tree: Mapping, top: bool = True) -> tuple[dict, dict]:
    base, trained = {}, {}
    for key, value in tree.items():
        if (top and key in TRAINED) or key in (DOWN, UP):
            trained[key] = value
        elif isinstance(value, Mapping):
            inner, adapters = _split(value, top=False)
            base[key] = inner
            if adapters:
                trained[key] = adapters
        else:
            base[key] = value
    return base, trained


def merge(base: Mapping, trained: Mapping) -> dict:
    """Puts a student's parameters together; no array is copied.

    Args:
        base: `{"params": ...}` of the teacher, or the base that `split` gave. Its own output head
            and last modulation are left out.
        trained: `{"params": ...}`.

    Returns:
        `{"params": ...}` of the student.

    Raises:
        ValueError: An adapter has no layer in the base, or a trained module is missing.
    """
    absent = [name for name in TRAINED if name not in trained["params"]]
    if absent:
        raise ValueError(f"the trained parameters lack {absent}")
    kept = {key: value for key, value in base["params"].items() if key not in TRAINED}
    return {"params": _merge(kept, trained["params"], ())}


def _merge(base: Mapping, trained: Mapping, path: tuple[str, ...]) -> dict:
    merged = dict(base)
    for key, value in trained.items():
        if (not path and key in TRAINED) or key in (DOWN, UP):
            merged[key] = value
        elif key not in base:
            raise ValueError(f"no layer {'/'.join((*path, key))} in the base")
        else:
            merged[key] = _merge(base[key], value, (*path, key))
    return merged


def fuse(params: Mapping, scale: float = 1.0) -> dict:
    """Adds the adapters into the kernels, for networks without adapters (merged weights).

    Args:
        params: `{"params": ...}` of a student.
        scale: See `LoRA`.

    Returns:
        `{"params": ...}` without adapters. Products are taken in float32 at least and the sum is
        rounded once, to the dtype of the kernel.
    """
    return {"params": _fuse(params["params"], scale)}


def _fuse(tree: Mapping, scale: float) -> dict:
    fused = {k: _fuse(v, scale) if isinstance(v, Mapping) else v for k, v in tree.items()}
    if DOWN not in fused:
        return fused
    kernel, down, up = fused["kernel"], fused.pop(DOWN), fused.pop(UP)
    wide = jnp.promote_types(down.dtype, jnp.float32)
    rank, ins = down.shape[-1], kernel.ndim - fused["bias"].ndim
    # What a stacked adapter has beyond its input axes and its rank is the axis of the layers.
    lead = kernel.shape[:1] if down.ndim - 1 > ins else (1,)
    left = jnp.asarray(down, wide).reshape(*lead, -1, rank)
    right = jnp.asarray(up, wide).reshape(*lead, rank, -1)
    delta = jnp.einsum("lir,lro->lio", left, right, precision="highest").reshape(kernel.shape)
    fused["kernel"] = (jnp.asarray(kernel, wide) + scale * delta).astype(kernel.dtype)
    return fused


def initial_trained(
    key: jax.Array, student: nn.Module, teacher_params: Mapping, noise: jax.Array | None = None
) -> dict:
    """The trained part of a student that starts at its teacher.

    Nothing of the base's size is made: a 12B student starts in the memory of its adapters.

    Args:
        key: Random key.
        student: A `Flux` or `QwenImage`, with or without `lora`.
        teacher_params: Parameters of the same network with a `VelocityHead` and without adapters.
        noise: `[K, C]` standard normal draws that set mixture components apart; None draws them.

    Returns:
        `{"params": ...}` for `merge`, with the dtypes of `student`'s own fresh parameters. It
        shares no buffer with the teacher, so a training step may donate it.

    Raises:
        ValueError: The teacher's parameters are not those of the student's base.
    """
    shapes = jax.eval_shape(student.init, key, *student.example())
    base, trained = (part["params"] for part in split(shapes))
    teacher, head = teacher_params["params"], student.head
    _compare(base, {name: tree for name, tree in teacher.items() if name not in TRAINED})
    _compare({"final_modulation": trained["final_modulation"]}, teacher, only=True)
    if set(teacher["head"]) != {"output"}:
        raise ValueError(f"head: the teacher needs a VelocityHead, it has {set(teacher['head'])}")

    keys = jax.random.split(key, 3)
    fresh = {name: tree for name, tree in trained.items() if name not in TRAINED}
    if student.lora is not None:
        fresh = _draw_adapters(keys[0], fresh, 1 / student.lora.rank)
    noise_shape = head.noise_shape(student.in_channels)
    if noise is None and noise_shape is not None:
        noise = jax.random.normal(keys[1], noise_shape, jnp.float32)
    own = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), trained["head"])
    if "logstd_in" in own:  # all that a head keeps of its own fresh parameters
        kernel = own["logstd_in"]["kernel"]
        own["logstd_in"]["kernel"] = xavier_uniform(keys[2], kernel.shape, kernel.dtype)
    # In bfloat16 the noise of the bias would be lost to rounding.
    output = jax.tree.map(
        lambda a: jnp.asarray(a, jnp.promote_types(a.dtype, jnp.float32)),
        dict(teacher["head"]["output"]),
    )
    fresh["head"] = head.from_velocity(own, output, channels=student.in_channels, noise=noise)
    fresh["final_modulation"] = dict(teacher["final_modulation"])
    return {
        "params": jax.tree.map(
            lambda new, old: jnp.array(new, dtype=old.dtype, copy=True), fresh, trained
        )
    }


def _draw_adapters(key: jax.Array, shapes: Mapping, spread: float) -> dict:
    """Down projections `N(0, spread^2)`, zero up projections."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
    drawn = []
    for (path, leaf), its_key in zip(leaves, jax.random.split(key, len(leaves)), strict=True):
        if path[-1].key == DOWN:
            drawn.append(spread * jax.random.normal(its_key, leaf.shape, leaf.dtype))
        else:
            drawn.append(jnp.zeros(leaf.shape, leaf.dtype))
    return jax.tree.unflatten(tree, drawn)


def _compare(ours: Mapping, theirs: Mapping, only: bool = False) -> None:
    """Raises ValueError for parameters that one side lacks or has in another shape.

    With `only`, the other side may have more.
    """

    def shapes(tree):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {"/".join(key.key for key in path): jnp.shape(leaf) for path, leaf in leaves}

    a, b = shapes(ours), shapes(theirs)
    names = sorted(set(a) if only else set(a) | set(b))
    problems = [
        f"{name}: student {a.get(name)}, teacher {b.get(name)}"
        for name in names
        if a.get(name) != b.get(name)
    ]
    if problems:
        raise ValueError("the teacher is no base of the student:\n  " + "\n  ".join(problems))
