"""Correctors, which move the distribution of the student's samples to the teacher's or the data's.

pi-ID imitates paths. Where the network cannot follow a path, the error stays in the distribution of
the samples, and nothing corrects it. A corrector finds the direction in which samples are wrong. It
sends this direction back through the student's rollout as a gradient, which is scaled to the norm
of pi-ID's.

Two correctors compare velocities at states of the student's samples: the teacher's, and that of the
student's own distribution. A third compares the features of samples with those of training data.

Sources: FreeFlow (arXiv 2511.19428), whose correction has the same form for flow maps; variational
score distillation (arXiv 2305.16213) and DMD (arXiv 2311.18828) for the direction; FD-loss (arXiv
2604.28190) for features.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from piflow_jax.config import Config, ConfigError, CorrectorConfig
from piflow_jax.flow.distribution import (
    distribution_matching_loss,
    distribution_matching_loss_at,
)
from piflow_jax.flow.frechet import Moments, frechet_distance, frechet_loss
from piflow_jax.flow.policies.base import per_sample
from piflow_jax.flow.rollout import rollout
from piflow_jax.flow.schedule import TimeWarp
from piflow_jax.flow.teacher import Teacher
from piflow_jax.systems.correctors import corrector_kind
from piflow_jax.systems.network import Network
from piflow_jax.systems.sampling import student_policy, student_sampler, student_times
from piflow_jax.systems.spaces import Space
from piflow_jax.training.accumulation import accumulate, in_parts
from piflow_jax.training.optimizer import make_optimizer
from piflow_jax.training.state import CarryingState, TrainState

# Of second order, since the rollout is differentiated and has few substeps.
_SOLVER = "multistep"
_LEAST_NORM = 1e-12


@flax.struct.dataclass
class Critic:
    """A network that follows the velocity of the student's distribution.

    Attributes:
      params: its trained variables.
      opt_state: state of its optimiser.
    """

    params: Any
    opt_state: Any


@flax.struct.dataclass
class CorrectedState(CarryingState):
    """The state of a student that is trained with a critic.

    Attributes:
      critic: the critic.
    """

    critic: Critic | None = None


@flax.struct.dataclass
class MeasuredState(CarryingState):
    """The state of a student whose samples are measured in a feature space.

    Attributes:
      moments: mean and covariance of its samples.
    """

    moments: Moments | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corrector:
    """A corrector that takes the policy's own velocity for that of the student's distribution.

    The velocities are compared at states on the student's paths. No second network is needed. The
    idea is that of arXiv 2605.19256, where a flow map gives its own velocity.

    Attributes:
      config: the run's settings.
      student: the student's network.
      teacher: the teacher with its guidance; the first state does not need it.
      space: the feature space, for a corrector that compares features.
    """

    config: Config
    student: Network
    teacher: Teacher | None
    space: Space | None = None

    @property
    def settings(self) -> CorrectorConfig:
        """The corrector's own settings."""
        return self.config.train.corrector

    @property
    def _warp(self) -> TimeWarp:
        return TimeWarp(self.config.train.shift)

    def begin(self, key: jax.Array, state: TrainState, teacher_params: Any) -> TrainState:
        """Adds to a student's first state what the corrector needs there; here nothing."""
        del key, teacher_params
        return state

    def shares(self, batch: Any) -> tuple[Any, Any]:
        """Divides a batch's examples between the corrector and pi-ID.

        Of every `m` neighbours `n` go to the corrector, where `n / m` is its share. A batch that is
        split over devices then stays where it is.

        Args:
          batch: arrays with examples on the leading axis.

        Returns:
          `(corrector's, pi-ID's)`.
        """
        share = Fraction(self.settings.share).limit_denominator(self.config.train.batch_size)
        count, of = share.numerator, share.denominator

        def rows(taken):
            def some(a):
                grouped = a.reshape(len(a) // of, of, *a.shape[1:])[:, taken]
                # Without -1, which arrays of no elements do not determine.
                return grouped.reshape(len(grouped) * grouped.shape[1], *a.shape[1:])

            return jax.tree.map(some, batch)

        return rows(slice(count)), rows(slice(count, None))

    def draw(self, key: jax.Array, noise: jax.Array) -> dict[str, jax.Array]:
        """Noise levels, one in each stratum, and what else a batch's corrections draw.

        Args:
          key: PRNG key.
          noise: `[B, *sites, C]`, noise at which the samples start; only its shape matters.

        Returns:
          `t[B]` and what a corrector adds to it.
        """
        time_key, _ = jax.random.split(key)
        batch, dtype = noise.shape[0], noise.dtype
        offsets = jax.random.uniform(time_key, (batch,), dtype)
        warp = TimeWarp(self.settings.shift)
        low, high = (warp.unwarp(jnp.asarray(level, dtype)) for level in self.settings.levels)
        tau = low + (high - low) * (jnp.arange(batch) + offsets) / batch
        return {"t": warp.warp(tau)}

    def learned(self, state: TrainState) -> Any:
        """What the loss takes of the state besides the student; here nothing."""
        del state
        return ()

    def loss(
        self, params: Any, learned: Any, carried: Any, teacher_params: Any, part: Mapping[str, Any]
    ) -> jax.Array:
        """The loss whose gradient corrects the student.

        Args:
          params: the student's trained parameters.
          learned: see the method `learned`.
          carried: the student's carried variables.
          teacher_params: the teacher's parameters.
          part: `condition`, `noise`, and what `draw` returns.

        Returns:
          A scalar.
        """
        del learned
        warp, options = self._warp, {"solver": _SOLVER, "bound": self.settings.substeps}
        noise, t = part["noise"], part["t"]
        ones = jnp.ones(noise.shape[:1], noise.dtype)
        policy = self._policy(params, carried, teacher_params, part["condition"])(noise, ones)
        tau, count = warp.unwarp(t), self.settings.substeps
        with jax.named_scope("policy"):
            x, _ = rollout(policy, noise, ones, tau, warp, count, **options)
            generated, _ = rollout(policy, x, tau, jnp.zeros_like(tau), warp, count, **options)
            x = jax.lax.stop_gradient(x)
            fake = policy.velocity(x, t)
        real = self.teacher.velocity(teacher_params, x, t, part["condition"])
        return distribution_matching_loss_at(generated, x, t, real, fake)

    def follow(
        self, state: TrainState, teacher_params: Any, part: Mapping[str, Any], key: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """Brings the critic up to date with the student; here there is none."""
        del teacher_params, part, key
        return state, {}

    def correct(
        self,
        state: TrainState,
        grads: Any,
        teacher_params: Any,
        part: Mapping[str, Any],
        key: jax.Array,
    ) -> tuple[Any, dict[str, jax.Array]]:
        """Adds the corrector's gradient to pi-ID's.

        Args:
          state: the state before the step.
          grads: pi-ID's gradient with respect to the student's trained parameters.
          teacher_params: the teacher's parameters.
          part: `condition` and `noise` of the corrector's examples.
          key: PRNG key.

        Returns:
          `(grads, metrics)`. The added gradient has `settings.scale` times the norm of pi-ID's.
        """
        settings = self.settings

        def loss_and_grads(part, carried):
            def loss(params):
                learned = self.learned(state)
                return self.loss(params, learned, state.carried, teacher_params, part)

            return jax.value_and_grad(loss)(state.params), carried

        part = dict(part) | self.draw(key, part["noise"])
        count = self.config.train.microbatches
        (loss, own), _ = accumulate(loss_and_grads, part, count)
        norms = optax.global_norm(grads), jnp.maximum(optax.global_norm(own), _LEAST_NORM)
        ratio = settings.scale * norms[0] / norms[1]
        # The critic has to know the student before it can correct it.
        ratio = jnp.where(state.step < settings.start, 0, ratio)
        grads = jax.tree.map(lambda a, b: a + (ratio * b).astype(a.dtype), grads, own)
        return grads, {"corrector_loss": loss}

    def _policy(self, params: Any, carried: Any, teacher_params: Any, condition: Any) -> Callable:
        predict = student_policy(self.student, self.config.policy, self.config.train)
        variables = self.student.of_student(params, carried, teacher_params)
        return lambda x, t: predict(variables, x, t, condition)

    def _samples(self, params, carried, teacher_params, part) -> jax.Array:
        """The student's samples from `noise`, differentiable."""
        train = self.config.train
        sample = student_sampler(
            self.student,
            self.config.policy,
            train,
            substeps=self.settings.substeps,
            solver=_SOLVER,
        )
        variables = self.student.of_student(params, carried, teacher_params)
        times = student_times(train, train.nfe)
        return sample(variables, part["noise"], part["condition"], times)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CriticCorrector(Corrector):
    """A corrector with a second network that follows the velocity of the student's distribution.

    The velocities are compared at samples with fresh noise. The second network, the critic, starts
    at the teacher. Flow matching on the student's samples keeps it up to date. With adapters, it
    consists of adapters on the teacher too.
    """

    @functools.cached_property
    def _network(self) -> Network | None:
        """The critic, if it consists of adapters; otherwise it is the teacher's network."""
        return self.student.of_velocities() if self.student.adapted else None

    @functools.cached_property
    def _optimizer(self) -> optax.GradientTransformation:
        updates = self.config.train.steps * self.settings.critic_steps
        return make_optimizer(self.settings.optimizer, updates)

    def draw(self, key: jax.Array, noise: jax.Array) -> dict[str, jax.Array]:
        """Also noise `mixed[B, *sites, C]` for states of samples; see `Corrector`."""
        mixed = jax.random.normal(jax.random.split(key)[1], noise.shape, noise.dtype)
        return super().draw(key, noise) | {"mixed": mixed}

    def begin(self, key: jax.Array, state: TrainState, teacher_params: Any) -> CorrectedState:
        """Adds a critic that starts at the teacher; see `Corrector`."""
        if self._network is None:
            params = jax.tree.map(jnp.copy, _parameters(teacher_params))
            _check_trainable(params)
        else:
            params = self._network.start(key, None, teacher_params)
        return _with(CorrectedState, state, critic=Critic(params, self._optimizer.init(params)))

    def learned(self, state: CorrectedState) -> Any:
        """The critic's parameters; see `Corrector`."""
        return state.critic.params

    def loss(self, params, critic, carried, teacher_params, part):
        """See `Corrector`."""
        generated = self._samples(params, carried, teacher_params, part)
        real = self.teacher.bind(teacher_params, part["condition"])
        fake = self._velocity(critic, teacher_params, part["condition"])
        return distribution_matching_loss(generated, real, fake, part["mixed"], part["t"])

    def follow(self, state, teacher_params, part, key):
        """Trains the critic on samples of the student by flow matching; see `Corrector`."""
        part = {name: part[name] for name in ("condition", "noise")}
        count = self.config.train.microbatches
        samples = functools.partial(self._samples, state.params, state.carried, teacher_params)
        x0 = jax.lax.stop_gradient(in_parts(samples, part, count))

        def loss_of(params, part):
            t = per_sample(part["t"], x0.ndim)
            x = (1 - t) * part["x0"] + t * part["mixed"]
            velocity = self._velocity(params, teacher_params, part["condition"])(x, part["t"])
            return jnp.mean(jnp.square(velocity - (part["mixed"] - part["x0"])))

        def update(critic, key):
            inputs = {"condition": part["condition"], "x0": x0} | self.draw(key, x0)

            def loss_and_grads(inputs, carried):
                return jax.value_and_grad(loss_of)(critic.params, inputs), carried

            (loss, grads), _ = accumulate(loss_and_grads, inputs, count)
            with jax.named_scope("optimizer"):
                updates, moments = self._optimizer.update(grads, critic.opt_state, critic.params)
                return Critic(optax.apply_updates(critic.params, updates), moments), loss

        keys = jax.random.split(key, self.settings.critic_steps)
        critic, losses = jax.lax.scan(update, state.critic, keys)
        return state.replace(critic=critic), {"critic_loss": jnp.mean(losses)}

    def _velocity(self, critic: Any, teacher_params: Any, condition: Any) -> Callable:
        if self._network is None:
            unguided = dataclasses.replace(self.teacher, guidance_scale=1.0)
            whole = critic
            if _parameters(teacher_params) is not teacher_params:
                whole = {**teacher_params, **critic}
            return unguided.bind(whole, condition)
        network = Teacher(predict=self._network.apply, shape=None)
        return network.bind(self._network.with_base(critic, teacher_params), condition)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrechetCorrector(Corrector):
    """A corrector that compares the features of samples with those of training data (FD-loss).

    The distance is that between the Gaussians of both. A batch is too small for a covariance, so
    the student's is a running estimate over earlier samples. Each sample of the batch gets the
    gradient that the distance has there.
    """

    @property
    def _most(self) -> float:
        """Batches in the running estimate."""
        batch = self.config.train.batch_size * self.settings.share
        return max(self.settings.population / batch, 1.0)

    def begin(self, key: jax.Array, state: TrainState, teacher_params: Any) -> MeasuredState:
        """Adds moments of no samples; see `Corrector`."""
        del key, teacher_params
        dimension = 0 if self.space is None else len(self.space.mean)  # unknown for sizes
        return _with(MeasuredState, state, moments=Moments.none(dimension))

    def learned(self, state: MeasuredState) -> Moments:
        """The moments of the student's samples; see `Corrector`."""
        return state.moments

    def draw(self, key: jax.Array, noise: jax.Array) -> dict[str, jax.Array]:
        """Nothing: samples alone are compared; see `Corrector`."""
        del key, noise
        return {}

    def loss(self, params, moments, carried, teacher_params, part):
        """See `Corrector`."""
        features = self._features(params, carried, teacher_params, part)
        return frechet_loss(features, moments.gaussian(), *self._target(features))

    def follow(self, state, teacher_params, part, key):
        """Takes samples of the student into its moments; see `Corrector`."""
        del key
        part = {name: part[name] for name in ("condition", "noise")}
        features_of = functools.partial(self._features, state.params, state.carried, teacher_params)
        features = in_parts(features_of, part, self.config.train.microbatches)
        moments = state.moments.add(features, self._most)
        distance = frechet_distance(moments.gaussian(), *self._target(features))
        return state.replace(moments=moments), {"corrector_frechet": distance}

    def _features(self, params, carried, teacher_params, part) -> jax.Array:
        """Features `[B, D]` of samples, relative to the mean of the training data."""
        features = self.space.features.features(
            self._samples(params, carried, teacher_params, part)
        )
        return features - jnp.asarray(self.space.mean, features.dtype)[None, :]

    def _target(self, features: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and root of the training data's covariance, in the same coordinates."""
        root = jnp.asarray(self.space.root, features.dtype)
        return jnp.zeros(len(root), features.dtype), root


def _parameters(variables: Any) -> Any:
    """The variables that gradients may change, without running averages and random state."""
    if isinstance(variables, Mapping) and variables.keys() > {"params"}:
        return {"params": variables["params"]}
    return variables


def _check_trainable(params: Any) -> None:
    """Refuses variables of which some are none that gradients may change."""
    nnx = sys.modules.get("flax.nnx")  # whoever has a state of its own has loaded it
    if nnx is not None and isinstance(params, nnx.State):
        others = params.filter(nnx.Not(nnx.Param))
    else:
        others = [
            leaf for leaf in jax.tree.leaves(params) if not jnp.issubdtype(leaf.dtype, jnp.inexact)
        ]
    if others:
        raise ConfigError(
            "config.train.corrector.kind = 'critic' trains a copy of teacher_params, which have "
            "more in them than parameters: give {'params': parameters, **others}, or kind 'policy'"
        )


def _with(kind: type, state: TrainState, **more: Any) -> Any:
    """A state of a kind that has more attributes."""
    values = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return kind(**values | {"carried": state.carried} | more)


CORRECTORS: dict[str, type[Corrector]] = {
    "critic": CriticCorrector,
    "policy": Corrector,
    "frechet": FrechetCorrector,
}


def make_corrector(
    config: Config,
    student: Network,
    teacher: Teacher | None = None,
    space: Space | None = None,
) -> Corrector | None:
    """The corrector of `config.train.corrector`.

    Args:
      config: the run's settings.
      student: the student's network.
      teacher: the teacher with the guidance of pi-ID; the first state does not need it.
      space: the feature space, for a corrector that compares features; the size of the first state
        is estimated without it.

    Returns:
      The corrector, or None for training without one.

    Raises:
      ConfigError: the feature space is needed and was not opened.
    """
    settings, row = config.train.corrector, corrector_kind(config)
    if row is None:
        return None
    if teacher is not None and row.of_data and space is None:
        raise ConfigError(
            f"config.train.corrector.kind = {settings.kind!r} is for --mode=train and "
            "piflow_jax.distill, which open its feature space; leave it empty here"
        )
    if teacher is not None and settings.guidance_interval:
        teacher = dataclasses.replace(teacher, guidance_interval=settings.guidance_interval)
    make = CORRECTORS[settings.kind]
    return make(config=config, student=student, teacher=teacher, space=space)
