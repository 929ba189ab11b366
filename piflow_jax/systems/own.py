"""A user's own networks: Flax Linen, Flax NNX, or two functions, as teachers and as students.

Such a network maps `(x[B, *sites, C], t[B], labels[B])` to `[B, *sites, outputs]`. A condition that
is a mapping is passed by keywords; without a condition nothing is passed. The row of a student's
policy defines the layout of its outputs (`policy_outputs`). A mixture's single log standard
deviation comes from a small function of time, which is trained along with the network.
"""

import dataclasses
import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.errors import FlaxError

from piflow_jax.arguments import check_between, prefixed
from piflow_jax.config import ConfigError, PolicyConfig
from piflow_jax.flow.teacher import Teacher
from piflow_jax.keys import is_typed_key, key_numbers, seed_key
from piflow_jax.models.heads import TEACHER_LOGSTD
from piflow_jax.models.layers import time_features
from piflow_jax.systems.conditioning import (
    ClassLabels,
    Condition,
    Conditioning,
    conditioning_of,
)
from piflow_jax.systems.network import Network
from piflow_jax.systems.policies import POLICIES
from piflow_jax.systems.shapes import DataShape

_LOGSTD_WIDTH = 64
_TIME_SCALE = 1000.0


class Functions(Protocol):
    """A network as functions of its variables `{"params": ..., "carried": ...}`.

    Gradients change the first part. The second part holds running averages and random state.
    """

    def init(self, key: jax.Array, data: DataShape) -> dict[str, Any]:
        """Fresh variables; parameters are in boxes if their axes have names."""
        ...

    def apply(
        self, variables: Any, x: jax.Array, t: jax.Array, condition: Condition, training: bool
    ) -> tuple[jax.Array, Any]:
        """The output, and the carried variables for the next call in training."""
        ...

    def parameters_of(self, given: Any) -> Any:
        """Parameters as a user gives them, in the tree of `init`'s."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class _Linen:
    """A `flax.linen.Module`; it carries all of its collections except `params`."""

    module: nn.Module

    @property
    def _compared(self):
        try:
            hash(self.module)
        except TypeError:  # lists and arrays among its fields
            return id(self.module)
        return self.module

    def __eq__(self, other):
        return isinstance(other, _Linen) and self._compared == other._compared

    def __hash__(self):
        return hash(self._compared)

    def init(self, key, data):
        example = conditioning_of(data).example(data, 1, 0)
        condition = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), example)
        arguments, named = _arguments(condition)
        x = jnp.zeros((1, *data.shape), jnp.float32)
        variables = dict(self.module.init(key, x, jnp.ones(1, jnp.float32), *arguments, **named))
        return {"params": variables.pop("params", {}), "carried": variables}

    def apply(self, variables, x, t, condition, training):
        arguments, named = _arguments(condition)
        carried = variables["carried"]
        whole = {"params": variables["params"], **(carried or {})}
        if not (training and carried):
            return self.module.apply(whole, x, t, *arguments, **named), carried
        return self.module.apply(whole, x, t, *arguments, **named, mutable=sorted(carried))

    def parameters_of(self, given):
        return params_of(given)


@dataclasses.dataclass(frozen=True, eq=False)
class _Nnx:
    """A `flax.nnx.Module`, which starts at its own values and carries all but `nnx.Param`."""

    module: Any

    @functools.cached_property
    def _split(self):
        from flax import nnx

        graph, params, rest = nnx.split(self.module, nnx.Param, ...)
        return graph, nnx.to_pure_dict(params), nnx.to_pure_dict(rest), params, rest

    def init(self, key, data):
        _, params, rest, *_ = self._split
        # Keys of random streams have a dtype of their own, which checkpoints do not accept.
        return {"params": jax.tree.map(jnp.copy, params), "carried": _raw(rest)}

    def apply(self, variables, x, t, condition, training):
        from flax import nnx

        graph, _, pure, *states = self._split
        carried = variables["carried"]
        states = [jax.tree.map(lambda leaf: leaf, state) for state in states]
        nnx.replace_by_pure_dict(states[0], variables["params"])
        nnx.replace_by_pure_dict(states[1], _typed(carried or {}, pure))
        module = nnx.merge(graph, *states)
        module.train() if training else module.eval()
        arguments, named = _arguments(condition)
        out = module(x, t, *arguments, **named)
        if not carried:
            return out, carried
        _, _, after = nnx.split(module, nnx.Param, ...)
        return out, _raw(nnx.to_pure_dict(after))

    def parameters_of(self, given):
        return params_of(given)

    def __getstate__(self):
        return {"module": self.module}


@dataclasses.dataclass(frozen=True)
class _Pair:
    """`init(key) -> params` and `apply(params, x, t, ...)`; it carries nothing."""

    make: Callable[[jax.Array], Any]
    call: Callable[..., jax.Array]

    def init(self, key, data):
        return {"params": self.make(key), "carried": ()}

    def apply(self, variables, x, t, condition, training):
        arguments, named = _arguments(condition)
        return self.call(variables["params"], x, t, *arguments, **named), variables["carried"]

    def parameters_of(self, given):
        if isinstance(given, Mapping) and given.keys() == {"params", "carried"}:
            return given["params"]  # of `train_teacher`, see `init`
        own = jax.eval_shape(self.make, seed_key(0))
        # What it makes may itself be Linen's variables.
        return given if isinstance(own, Mapping) and "params" in own else params_of(given)


def _functions(network: Any, name: str) -> Functions:
    if isinstance(network, nn.Module):
        return _Linen(network)
    if isinstance(network, tuple) and len(network) == 2 and all(map(callable, network)):
        return _Pair(*network)
    from flax import nnx

    if isinstance(network, nnx.Module):
        return _Nnx(network)
    raise ConfigError(
        f"{name} is a {type(network).__name__}, not a flax.linen.Module, a flax.nnx.Module or a "
        "pair of functions (init, apply)"
    )


class _TimeLogstd(nn.Module):
    """The log standard deviation of a mixture as a function of time alone."""

    @nn.compact
    def __call__(self, t: jax.Array) -> jax.Array:
        """Maps `t[B]` to `[B]`."""
        features = time_features(t * _TIME_SCALE)
        hidden = nn.silu(nn.Dense(_LOGSTD_WIDTH, name="hidden")(features))
        zeros, bias = nn.initializers.zeros, nn.initializers.constant(TEACHER_LOGSTD)
        return nn.Dense(1, kernel_init=zeros, bias_init=bias, name="out")(hidden)[:, 0]


@dataclasses.dataclass(frozen=True)
class OwnNetwork(Network):
    """A user's own network; see `Network`.

    Attributes:
      name: its name in messages and checkpoints, `package.module:name`.
      functions: the network.
      data: the shape of samples, and their conditions.
      policy: the policy that a student predicts; None for a teacher, whose outputs are its
        predictions.
      asked: the teacher that sets the scale and time of a student's inputs and the kind of
        prediction of its means. A student that starts at the teacher's weights then predicts the
        same as the teacher. With None the inputs are `(x, t)` and the means are velocities.
    """

    name: str
    functions: Functions
    data: DataShape
    policy: PolicyConfig | None = None
    asked: Teacher | None = None

    @property
    def conditioning(self) -> Conditioning:
        """See `Network`."""
        return conditioning_of(self.data)

    @property
    def outputs(self) -> int:
        """Numbers per site that the network must predict."""
        if self.policy is None:
            return self.data.channels
        return POLICIES[self.policy.kind].outputs(self.policy, self.data.channels)

    @property
    def carries(self) -> bool:
        """See `Network`."""
        return bool(jax.tree.leaves(jax.eval_shape(self.init, seed_key(0))["carried"]))

    @property
    def spec(self) -> dict[str, Any]:
        """See `Network`: the scale and time of its inputs, and its prediction."""
        if self.asked is None:
            return {}
        method, arguments = self.asked.schedule.made_by or (None, ())
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in arguments}
        return {
            "asked.prediction": self.asked.prediction,
            "asked.schedule": None if method is None else [method, values],
        }

    def named(self, key: jax.Array) -> Any:
        """See `Network`."""
        keys = jax.random.split(key)
        variables = self.functions.init(keys[0], self.data)
        if not jax.tree.leaves(variables["params"]):
            raise ConfigError(f"{self.name} has no parameters to train")
        if self._predicts_std:
            logstd = _TimeLogstd().init(keys[1], jnp.ones(1, jnp.float32))["params"]
            variables["params"] = {"network": variables["params"], "logstd": logstd}
        return variables

    def apply(self, variables, x, t, condition):
        """See `Network`."""
        return self._called(variables, x, t, condition, training=False)[0]

    def train(self, variables, x, t, condition, key):
        """See `Network`; it carries random state of its own."""
        return self._called(variables, x, t, condition, training=True)

    def _called(self, variables, x, t, condition, *, training):
        params, logstd = variables["params"], None
        if self._predicts_std:
            logstd = _TimeLogstd().apply({"params": params["logstd"]}, t)
            params = params["network"]
        own = {"params": params, "carried": variables["carried"]}
        if isinstance(self.conditioning, ClassLabels):
            condition = self.conditioning(condition)["labels"]
            check_between("labels", condition, 0, self.data.num_classes)
        z, s = (x, t) if self.asked is None else self.asked.inputs(x, t)
        values, carried = self.functions.apply(own, z, s, condition, training)
        if not hasattr(values, "shape"):
            raise ConfigError(
                f"{self.name} made a {type(values).__name__}, it must make one array "
                f"{[*x.shape[:-1], self.outputs]}"
            )
        if values.shape != (*x.shape[:-1], self.outputs):
            raise ConfigError(
                f"{self.name} made {list(values.shape)} of states {list(x.shape)}, it must make "
                f"{[*x.shape[:-1], self.outputs]}: {self.outputs} per site"
            )
        values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
        if self.policy is None:
            return values, carried

        def as_velocity(predictions):
            if self.asked is None:
                return predictions
            return self.asked.as_velocity(predictions, x.astype(predictions.dtype), t)

        row = POLICIES[self.policy.kind]
        return row.read(self.policy, values, logstd, x, t, as_velocity), carried

    def trained(self, variables):
        """See `Network`."""
        return variables["params"]

    def carried(self, variables):
        """See `Network`."""
        return variables["carried"]

    def with_base(self, trained, base):
        """See `Network`."""
        return {"params": trained, "carried": base}

    def start(self, key: jax.Array, teacher: "OwnNetwork", teacher_variables: Any) -> Any:
        """See `Network`."""
        return self.start_at(key, teacher.trained(teacher_variables))

    def start_at(self, key: jax.Array, initial: Any) -> Any:
        """The trained part of a network that starts at others, as a student at its teacher's.

        Args:
          key: PRNG key.
          initial: parameters. Those with the same path and shape are copied. A last axis of `m C`,
            where the student has `m outputs`, belongs to the layer that predicts. Its rows are
            repeated as the policy's row defines (`PolicyKind.start`).

        Returns:
          The parameters.

        Raises:
          ConfigError: some parameters fit neither way; the message lists them.
        """
        keys = jax.random.split(key)
        fresh = self.init(keys[0])["params"]
        of_student = jax.tree.structure(fresh) == jax.tree.structure(initial)
        if of_student or not self._predicts_std:
            return self._started(fresh, initial, keys[1])
        return fresh | {"network": self._started(fresh["network"], initial, keys[1])}

    def check(self, teacher: "OwnNetwork | None" = None) -> None:
        """See `Network`: checks parameters, outputs, an embedded null label, and the start."""
        given = None
        if teacher is not None:
            given = teacher.trained(jax.eval_shape(teacher.init, seed_key(0)))
        self.check_start(given)

    def check_start(self, initial: Any = None) -> None:
        """Runs `check` with a start at parameters or at their shapes; None is no start."""
        key, data = seed_key(0), self.data
        x, t = jnp.zeros((1, *data.shape), jnp.float32), jnp.ones(1, jnp.float32)
        example = self.conditioning.example(data, 1, 0)
        null = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), example)
        if data.num_classes and not data.conditions:
            null = jnp.asarray(self.conditioning.null(data, None))[None]
        rule = f"{self.name} must run without random keys, and leave its state as it is in sampling"
        with prefixed(rule, FlaxError, ConfigError):
            out = jax.jit(self.apply)(jax.jit(self.init)(key), x, t, null)
        if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(out)):
            raise ConfigError(
                f"{self.name} is not finite for the null label, {data.num_classes}: embed "
                f"num_classes + 1 = {data.num_classes + 1} labels"
            )
        if initial is not None:
            jax.eval_shape(lambda theirs: self.start_at(key, theirs), initial)

    @property
    def _predicts_std(self) -> bool:
        return self.policy is not None and POLICIES[self.policy.kind].predicts_std

    def _started(self, own: Any, theirs: Any, key: jax.Array) -> Any:
        """The network's tree with the values of another tree; see `start_at`."""
        row = None if self.policy is None else POLICIES[self.policy.kind]
        components, channels = row.droppable(self.policy) if row else 0, self.data.channels
        noise = jax.random.normal(key, (max(components, 1), channels))
        rest, problems, leaves = dict(_by_path(theirs)), [], []
        repeats, separates = False, components < 2
        for path, leaf in _by_path(own):
            given = rest.pop(path, None)
            shape = None if given is None else given.shape
            if shape == leaf.shape:
                leaves.append(jnp.array(given, leaf.dtype, copy=True))
            elif shape and _predicts(shape, leaf.shape, channels, self.outputs):
                rows = given.reshape(*shape[:-1], -1, channels)
                # The bias is a vector; its noise separates the components.
                repeats, separates = True, separates or not shape[:-1]
                repeated = row.start(self.policy, rows, None if shape[:-1] else noise)
                leaves.append(repeated.reshape(leaf.shape).astype(leaf.dtype))
            else:
                of_start = "has none" if shape is None else f"has {list(shape)}"
                problems.append(f"{path}: the network has {list(leaf.shape)}, the start {of_start}")
        problems += [f"{path}: nothing in the network" for path in rest]
        if repeats and not separates:
            problems.append("the layer that predicts has no bias, so all components stay equal")
        if problems:
            raise ConfigError(
                f"{self.name} cannot start at the parameters of its teacher, or at those given:"
                + "".join(f"\n  {problem}" for problem in problems)
            )
        return jax.tree.unflatten(jax.tree.structure(own), leaves)


def network_of_function(name: str, data: DataShape, policy: PolicyConfig | None) -> OwnNetwork:
    """Makes a network with a user's function.

    Args:
      name: `package.module:function`, of a `function(outputs, shape, num_classes)` that returns a
        `flax.linen.Module`, called as `module.apply(variables, x, t, labels)`. Labels are 0 to
        `num_classes`; the last one is the null label.
      data: the shape of samples, and the number of their classes.
      policy: the policy that it predicts; None for the velocity of a teacher.

    Returns:
      The network.

    Raises:
      ConfigError: there is no such function, or it does not make a network.
    """
    place, _, function = name.partition(":")
    try:
        make = getattr(importlib.import_module(place), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"config.model.network = {name!r}: {error}; it must be package.module:function, of a "
            "module that Python finds from the directory in which the command runs"
        ) from error
    return own_network(f"config.model.network = {name!r}", make, data, policy)


def own_network(
    name: str,
    network: Any,
    data: DataShape,
    policy: PolicyConfig | None,
    asked: Teacher | None = None,
) -> OwnNetwork:
    """Wraps a user's own network.

    Args:
      name: its name in messages.
      network: a `flax.linen.Module`, a `flax.nnx.Module`, a pair `(init, apply)`, or a function
        `(outputs, shape, num_classes)` that makes one of these.
      data: the shape of samples, and their conditions.
      policy: the policy that it predicts; None for a teacher.
      asked: see `OwnNetwork`.

    Returns:
      The network.

    Raises:
      ConfigError: it is none of these, or the function takes other arguments.
    """
    from flax import nnx

    if callable(network) and not isinstance(network, nn.Module | nnx.Module):
        outputs = OwnNetwork(name, None, data, policy).outputs
        try:
            inspect.signature(network).bind(outputs, data.shape, data.num_classes)
        except ValueError:  # a function without a signature may take them
            pass
        except TypeError as error:
            raise ConfigError(
                f"{name} must take (outputs, shape, num_classes) to make a network: {error}"
            ) from error
        network, name = network(outputs, data.shape, data.num_classes), f"what {name} made"
    return OwnNetwork(name, _functions(network, name), data, policy, asked)


def params_of(given: Any) -> Any:
    """Parameters of any network in its own tree, from Linen's variables or NNX's state."""
    if isinstance(given, Mapping) and "params" in given:
        return given["params"]
    from flax import nnx

    return nnx.to_pure_dict(given) if isinstance(given, nnx.State) else given


def _arguments(condition: Condition) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments after state and time."""
    if condition is None:
        return (), {}
    return ((), dict(condition)) if isinstance(condition, Mapping) else ((condition,), {})


def _raw(tree: Any) -> Any:
    return jax.tree.map(lambda a: jnp.asarray(key_numbers(a)), tree)


def _typed(tree: Any, like: Any) -> Any:
    def typed(array, like):
        if not is_typed_key(like):
            return array
        return jax.random.wrap_key_data(array, impl=jax.random.key_impl(like))

    return jax.tree.map(typed, tree, like)


def _predicts(theirs: tuple[int, ...], ours: tuple[int, ...], channels: int, outputs: int) -> bool:
    """Whether the last axes are `m channels` in theirs and `m outputs` in ours."""
    if theirs[:-1] != ours[:-1] or theirs[-1] % channels or ours[-1] % outputs:
        return False
    return theirs[-1] // channels == ours[-1] // outputs


def _by_path(tree: Any) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]
