"""Teachers with any prediction and diffusion, converted to velocities of our convention.

Every Gaussian diffusion `z_s = a(s) x_0 + b(s) eps` visits our states, `x_t = (1 - t) x_0 + t eps`,
up to a factor: `z_s = (a + b) x_t` at the time `s` with the same ratio of noise to signal, `b / a =
t / (1 - t)` (arXiv 2206.00364, Sec. 3; arXiv 2209.03003 for the straight path). A network's
prediction at `z_s`, together with `z_s` itself, gives `x_0` and `eps`, and so `u = eps - x_0`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from piflow_jax.arguments import ROUNDING, check_between, known
from piflow_jax.flow.guidance import Null, check_guidance, guided_velocity, null_conditions
from piflow_jax.flow.policies.base import per_batch, per_sample, promote

__all__ = ["Schedule", "Teacher"]

# `eps` does not determine `x_0` where there is no signal, nor `x_0` determine `eps` without noise.
_LARGEST_FOR_EPS = 1 - 1e-3
_SMALLEST_FOR_X0 = 1e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """The diffusion that a teacher was trained on, `z_s = a(s) x_0 + b(s) eps`.

    Make one with `Schedule.straight`, `.cosine`, `.variance_exploding` or `.discrete`, or from
    three functions of your own. All of them accept arrays of any shape.

    Attributes:
      signal: `s -> a(s)`.
      noise: `s -> b(s)`.
      time: `t -> s`, from our noise level `t` to the teacher's time at which `b / a = t / (1 - t)`.
      time_scale: the network receives `s * time_scale`.
      levels: smallest and largest noise level `t` that the teacher knows; other levels are clamped
        to them.
      ours: True for the straight path with data at 0. Its states and times need no conversion.
      made_by: the method that made it and the arguments by name, which identify it in a checkpoint;
        None for a schedule of your own functions, or changed by `dataclasses.replace`.
    """

    signal: Callable[[jax.Array], jax.Array]
    noise: Callable[[jax.Array], jax.Array]
    time: Callable[[jax.Array], jax.Array]
    time_scale: float = 1.0
    levels: tuple[float, float] = (0.0, 1.0)
    ours: bool = False
    # No argument: what `dataclasses.replace` makes is not made by the method any more.
    made_by: tuple[str, tuple[tuple[str, Any], ...]] | None = dataclasses.field(
        default=None, init=False
    )

    def _made_by(self, method: str, **arguments: Any) -> "Schedule":
        object.__setattr__(self, "made_by", (method, tuple(arguments.items())))
        return self

    @classmethod
    def made(cls, method: str, arguments: Mapping[str, Any]) -> "Schedule":
        """Makes the schedule of a named method, see `made_by`.

        Args:
          method: name of the method.
          arguments: arguments by name.

        Returns:
          The schedule.

        Raises:
          ValueError: there is no such method, or it does not take the arguments.
        """
        if method not in ("straight", "cosine", "variance_exploding", "discrete"):
            raise ValueError(f"there is no schedule {method!r}")
        try:
            return getattr(cls, method)(**arguments)
        except TypeError as error:
            raise ValueError(f"the schedule {method!r} does not take {arguments}") from error

    def __reduce__(self) -> Any:
        """Pickles a schedule by its method and arguments, if it was `made_by` one."""
        if self.made_by is None:
            return super().__reduce__()
        return _made, self.made_by

    @classmethod
    def straight(cls, *, data_at: Literal[0, 1] = 0, time_scale: float = 1.0) -> "Schedule":
        """Flow matching and rectified flow: `a = 1 - s`, `b = s`, or the other way round.

        Args:
          data_at: the time of data; 1 where `s = 0` is noise, as in many codebases of flows.
          time_scale: the network receives `s * time_scale`.

        Returns:
          The schedule.

        Raises:
          ValueError: `data_at` is neither 0 nor 1.
        """
        if data_at not in (0, 1):
            raise ValueError(f"data_at must be 0 or 1, got {data_at!r}")

        def same(s):
            return s

        def other(s):
            return 1 - s

        noise, signal = (same, other) if data_at == 0 else (other, same)
        ours = data_at == 0
        made = cls(signal=signal, noise=noise, time=noise, time_scale=time_scale, ours=ours)
        return made._made_by("straight", data_at=data_at, time_scale=time_scale)

    @classmethod
    def cosine(cls, *, time_scale: float = 1.0) -> "Schedule":
        """The variance-preserving cosine schedule: `a = cos(pi s / 2)`, `b = sin(pi s / 2)`.

        Args:
          time_scale: the network receives `s * time_scale`.

        Returns:
          The schedule, `s` in [0, 1].
        """
        made = cls(
            signal=lambda s: jnp.cos(jnp.pi * s / 2),
            noise=lambda s: jnp.sin(jnp.pi * s / 2),
            time=lambda t: jnp.arctan2(t, 1 - t) * 2 / jnp.pi,
            time_scale=time_scale,
        )
        return made._made_by("cosine", time_scale=time_scale)

    @classmethod
    def variance_exploding(
        cls, *, smallest: float = 2e-3, largest: float = 80.0, time_scale: float = 1.0
    ) -> "Schedule":
        """The schedule of EDM: `a = 1`, `b = s`; `s` is the standard deviation of the noise.

        Args:
          smallest: smallest standard deviation of the noise that the network knows.
          largest: largest standard deviation that it knows.
          time_scale: the network receives `s * time_scale`.

        Returns:
          The schedule.

        Raises:
          ValueError: `smallest` is not above 0 and below `largest`.
        """
        if not 0 < smallest < largest < np.inf:
            raise ValueError(
                f"smallest must be above 0 and below largest, got {smallest} and {largest}"
            )
        made = cls(
            signal=jnp.ones_like,
            noise=lambda s: s,
            time=lambda t: t / (1 - t),
            time_scale=time_scale,
            levels=(smallest / (1 + smallest), largest / (1 + largest)),
        )
        scale = _unless_one(time_scale)
        return made._made_by("variance_exploding", smallest=smallest, largest=largest, **scale)

    @classmethod
    def discrete(cls, alphas_cumprod: np.ndarray, *, time_scale: float = 1.0) -> "Schedule":
        """The schedule of DDPM at time `i`: `a_i^2 = alphas_cumprod[i]`, `b_i^2 = 1 - a_i^2`.

        Between indices it interpolates the logarithm of `b / a`, so times need not be integers.

        Args:
          alphas_cumprod: `[N]`, falling, in (0, 1).
          time_scale: the network receives `s * time_scale`.

        Returns:
          The schedule, `s` in `[0, N - 1]`.

        Raises:
          ValueError: the values do not fall within (0, 1).
        """
        table = np.asarray(alphas_cumprod, np.float64)
        falling = table.ndim == 1 and len(table) > 1 and (np.diff(table) < 0).all()
        if not falling or not 0 < table[-1] < table[0] < 1:
            raise ValueError("alphas_cumprod must be [N], falling, in (0, 1)")
        half_log_ratio = 0.5 * np.log((1 - table) / table)
        index = np.arange(len(table), dtype=np.float64)
        ratios = np.exp(half_log_ratio[[0, -1]])

        def level(s):
            return 2 * jnp.interp(s, index, half_log_ratio)

        made = cls(
            signal=lambda s: jnp.sqrt(jax.nn.sigmoid(-level(s))),
            noise=lambda s: jnp.sqrt(jax.nn.sigmoid(level(s))),
            time=lambda t: jnp.interp(jnp.log(t / (1 - t)), half_log_ratio, index),
            time_scale=time_scale,
            levels=tuple(float(ratio / (1 + ratio)) for ratio in ratios),
        )
        values = tuple(table.tolist())
        return made._made_by("discrete", alphas_cumprod=values, **_unless_one(time_scale))


def _unless_one(time_scale: float) -> dict[str, float]:
    """The argument, unless it is the one that schedules in older checkpoints do not name."""
    return {} if time_scale == 1 else {"time_scale": time_scale}


def _made(method: str, arguments: tuple[tuple[str, Any], ...]) -> Schedule:
    return Schedule.made(method, dict(arguments))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher:
    """A pretrained network and the conventions that are needed to imitate it.

    Attributes:
      predict: `(params, z[B, *sites, C], s[B], cond) -> prediction[B, *sites, C]`, in the teacher's
        own time (times `schedule.time_scale`) and scale.
      shape: `(*sites, C)` of a sample; None where samples have several shapes.
      prediction: what it predicts. `u` is `dz/ds`, so it points at data where `s = 1` is data;
        `eps` the noise; `x0` the data; `v` is `a eps - b x_0` (arXiv 2202.00512).
      schedule: the diffusion it was trained on.
      guidance_scale: classifier-free guidance scale of the velocity; 1 is no guidance. It may be
        traced, as may the interval. One program then serves all values.
      guidance_interval: noise levels `t` at which to guide, both ends included.
      orthogonal_guidance: share of the guidance parallel to `x_0` that is removed, in [0, 1].
      null_cond: the null condition: `cond` of a single sample, without the axis `B`, or a function
        of the batch's `cond`; see `null_conditions`.

    Raises:
      ValueError: `prediction` is not one of the four, a known number is out of range, or there is
        guidance and no `null_cond`.
    """

    predict: Callable[[Any, jax.Array, jax.Array, Any], jax.Array]
    shape: tuple[int, ...] | None
    prediction: Literal["u", "eps", "x0", "v"] = "u"
    schedule: Schedule = dataclasses.field(default_factory=Schedule.straight)
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    orthogonal_guidance: float = 0.0
    null_cond: Null | None = None

    def __post_init__(self) -> None:
        """Refuses invalid settings."""
        if self.prediction not in ("u", "eps", "x0", "v"):
            raise ValueError(f"prediction must be u, eps, x0 or v, got {self.prediction!r}")
        check_guidance(self.guidance_scale, self.guidance_interval, self.orthogonal_guidance)
        if self._is_guided and self.null_cond is None:
            raise ValueError("guidance needs null_cond, what stands for no condition")

    @property
    def _is_guided(self) -> bool:
        scale = known(self.guidance_scale)
        return scale is None or bool((scale != 1).any())

    def velocity(self, params: Any, x: jax.Array, t: jax.Array, cond: Any = None) -> jax.Array:
        """The guided velocity `dx/dt` in our convention: `t = 1` is noise, `t = 0` data.

        Args:
          params: the teacher's parameters, as `predict` takes them.
          x: `[B, *sites, C]`, states `(1 - t) x_0 + t eps`.
          t: `[B]`, noise levels in [0, 1].
          cond: conditions, arrays `[B, ...]` in any structure, or None.

        Returns:
          `u[B, *sites, C]`, float32 or float64.

        Raises:
          ValueError: states, predictions or conditions do not have the teacher's shape, known noise
            levels are out of range, or there is guidance and no `cond`.
        """
        check_between("t", t, 0, 1, slack=ROUNDING)
        x, t = promote(x, t)
        if self.shape is not None and x.shape[1:] != tuple(self.shape):
            raise ValueError(f"x has shape {x.shape}, the teacher's samples are {self.shape}")
        t = per_batch("t", t, x)
        with jax.named_scope("teacher"):
            return self._guided(params, x, t, cond)

    def _guided(self, params, x, t, cond):
        if not self._is_guided:
            return self._velocity(params, x, t, cond)
        if cond is None:
            raise ValueError("guidance needs cond, the conditions of the batch")
        for a in jax.tree.leaves(cond):
            if jnp.shape(a)[:1] != x.shape[:1]:
                raise ValueError(f"cond must be [{len(x)}, ...], got an array {jnp.shape(a)}")

        def pair(a, b):
            # Interleaved, not concatenated: a batch that is split over devices stays split.
            return jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:])

        null = null_conditions(cond, self.null_cond)
        both = self._velocity(params, pair(x, x), pair(t, t), jax.tree.map(pair, cond, null))
        both = both.reshape(-1, 2, *x.shape[1:])
        return guided_velocity(
            both[:, 0],
            both[:, 1],
            self.guidance_scale,
            t,
            self.guidance_interval,
            self.orthogonal_guidance,
            x,
        )

    def bind(self, params: Any, cond: Any = None) -> Callable[[jax.Array, jax.Array], jax.Array]:
        """The teacher's velocity for one batch, as losses and samplers take it.

        Args:
          params: the teacher's parameters.
          cond: conditions of the batch, arrays `[B, ...]` in any structure, or None.

        Returns:
          `(x[B, *sites, C], t[B]) -> u[B, *sites, C]`, see `velocity`.
        """
        return lambda x, t: self.velocity(params, x, t, cond)

    def inputs(self, x: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Inputs of the network at our states.

        Args:
          x: `[B, *sites, C]`, states `(1 - t) x_0 + t eps`.
          t: `[B]`, noise levels in [0, 1].

        Returns:
          `(z[B, *sites, C], s[B])` in the teacher's own scale and time.
        """
        if self._ours:
            return x, t * self.schedule.time_scale
        s = self._time(t, x.dtype)
        scale = per_sample(self.schedule.signal(s) + self.schedule.noise(s), x.ndim)
        return scale * x, s * self.schedule.time_scale

    def as_velocity(self, out: jax.Array, x: jax.Array, t: jax.Array) -> jax.Array:
        """Turns predictions into velocities in our convention, without guidance.

        Args:
          out: `[B, *sites, C]`, the network's prediction at `inputs(x, t)`; or `[B, *sites, n, C]`,
            several predictions for one state.
          x: `[B, *sites, C]`, the states.
          t: `[B]`, their noise levels.

        Returns:
          Velocities like `out`.
        """
        schedule, prediction = self.schedule, self.prediction
        if self._ours:
            return out
        s = self._time(t, x.dtype)
        (a, a_rate), (b, b_rate) = (
            jax.jvp(function, (s,), (jnp.ones_like(s),))
            for function in (schedule.signal, schedule.noise)
        )
        a, b, a_rate, b_rate = (per_sample(value, out.ndim) for value in (a, b, a_rate, b_rate))
        z = (a + b) * (x if x.ndim == out.ndim else x[..., None, :])
        if prediction == "eps":
            return out - (z - b * out) / a
        if prediction == "x0":
            return (z - a * out) / b - out
        if prediction == "v":
            return ((b - a) * z + (a + b) * out) / (a * a + b * b)
        # z = a x_0 + b eps and u = a' x_0 + b' eps, solved for eps - x_0.
        return ((a + b) * out - (a_rate + b_rate) * z) / (a * b_rate - b * a_rate)

    def as_asked(self) -> "Teacher":
        """The same prediction and diffusion, without network and guidance."""
        return Teacher(predict=None, shape=None, prediction=self.prediction, schedule=self.schedule)

    @property
    def is_plain(self) -> bool:
        """Whether the network takes our states and times unchanged and predicts our velocity."""
        return self._ours and self.schedule.time_scale == 1

    @property
    def _ours(self) -> bool:
        return self.schedule.ours and self.prediction == "u"

    def _time(self, t: jax.Array, dtype) -> jax.Array:
        """The teacher's time `s[B]` at our noise levels, clipped to where predictions carry `u`."""
        low, high = self.schedule.levels
        if self.prediction == "eps":
            high = min(high, _LARGEST_FOR_EPS)
        elif self.prediction == "x0":
            low = max(low, _SMALLEST_FOR_X0)
        return self.schedule.time(jnp.clip(t, low, high)).astype(dtype)

    def _velocity(self, params, x, t, cond):
        out = self.predict(params, *self.inputs(x, t), cond)
        found = getattr(out, "shape", type(out).__name__)
        if found != x.shape:
            raise ValueError(f"the teacher predicts {found} of states {x.shape}")
        return self.as_velocity(out.astype(x.dtype), x, t)
