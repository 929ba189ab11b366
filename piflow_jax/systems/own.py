"""Networks of a user's own, made by a function that `config.model.network` names."""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from piflow_jax.config import ConfigError, PolicyConfig
from piflow_jax.keys import seed_key
from piflow_jax.models.heads import TEACHER_LOGSTD
from piflow_jax.models.layers import time_features
from piflow_jax.systems.conditioning import ClassLabels
from piflow_jax.systems.policies import POLICIES
from piflow_jax.systems.shapes import DataShape

__all__ = ["OwnNetwork", "network_of_function", "own_network"]

_LOGSTD_WIDTH = 64
_TIME_SCALE = 1000.0


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
class OwnNetwork:
    """A network of a user's own; see `piflow_jax.systems.networks.Network`.

    The one log standard deviation of a mixture comes from a small function of time, which is
    trained along.

    Attributes:
      name: `config.model.network`, for messages.
      module: maps `(x[B, *sites, C], t[B], labels[B])` to `[B, *sites, outputs]`.
      data: the shape of samples, and the number of their classes.
      policy: what a student predicts; None for a teacher, which predicts velocities.
    """

    name: str
    module: nn.Module
    data: DataShape
    policy: PolicyConfig | None = None
    conditioning = ClassLabels()
    adapted = False
    drops = False

    def init(self, key: jax.Array) -> Any:
        """See `Network`."""
        return nn.unbox(self.named(key))

    def named(self, key: jax.Array) -> Any:
        """See `Network`."""
        keys = jax.random.split(key)
        one = jnp.ones(1, jnp.float32)
        x, labels = jnp.zeros((1, *self.data.shape), jnp.float32), jnp.zeros(1, jnp.int32)
        variables = self.module.init(keys[0], x, one, labels)
        if set(variables) != {"params"}:
            others = ", ".join(sorted(set(variables) - {"params"})) or "no parameters"
            raise ConfigError(
                f"config.model.network = {self.name!r} must have parameters alone, its module has "
                f"{others}; write your own loop with piflow_jax.imitation_loss for such a network"
            )
        params = variables["params"]
        if self._predicts_std:
            logstd = _TimeLogstd().init(keys[1], one)["params"]
            params = {"network": params, "logstd": logstd}
        return {"params": params}

    def apply(self, variables, x, t, condition):
        """See `Network`."""
        params, logstd = variables["params"], None
        if self._predicts_std:
            logstd = _TimeLogstd().apply({"params": params["logstd"]}, t)
            params = params["network"]
        values = self.module.apply({"params": params}, x, t, condition)
        outputs = _outputs(self.data, self.policy)
        if values.shape != (*x.shape[:-1], outputs):
            raise ConfigError(
                f"config.model.network = {self.name!r} made {list(values.shape)} of states "
                f"{list(x.shape)}, it must make {[*x.shape[:-1], outputs]}: {outputs} per site"
            )
        values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
        if self.policy is None:
            return values
        row = POLICIES[self.policy.kind]
        return row.read(self.policy, values, logstd, x, t, lambda predictions: predictions)

    def train(self, variables, x, t, condition, key):
        """See `Network`; nothing is dropped or carried."""
        del key
        return self.apply(variables, x, t, condition), ()

    def trained(self, variables):
        """See `Network`."""
        return variables

    def carried(self, variables):
        """See `Network`."""
        del variables
        return ()

    def with_base(self, trained, base):
        """See `Network`."""
        del base
        return trained

    def constrained(self, constrain):
        """See `Network`; activations lie where the compiler puts them."""
        del constrain
        return self

    def start(self, key: jax.Array, teacher: "OwnNetwork", teacher_variables: Any) -> Any:
        """See `Network`.

        Parameters are copied where path and shape agree. A last axis of `m C` where the student has
        `m outputs` is of the layer that predicts: its rows are repeated as the policy's row says
        (DESIGN 3.7). ConfigError lists what fits neither way.
        """
        del teacher
        keys = jax.random.split(key)
        fresh, theirs = self.init(keys[0])["params"], teacher_variables["params"]
        if not self._predicts_std:
            return {"params": self._started(fresh, theirs, keys[1])}
        return {"params": fresh | {"network": self._started(fresh["network"], theirs, keys[1])}}

    def check(self, teacher: "OwnNetwork | None" = None) -> None:
        """See `Network`: parameters, outputs, a null label that is embedded, and the start."""
        key = seed_key(0)
        variables = jax.jit(self.init)(key)
        x, t = jnp.zeros((1, *self.data.shape), jnp.float32), jnp.ones(1, jnp.float32)
        null = jnp.asarray(self.conditioning.null(self.data, None))[None]
        out = jax.jit(self.apply)(variables, x, t, null)
        if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(out)):
            raise ConfigError(
                f"config.model.network = {self.name!r} is not finite for the null label, "
                f"{self.data.num_classes}: embed num_classes + 1 = {self.data.num_classes + 1} "
                "labels"
            )
        if teacher is not None:
            given = jax.eval_shape(teacher.init, key)
            jax.eval_shape(lambda theirs: self.start(key, teacher, theirs), given)

    @property
    def _predicts_std(self) -> bool:
        return self.policy is not None and POLICIES[self.policy.kind].predicts_std

    def _started(self, own: Any, theirs: Any, key: jax.Array) -> Any:
        """The student's tree with the teacher's values; see `start`."""
        row, outputs = POLICIES[self.policy.kind], _outputs(self.data, self.policy)
        noise = jax.random.normal(key, (max(row.droppable(self.policy), 1), self.data.channels))
        rest, problems, leaves = dict(_by_path(theirs)), [], []
        for path, leaf in _by_path(own):
            given = rest.pop(path, None)
            shape = None if given is None else given.shape
            if shape == leaf.shape:
                leaves.append(jnp.copy(given))
            elif shape and _predicts(shape, leaf.shape, self.data.channels, outputs):
                rows = given.reshape(*shape[:-1], -1, self.data.channels)
                # A bias, a vector, sets components apart.
                repeated = row.start(self.policy, rows, None if shape[:-1] else noise)
                leaves.append(repeated.reshape(leaf.shape).astype(leaf.dtype))
            else:
                of_teacher = "has none" if shape is None else f"has {list(shape)}"
                problems.append(
                    f"{path}: the student has {list(leaf.shape)}, the teacher {of_teacher}"
                )
        problems += [f"{path}: nothing in the student" for path in rest]
        if problems:
            raise ConfigError(
                f"config.model.network = {self.name!r}: the student cannot start at its teacher:"
                + "".join(f"\n  {problem}" for problem in problems)
            )
        return jax.tree.unflatten(jax.tree.structure(own), leaves)


def network_of_function(name: str, data: DataShape, policy: PolicyConfig | None) -> OwnNetwork:
    """The network that a user's function makes.

    Args:
      name: `package.module:function`, of a `function(outputs, shape, num_classes)` that returns a
        `flax.linen.Module`, called as `module.apply(variables, x, t, labels)`. Labels are 0 to
        `num_classes`, of which the last stands for none.
      data: the shape of samples, and the number of their classes.
      policy: what it predicts; None for the velocity of a teacher.

    Returns:
      The network.

    Raises:
      ConfigError: there is no such function, or it makes no module.
    """
    place, _, function = name.partition(":")
    try:
        make = getattr(importlib.import_module(place), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"config.model.network = {name!r}: {error}; it must be package.module:function, of a "
            "module that Python finds from the directory in which the command runs"
        ) from error
    return own_network(name, make, data, policy)


def own_network(
    name: str,
    make: Callable[[int, tuple[int, ...], int], nn.Module],
    data: DataShape,
    policy: PolicyConfig | None,
) -> OwnNetwork:
    """The same of the function itself; see `network_of_function`."""
    module = make(_outputs(data, policy), data.shape, data.num_classes)
    if not isinstance(module, nn.Module):
        raise ConfigError(
            f"config.model.network = {name!r} made a {type(module).__name__}, not a "
            "flax.linen.Module"
        )
    return OwnNetwork(name, module, data, policy)


def _outputs(data: DataShape, policy: PolicyConfig | None) -> int:
    """Numbers per site that a network has to make."""
    if policy is None:
        return data.channels
    return POLICIES[policy.kind].outputs(policy, data.channels)


def _predicts(theirs: tuple[int, ...], ours: tuple[int, ...], channels: int, outputs: int) -> bool:
    """Whether a last axis is `m channels` there and `m outputs` here."""
    if theirs[:-1] != ours[:-1] or theirs[-1] % channels or ours[-1] % outputs:
        return False
    return theirs[-1] // channels == ours[-1] // outputs


def _by_path(tree: Any) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]
