"""The table of policies: everything that depends on the policy that a student predicts.

A row defines three things: how a network's output becomes a policy, which of our heads makes that
output, and how a user's own network lays it out (per site `outputs(config, C)` numbers, in the
order that `read` documents). Policies are those of pi-Flow (arXiv 2510.14974, section 3.1) and of
ArcFlow (arXiv 2602.09014).
"""

import abc
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from piflow_jax.config import Config, ConfigError, PolicyConfig, TrainConfig
from piflow_jax.flow.policies import (
    ArcFlowPolicy,
    ArcOutput,
    DXPolicy,
    GMFlowPolicy,
    GMOutput,
    Policy,
)
from piflow_jax.flow.schedule import Segments
from piflow_jax.models import ArcHead, DXHead, GMHead
from piflow_jax.models.heads import TEACHER_MEANS_STD, spread_rates
from piflow_jax.systems.segments import longest_segment, said_evaluations

__all__ = ["POLICIES", "PolicyFactory", "PolicyKind", "policy_factory", "policy_outputs"]

# From the reference: the bound of policies in training and in its sampler.
TRAIN_EPS = 1e-6
SAMPLE_EPS = 1e-4

PolicyFactory = Callable[[Any, jax.Array, jax.Array], Policy]
"""`(network output, x_src[B, *sites, C], sigma_src[B]) -> policy`."""

AsVelocity = Callable[[jax.Array], jax.Array]
"""Turns predictions `[B, *sites, n, C]` of a teacher into velocities of the same shape."""


class PolicyKind(abc.ABC):
    """A row of `POLICIES`; defaults fit a policy that the release does not have.

    Attributes:
      spec: keys of `config.policy` without which a checkpoint's weights mean nothing.
      tempered: the policy has a temperature (see `few_step_sample`).
      predicts_std: the output has one log standard deviation per sample.
      grows: the output has rates of growth.
    """

    spec: ClassVar[tuple[str, ...]]
    tempered: ClassVar[bool] = False
    predicts_std: ClassVar[bool] = False
    grows: ClassVar[bool] = False

    @abc.abstractmethod
    def head(self, config: PolicyConfig) -> nn.Module:
        """The output layer of our own networks."""

    @abc.abstractmethod
    def create(
        self,
        config: PolicyConfig,
        train: TrainConfig,
        output: Any,
        x: jax.Array,
        sigma: jax.Array,
        eps: float,
    ) -> Policy:
        """The policy for an output at `(x, sigma)`; `eps` bounds its divisions from below."""

    @abc.abstractmethod
    def outputs(self, config: PolicyConfig, channels: int) -> int:
        """Numbers per site that any network must predict."""

    @abc.abstractmethod
    def read(
        self,
        config: PolicyConfig,
        values: jax.Array,
        logstd: jax.Array | None,
        x: jax.Array,
        sigma: jax.Array,
        as_velocity: AsVelocity,
    ) -> Any:
        """Turns `values[B, *sites, outputs]` into the output that `create` takes."""

    @abc.abstractmethod
    def start(self, config: PolicyConfig, rows: jax.Array, noise: jax.Array | None) -> jax.Array:
        """Last-layer rows `[..., outputs]` of a student that starts at its teacher's `[..., C]`.

        `noise[K, C]` is given for a bias.
        """

    def droppable(self, config: PolicyConfig) -> int:
        """Components that dropout may leave out; 0 if there are none."""
        return 0

    def official(self, config: PolicyConfig, train: TrainConfig) -> dict[str, Any]:
        """Entries of the release's files that describe a student's policy."""
        return {"type": config.kind}

    def unnamed(self, config: PolicyConfig) -> str | None:
        """Why the release has no names for such a student's weights; None if it has names."""
        return (
            f"config.policy.kind = {config.kind!r} has no official names to be exported under; "
            "piflow_jax.load reads the run's directory"
        )

    def check(self, config: Config) -> None:
        """Raises ConfigError for settings that contradict the policy."""
        policy, dropout = config.policy, config.train.gm_dropout
        if dropout > 0 and not self.droppable(policy):
            raise ConfigError(
                "config.train.gm_dropout drops mixture components and must be 0 with "
                f"config.policy.kind = {policy.kind!r}, got {dropout}"
            )
        scale = config.train.optimizer.growth_rate_scale
        if scale != 1 and not self.grows:
            raise ConfigError(
                "config.train.optimizer.growth_rate_scale is for rates of growth and must be 1 "
                f"with config.policy.kind = {policy.kind!r}, got {scale}"
            )


class GaussianMixture(PolicyKind):
    """GMFlow: `K` means `(K, C)`, then `K` logits, and one log standard deviation per sample."""

    spec = ("kind", "num_components", "logstd_hidden")
    tempered = True
    predicts_std = True

    def head(self, config):
        return GMHead(config.num_components, config.logstd_hidden)

    def create(self, config, train, output, x, sigma, eps):
        return GMFlowPolicy.create(output, x, sigma, eps=eps)

    def droppable(self, config):
        return config.num_components

    def outputs(self, config, channels):
        return config.num_components * (channels + 1)

    def read(self, config, values, logstd, x, sigma, as_velocity):
        means, logits = _mixture(values, config.num_components, x.shape[-1])
        return GMOutput(as_velocity(means), jax.nn.log_softmax(logits, axis=-1), logstd)

    def start(self, config, rows, noise):
        means = _means(rows, config.num_components, noise)
        return _beside(means, jnp.zeros((*rows.shape[:-1], config.num_components), rows.dtype))

    def official(self, config, train):
        return {"type": "GMFlow"}

    def unnamed(self, config):
        return None


class DirectX0(PolicyKind):
    """DX: `N` velocities `(N, C)`, a grid over the segment or coefficients of a polynomial.

    The input skip of `DXHead` starts a polynomial of a user's own network at its teacher.
    """

    spec = ("kind", "num_grid", "mode", "segment_size")

    def head(self, config):
        # Only with the skip do polynomial coefficients beyond the first start at zero.
        return DXHead(config.num_grid, input_skip=self._skips(config))

    def create(self, config, train, output, x, sigma, eps):
        # No `eps`: one bound in training and sampling, as in the reference.
        size = self._segment(config, train)
        return DXPolicy.create(output, x, sigma, size, train.shift, config.mode, eps=SAMPLE_EPS)

    def outputs(self, config, channels):
        return config.num_grid * channels

    def read(self, config, values, logstd, x, sigma, as_velocity):
        values = values.reshape(*values.shape[:-1], config.num_grid, x.shape[-1])
        if not self._skips(config):
            return as_velocity(values)
        head = self.head(config)
        coefficients = head.skipped(values[..., 1:, :], x, sigma)
        return jnp.concatenate([as_velocity(values[..., :1, :]), coefficients], axis=-2)

    def start(self, config, rows, noise):
        if not self._skips(config):
            return jnp.tile(rows, config.num_grid)
        rest = (config.num_grid - 1) * rows.shape[-1]
        return _beside(rows, jnp.zeros((*rows.shape[:-1], rest), rows.dtype))

    def official(self, config, train):
        size = self._segment(config, train)
        return {"type": "DX", "segment_size": size, "shift": train.shift, "mode": config.mode}

    def unnamed(self, config):
        if not self._skips(config):
            return None
        return (
            "config.policy.mode = 'polynomial' has no official names to be exported under: the "
            "head has a skip; piflow_jax.load reads the run's directory"
        )

    def check(self, config):
        super().check(config)
        policy, train = config.policy, config.train
        longest = longest_segment(train)
        if 0 < policy.segment_size < longest - 1e-9:
            raise ConfigError(
                "config.policy.segment_size must be 0 or at least the longest segment, "
                f"{longest:.6g}, got {policy.segment_size}"
            )
        evaluations = config.sampling_nfe
        sampled = Segments(evaluations, train.final_step_size_scale).longest
        if sampled > (policy.segment_size or longest) + 1e-9:
            raise ConfigError(
                f"config.evaluation.nfe ({evaluations}) makes segments longer than those that a "
                f"grid trained with config.train.nfe = {said_evaluations(train)} covers; raise it"
            )

    def _skips(self, config: PolicyConfig) -> bool:
        return config.mode == "polynomial"

    def _segment(self, config: PolicyConfig, train: TrainConfig) -> float:
        return config.segment_size or longest_segment(train)


class ArcFlow(PolicyKind):
    """ArcFlow: `K` means `(K, C)`, then `K` logits, then `K` unbounded rates of growth."""

    spec = ("kind", "num_components")
    grows = True

    def head(self, config):
        return ArcHead(config.num_components)

    def create(self, config, train, output, x, sigma, eps):
        return ArcFlowPolicy.create(output, x, sigma)

    def droppable(self, config):
        return config.num_components

    def outputs(self, config, channels):
        return config.num_components * (channels + 2)

    def read(self, config, values, logstd, x, sigma, as_velocity):
        k = config.num_components
        means, logits = _mixture(values[..., :-k], k, x.shape[-1])
        rates = self.head(config).bounded(values[..., -k:])
        return ArcOutput(as_velocity(means), jax.nn.log_softmax(logits, axis=-1), rates)

    def start(self, config, rows, noise):
        k = config.num_components
        means = _means(rows, k, noise)
        zeros = jnp.zeros((*rows.shape[:-1], k), rows.dtype)
        rates = (
            zeros if noise is None else jnp.broadcast_to(spread_rates(k, rows.dtype), zeros.shape)
        )
        return _beside(means, zeros, rates)


POLICIES: dict[str, PolicyKind] = {
    "gm": GaussianMixture(),
    "dx": DirectX0(),
    "arc": ArcFlow(),
}


def policy_factory(
    policy: PolicyConfig, train: TrainConfig, *, sampling: bool = False
) -> PolicyFactory:
    """Makes the function that turns a network's output into a policy.

    Args:
      policy: the policy's settings.
      train: the distillation's settings; segments and shift stay as trained when sampling.
      sampling: use the lower bound of the reference's sampler instead of its bound in training.

    Returns:
      The factory.
    """
    kind, eps = POLICIES[policy.kind], SAMPLE_EPS if sampling else TRAIN_EPS
    return lambda output, x, sigma: kind.create(policy, train, output, x, sigma, eps)


def policy_outputs(config: Any, channels: int) -> int:
    """Outputs per site that a student's network needs for its policy.

    Args:
      config: a `ConfigDict` of `base_config()`, or a parsed `Config`.
      channels: `C`, the channels of a sample.

    Returns:
      The number per site. A Gaussian mixture has `K` means `(K, C)` and then `K` logits, `K (C +
      1)`. A DX policy has `N C`. ArcFlow has `K` rates in addition to a mixture's numbers.
    """
    return POLICIES[config.policy.kind].outputs(config.policy, channels)


def _mixture(values: jax.Array, components: int, channels: int) -> tuple[jax.Array, jax.Array]:
    """Means `[..., K, C]` and logits `[..., K]` from the numbers per site."""
    means = values[..., : components * channels]
    return means.reshape(*means.shape[:-1], components, channels), values[..., means.shape[-1] :]


def _means(rows: jax.Array, components: int, noise: jax.Array | None) -> jax.Array:
    """The teacher's rows repeated for each component, with a little noise to separate them."""
    means = jnp.tile(rows, components)
    if noise is None:
        return means
    return means + TEACHER_MEANS_STD * noise.reshape(*(1,) * (means.ndim - 1), -1)


def _beside(*rows: jax.Array) -> jax.Array:
    return jnp.concatenate(rows, axis=-1)
