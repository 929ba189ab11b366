"""Tables that map weight names and layouts of a PyTorch release to leaves of Flax parameters.

A rule works in both directions: exchanging the sides of its `einops` pattern inverts it. Imported
weights can therefore be exported without a second table.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import einops
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from piflow_jax.convert.leaves import Leaf, dtype_of

_LISTED = 20


@dataclasses.dataclass(frozen=True)
class LazyPlace:
    """A `place` that receives a `Leaf` before it is read, instead of a numpy array.

    Attributes:
        place: `(path, leaf) -> placed leaf`.
    """

    place: Callable[[tuple[str, ...], Leaf], Any]


# Puts a leaf on its devices, given its path.
Place = Callable[[tuple[str, ...], np.ndarray], Any] | LazyPlace


@dataclasses.dataclass(frozen=True)
class Rule:
    """One Flax leaf and its PyTorch arrays.

    Attributes:
        names: PyTorch names. Several arrays are stacked on a leading axis `n` of the pattern's left
            side. A name with `{layer}` stands for one array per layer, stacked on a leading axis
            `l`.
        path: Keys of the Flax leaf.
        pattern: `einops` pattern from the (stacked) PyTorch layout to the Flax layout.
        sizes: Length of every axis in the pattern except `l` and `n`.
        depth: Number of layers, if names have `{layer}`.
    """

    names: tuple[str, ...]
    path: tuple[str, ...]
    pattern: str
    sizes: Mapping[str, int]
    depth: int = 1

    @property
    def layered(self) -> bool:
        """Whether the arrays of all layers are stacked."""
        return "{layer}" in self.names[0]

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """Shape of one PyTorch array."""
        left = einops.parsing.ParsedExpression(self.pattern.split("->")[0])
        axes = [group for group in left.composition if group not in (["l"], ["n"])]
        return tuple(math.prod(self.sizes[axis] for axis in group) for group in axes)

    @property
    def torch_names(self) -> list[str]:
        """All PyTorch names for the leaf, layers outermost."""
        return [name.format(layer=i) for i in range(self.depth) for name in self.names]

    def leaf(self, state: Mapping[str, np.ndarray]) -> Leaf:
        """Makes the Flax leaf from PyTorch arrays without reading them."""
        names, many = self.torch_names, len(self.names)
        layers = [names[i : i + many] for i in range(0, len(names), many)]
        return Leaf(self.pattern, self.sizes, layers, state)

    def from_leaf(self, leaf: np.ndarray) -> dict[str, np.ndarray]:
        """Builds the PyTorch arrays from the Flax leaf."""
        left, right = self.pattern.split("->")
        inverse = f"{right.strip()} -> {left.strip()}"
        stacked = einops.rearrange(np.asarray(leaf), inverse, **self._known())
        arrays = stacked.reshape((-1, *self.torch_shape))
        # A view would keep the whole stack alive and is not contiguous for every writer, so copy.
        return {n: np.array(a) for n, a in zip(self.torch_names, arrays, strict=True)}

    def _known(self) -> dict[str, int]:
        known = dict(self.sizes)
        if len(self.names) > 1:
            known["n"] = len(self.names)
        return known


def linear(
    name: str | tuple[str, ...],
    path: tuple[str, ...],
    out: int,
    in_: int,
    *,
    pieces: int = 1,
    depth: int = 1,
    bias: bool = True,
) -> list[Rule]:
    """Rules for the weight and the bias of a linear layer (or of several fused layers).

    Args:
        name: PyTorch module name, with `{layer}` in it if layers are stacked. A tuple of names is
            fused into a kernel `[in, n, out]`.
        path: Flax module path.
        out: Output features of one PyTorch module, or of one piece of it.
        in_: Input features.
        pieces: Number of consecutive pieces in the PyTorch module's outputs, kept separate in Flax
            as a kernel `[in, s, out]`.
        depth: See `Rule`.
        bias: Whether the layer has a bias.

    Returns:
        Two rules, or one without a bias.
    """
    names = (name,) if isinstance(name, str) else name
    sizes = {"o": out}
    layer = "l " if "{layer}" in names[0] else ""
    many, split, outs = "", "o", "o"
    if len(names) > 1:
        many, outs = "n ", "n o"
    if pieces > 1:
        split, outs, sizes = "(s o)", "s o", {"s": pieces, "o": out}
    weights = tuple(f"{n}.weight" for n in names)
    kernel = f"{layer}{many}{split} i -> {layer}i {outs}"
    rules = [Rule(weights, (*path, "kernel"), kernel, {**sizes, "i": in_}, depth)]
    if bias:
        biases = tuple(f"{n}.bias" for n in names)
        pattern = f"{layer}{many}{split} -> {layer}{outs}"
        rules += [Rule(biases, (*path, "bias"), pattern, sizes, depth)]
    return rules


def embedder_rules(official: str, ours: str, d: int, in_: int, *, bias: bool = True) -> list[Rule]:
    """Rules for a two-layer embedder of a condition."""
    first = linear(official.format(1), (f"{ours}_in",), d, in_, bias=bias)
    return first + linear(official.format(2), (f"{ours}_out",), d, d, bias=bias)


def import_state(
    state: Mapping[str, np.ndarray],
    rules: Iterable[Rule],
    place: Place | None = None,
) -> dict:
    """Turns a PyTorch state into nested Flax parameters.

    Names, shapes and dtypes are checked before any array is read, and numbers when they are read.
    With lazy arrays, only those of one layer are in memory at a time, plus the leaf that receives
    them.

    Args:
        state: Arrays by PyTorch name, possibly lazy (anything with a shape that numpy can read).
        rules: The table.
        place: Called with the path of a leaf, such as `("blocks", "qkv", "kernel")`, and the leaf
            as a numpy array, as soon as it is built; its result becomes the leaf. If it moves the
            leaf to its devices, the host never holds more than one. A `LazyPlace` is called before
            the leaf is read. None puts leaves on the default device.

    Returns:
        Nested dict of JAX arrays with the dtypes of `state` (but bfloat16 for float8), or of the
        results of `place`.

    Raises:
        ValueError: Names, shapes or dtypes do not match (the message lists the first 20 faults), or
            numbers are not finite.
    """
    rules = list(rules)
    expected = {name: rule.torch_shape for rule in rules for name in rule.torch_names}
    problems = [f"missing {name} {shape}" for name, shape in expected.items() if name not in state]
    problems += [
        f"unexpected {name} {np.shape(array)}"
        for name, array in state.items()
        if name not in expected
    ]
    problems += [
        f"{name} has shape {found}, expected {shape}" + " (transposed)" * (found == shape[::-1])
        for name, shape in expected.items()
        if name in state and (found := np.shape(state[name])) != shape
    ]
    problems += [
        f"{name} is of type {dtype_of(state[name])}, and weights are floating-point numbers"
        for name in expected
        if name in state and not jnp.issubdtype(dtype_of(state[name]), jnp.floating)
    ]
    if problems:
        raise ValueError(f"the state does not fit the model:{listed(problems)}")
    leaves = {}
    for rule in rules:
        leaf = rule.leaf(state)
        if isinstance(place, LazyPlace):
            leaf = place.place(rule.path, leaf)
        else:
            leaf = np.asarray(leaf)
            leaf = jnp.asarray(leaf) if place is None else place(rule.path, leaf)
        leaves[rule.path] = leaf
        del leaf
    return unflatten_dict(leaves)


def listed(faults: list[str]) -> str:
    """Faults on separate lines, at most a screenful."""
    more = [f"and {len(faults) - _LISTED} more"] if len(faults) > _LISTED else []
    return "".join(f"\n  {line}" for line in [*faults[:_LISTED], *more])


def export_state(params: Mapping, rules: Iterable[Rule]) -> dict[str, np.ndarray]:
    """Turns nested Flax parameters into a PyTorch state, the inverse of `import_state`.

    Args:
        params: Nested dict of arrays.
        rules: The table.

    Returns:
        Arrays by PyTorch name, with the dtypes of `params`.

    Raises:
        ValueError: The parameters have leaves that the table lacks, or the reverse.
    """
    rules = list(rules)
    leaves = flatten_dict(params)
    wanted = {rule.path for rule in rules}
    if wanted != set(leaves):
        missing = sorted("/".join(path) for path in wanted - set(leaves))
        extra = sorted("/".join(path) for path in set(leaves) - wanted)
        raise ValueError(f"the parameters do not fit the table: missing {missing}, unknown {extra}")
    state: dict[str, np.ndarray] = {}
    for rule in rules:
        state |= rule.from_leaf(leaves[rule.path])
    return state
