"""Networks of other making as teachers and students: Flax Linen, Flax NNX, or two functions.

Such a network maps `(x[B, *sites, C], t[B], labels[B])`, or `(x, t, **condition)` for a condition
that is a mapping, or `(x, t)` without one, to `[B, *sites, outputs]`. A student's outputs are laid
out as the row of its policy says (`policy_outputs`); the one log standard deviation of a mixture
comes from a small network of time that trains along.

A student that starts at its teacher is asked with the teacher's own states and times, and its means
are converted as the teacher's predictions are, so that its first policy is the teacher at the
source, whatever that predicts.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from piflow_jax.config import PolicyConfig
from piflow_jax.flow.teacher import Teacher
from piflow_jax.models.heads import TEACHER_LOGSTD
from piflow_jax.models.layers import time_features
from piflow_jax.systems.conditioning import Conditioning
from piflow_jax.systems.policies import POLICIES
from piflow_jax.systems.shapes import DataShape

__all__ = ["Functions", "OwnNetwork", "as_functions"]

_LOGSTD_WIDTH = 64
_COPIED = "copied"


@dataclasses.dataclass(frozen=True)
class Functions:
    """A network as two functions; `as_functions` makes one of what a caller has.

    Attributes:
      init: `key -> {"params": ..., "carried": ...}`; gradients change the first, running averages
        and random state are in the second. Where the network names axes, the arrays are in boxes.
      apply: `(variables, x, t, condition, training) -> (outputs, carried)`.
    """

    init: Callable[[jax.Array], dict[str, Any]]
    apply: Callable[..., tuple[jax.Array, Any]]


def as_functions(network: Any, data: DataShape, condition: Any) -> Functions:
    """A network of any making as functions of its variables.

    Args:
      network: a `flax.linen.Module`; a `flax.nnx.Module`, whose own values are the initial ones; or
        a pair `(init, apply)` with `init(key) -> params` and `apply(params, x, t, ...)`.
      data: the shape of a sample.
      condition: shapes of a condition of one example, without the batch; None for none.

    Returns:
      The functions.

    Raises:
      TypeError: it is none of the three.
    """
    if isinstance(network, nn.Module):
        return _linen(network, data, condition)
    if isinstance(network, tuple) and len(network) == 2 and all(map(callable, network)):
        init, apply = network

        def call(variables, x, t, condition, training):
            del training
            arguments, named = _arguments(condition)
            return apply(variables["params"], x, t, *arguments, **named), ()

        return Functions(lambda key: {"params": init(key), "carried": ()}, call)
    from flax import nnx

    if isinstance(network, nnx.Module):
        return _nnx(network)
    raise TypeError(
        "a network is a flax.linen.Module, a flax.nnx.Module or a pair (init, apply), not "
        f"{type(network).__name__}"
    )


def _linen(module: nn.Module, data: DataShape, condition: Any) -> Functions:
    """All collections but `params` are carried; dropout is active where it finds its stream."""

    def init(key):
        one = jax.tree.map(lambda a: jnp.zeros((1, *a.shape), a.dtype), condition)
        arguments, named = _arguments(one)
        x = jnp.zeros((1, *data.shape), jnp.float32)
        variables = dict(module.init(key, x, jnp.ones(1), *arguments, **named))
        return {"params": variables.pop("params"), "carried": variables}

    def call(variables, x, t, condition, training):
        arguments, named = _arguments(condition)
        whole = {"params": variables["params"], **variables["carried"]}
        mutable = sorted(variables["carried"]) if training else False
        if not mutable:
            return module.apply(whole, x, t, *arguments, **named), variables["carried"]
        return module.apply(whole, x, t, *arguments, **named, mutable=mutable)

    return Functions(init, call)


def _nnx(module: Any) -> Functions:
    """`nnx.Param` is trained; everything else, random state included, is carried."""
    from flax import nnx

    graph, params, rest = nnx.split(module, nnx.Param, ...)
    # Keys of random streams are typed arrays, which checkpoints do not take.
    initial = {"params": params.to_pure_dict(), "carried": _raw(rest.to_pure_dict())}

    def merged(variables):
        states = [jax.tree.map(lambda a: a, params), jax.tree.map(lambda a: a, rest)]
        states[0].replace_by_pure_dict(variables["params"])
        states[1].replace_by_pure_dict(_typed(variables["carried"], rest.to_pure_dict()))
        return nnx.merge(graph, *states)

    def call(variables, x, t, condition, training):
        arguments, named = _arguments(condition)
        model = merged(variables)
        model.train() if training else model.eval()
        out = model(x, t, *arguments, **named)
        _, _, after = nnx.split(model, nnx.Param, ...)
        return out, _raw(after.to_pure_dict())

    return Functions(lambda key: jax.tree.map(jnp.copy, initial), call)


def _arguments(condition: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and named arguments behind state and time."""
    if condition is None:
        return (), {}
    if isinstance(condition, Mapping):
        return (), dict(condition)
    return (condition,), {}


def _is_key(array: Any) -> bool:
    return jnp.issubdtype(array.dtype, jax.dtypes.prng_key)


def _raw(tree: Any) -> Any:
    return jax.tree.map(lambda a: jax.random.key_data(a) if _is_key(a) else a, tree)


def _typed(tree: Any, like: Any) -> Any:
    def typed(array, like):
        if not _is_key(like):
            return array
        return jax.random.wrap_key_data(array, impl=jax.random.key_impl(like))

    return jax.tree.map(typed, tree, like)


class _TimeLogstd(nn.Module):
    """The log standard deviation of a mixture as a function of time alone."""

    @nn.compact
    def __call__(self, t: jax.Array) -> jax.Array:
        """Maps `t[B]` to `[B]`."""
        hidden = nn.silu(nn.Dense(_LOGSTD_WIDTH, name="hidden")(time_features(t * 1000.0)))
        zeros = nn.initializers.zeros
        return nn.Dense(1, kernel_init=zeros, bias_init=zeros, name="out")(hidden)[:, 0]


@dataclasses.dataclass(frozen=True, eq=False)
class OwnNetwork:
    """A network of other making; see `piflow_jax.systems.networks.Network`.

    Attributes:
      functions: the network.
      data: the shape of a sample.
      conditioning: how conditions are checked and what stands for none.
      policy: what a student predicts; None for a teacher, whose outputs are its predictions.
      asked: the teacher in whose states and times a student is asked; None asks with `(x, t)`.
    """

    functions: Functions
    data: DataShape
    conditioning: Conditioning
    policy: PolicyConfig | None = None
    asked: Teacher | None = None
    adapted = False
    drops = False

    def init(self, key: jax.Array) -> Any:
        """See `Network`."""
        return nn.unbox(self.named(key))

    def named(self, key: jax.Array) -> Any:
        """See `Network`."""
        keys = jax.random.split(key)
        variables = self.functions.init(keys[0])
        if self._predicts_std:
            logstd = _TimeLogstd().init(keys[1], jnp.ones(1))
            variables["params"] = {"network": variables["params"], "logstd": logstd["params"]}
        return variables

    def apply(self, variables, x, t, condition):
        """See `Network`."""
        return self._output(variables, x, t, condition, training=False)[0]

    def train(self, variables, x, t, condition, key):
        """See `Network`."""
        del key  # random state of its own is carried
        return self._output(variables, x, t, condition, training=True)

    def trained(self, variables: Any) -> Any:
        """See `Network`."""
        return variables["params"]

    def carried(self, variables: Any) -> Any:
        """See `Network`."""
        return variables["carried"]

    def with_base(self, trained: Any, base: Any) -> Any:
        """See `Network`."""
        return {"params": trained, "carried": base}

    def constrained(self, constrain: Any) -> "OwnNetwork":
        """See `Network`; activations lie where the compiler puts them."""
        del constrain
        return self

    @property
    def _predicts_std(self) -> bool:
        return self.policy is not None and POLICIES[self.policy.kind].predicts_std

    def _output(self, variables, x, t, condition, *, training):
        params = variables["params"]
        inner = {**variables, "params": params["network"] if self._predicts_std else params}
        z, s = (x, t) if self.asked is None else self.asked.inputs(x, t)
        values, carried = self.functions.apply(inner, z, s, condition, training)
        expected = (*x.shape[:-1], self.outputs)
        if values.shape != expected:
            raise ValueError(
                f"the network makes {list(values.shape)} of states {list(x.shape)}; it must make "
                f"{list(expected)}, {self.outputs} outputs per site"
            )
        values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
        if self.policy is None:
            return values, carried
        logstd = None
        if self._predicts_std:
            logstd = _TimeLogstd().apply({"params": params["logstd"]}, t)

        def as_velocity(predictions):
            if self.asked is None:
                return predictions
            return self.asked.as_velocity(predictions, x.astype(predictions.dtype), t)

        row = POLICIES[self.policy.kind]
        return row.read(self.policy, values, logstd, x, t, as_velocity), carried

    @property
    def outputs(self) -> int:
        """Numbers per site that the network has to make."""
        channels = self.data.channels
        if self.policy is None:
            return channels
        return POLICIES[self.policy.kind].outputs(self.policy, channels)

    def start(self, key: jax.Array, initial: Any) -> Any:
        """Trained variables of a student that starts at a teacher's, or at another student's.

        Args:
          key: random key.
          initial: parameters as the network's own functions take them. Where path and shape agree
            they are copied. A last axis of `m C` where the student has `m outputs` is the layer
            that predicts: its rows are repeated as the policy's row says (DESIGN 3.7).

        Returns:
          Variables like `trained(init(key))`, which share no buffer with `initial`.

        Raises:
          ValueError: parameters fit neither way; all are listed.
        """
        keys = jax.random.split(key)
        fresh = self.trained(self.init(keys[0]))
        own = fresh["network"] if self._predicts_std else fresh
        noise = jax.random.normal(keys[1], (self._components, self.data.channels))
        started = _started(own, nn.unbox(initial), self, noise)
        if not self._predicts_std:
            return started
        logstd = fresh["logstd"]
        out = {**logstd["out"], "bias": jnp.full_like(logstd["out"]["bias"], TEACHER_LOGSTD)}
        return {"network": started, "logstd": {**logstd, "out": out}}

    @property
    def _components(self) -> int:
        return max(POLICIES[self.policy.kind].droppable(self.policy), 1)


def _started(own: Any, initial: Any, network: OwnNetwork, noise: jax.Array) -> Any:
    """The student's tree with the teacher's values; see `OwnNetwork.start`."""
    theirs = dict(_by_path(initial))
    problems, leaves = [], []
    for path, leaf in _by_path(own):
        given = theirs.pop(path, None)
        shape = None if given is None else jnp.shape(given)
        if shape == leaf.shape:
            leaves.append(jnp.array(given, leaf.dtype, copy=True))
        elif shape is not None and _predicts(shape, leaf.shape, network):
            leaves.append(_repeated(jnp.asarray(given, leaf.dtype), leaf.shape, network, noise))
        else:
            here = "nothing" if shape is None else list(shape)
            problems.append(f"{path}: the student has {list(leaf.shape)}, the teacher {here}")
            leaves.append(leaf)
    problems += [f"{path}: the student has nothing" for path in theirs]
    if problems:
        raise ValueError(
            "the student cannot start at these parameters:\n  " + "\n  ".join(problems)
        )
    return jax.tree.unflatten(jax.tree.structure(own), leaves)


def _predicts(theirs: tuple[int, ...], ours: tuple[int, ...], network: OwnNetwork) -> bool:
    """Whether a layer's last axis has the teacher's `m C` where the student has `m outputs`."""
    c, outputs = network.data.channels, network.outputs
    if theirs[:-1] != ours[:-1] or not theirs or theirs[-1] % c or ours[-1] % outputs:
        return False
    return theirs[-1] // c == ours[-1] // outputs


def _repeated(
    rows: jax.Array, shape: tuple[int, ...], network: OwnNetwork, noise: jax.Array
) -> jax.Array:
    """The layer's rows for every output; a bias, a vector, gets the noise."""
    c = network.data.channels
    lead, pixels = rows.shape[:-1], rows.shape[-1] // c
    rows = rows.reshape(*lead, pixels, c)
    row = POLICIES[network.policy.kind]
    return row.start(network.policy, rows, None if lead else noise).reshape(shape)


def _by_path(tree: Any) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]
