"""Time: the warp between raw time and noise level, and how [0, 1] is cut into segments.

Conventions, as in the paper: `t = 1` is noise and `t = 0` data, `sigma_t = t`,
`alpha_t = 1 - t`; raw time `tau` is uniform in substeps and `t = warp(tau)`.
"""

import dataclasses
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from piflow_jax.arguments import ROUNDING, check_between, check_number, whole

__all__ = ["FlowMapTimes", "Segments", "TimeWarp", "check_warp", "sampling_times", "segment_start"]


@flax.struct.dataclass
class TimeWarp:
    """The map `t = shift tau / (1 + (shift - 1) tau)` from raw time to noise level.

    Attributes:
      shift: 1 is the identity; larger values spend more raw time at high noise (1.0 on ImageNet,
        3.2 on FLUX and Qwen-Image). A static number above 0, within the precision of float32.

    Raises:
      ValueError: the shift is not such a number.
    """

    shift: float = flax.struct.field(pytree_node=False, default=1.0)

    def __post_init__(self) -> None:
        """Refuses a shift that does not map [0, 1] to itself."""
        check_between("shift", self.shift, 1e-6, 1e6)

    def warp(self, tau: jax.Array) -> jax.Array:
        """Noise level in [0, 1] of a raw time `tau` in [0, 1]; of any shape."""
        return self.shift * tau / (1 + (self.shift - 1) * tau)

    def unwarp(self, t: jax.Array) -> jax.Array:
        """Raw time of a noise level `t` in [0, 1], the inverse of `warp`; of any shape."""
        return t / (self.shift + (1 - self.shift) * t)


class FlowMapTimes(NamedTuple):
    """Noise levels of a few-step sampler, one entry per network evaluation.

    Attributes:
      src: `[nfe]`, where the network is evaluated.
      dst: `[nfe]`, where the policy's rollout ends.
      to: `[nfe]`, the level after fresh noise has been added; equal to `dst` when deterministic.
      m: `[nfe]`, share of the state's noise that is kept; 1 when deterministic.
    """

    src: np.ndarray
    dst: np.ndarray
    to: np.ndarray
    m: np.ndarray


@dataclasses.dataclass(frozen=True)
class Segments:
    """How raw time is cut into segments (paper, Sec. 3.1).

    The segment that ends at 0 has the length `f base`, the others `base = 1 / (nfe - 1 + f)`.

    Attributes:
      nfe: number of segments, at least 1.
      final_step_size_scale: `f`, relative length of the last one.

    Raises:
      ValueError: if `nfe` is below 1 or the scale negative.
    """

    nfe: int
    final_step_size_scale: float = 1.0

    def __post_init__(self) -> None:
        """Refuses numbers out of range."""
        _checked_scale(self.nfe, self.final_step_size_scale)

    @property
    def base(self) -> float:
        """Raw-time length of a segment that is not the last."""
        return 1 / (self.nfe - 1 + self.final_step_size_scale)

    @property
    def starts(self) -> np.ndarray:
        """Raw times `[nfe]` at which the segments start, from 1 down."""
        end = (self.final_step_size_scale - 1) * self.base if self.nfe > 1 else 0.0
        return np.maximum(np.linspace(1, end, self.nfe, endpoint=False), 0)

    @property
    def final(self) -> float:
        """Raw-time length of the last segment."""
        return self.final_step_size_scale * self.base if self.nfe > 1 else 1.0

    @property
    def longest(self) -> float:
        """Raw-time length of the longest segment, at most 1."""
        return max(self.base, self.final) if self.nfe > 1 else 1.0

    @property
    def shortest(self) -> float:
        """Raw-time length of the shortest segment."""
        return min(self.base, self.final) if self.nfe > 1 else 1.0


def segment_start(
    tau: jax.Array, nfe: int, final_step_size_scale: float = 1.0, eps: float = 1e-4
) -> tuple[jax.Array, jax.Array]:
    """Snaps raw times up to the start of the segment that holds them (paper, Sec. 3.1 and App.).

    The segment that ends at 0 has length `f * base`, the others `base = 1 / (nfe - 1 + f)`.

    Args:
      tau: `[B]`, raw times in (0, 1]; smaller ones are clamped to `eps`, and larger ones to 1 where
        they are traced.
      nfe: number of segments, at least 1.
      final_step_size_scale: `f`, relative length of the last segment; clamped to at least `eps`.
      eps: smallest raw time.

    Returns:
      `(tau_src[B], segment_size[B])`.

    Raises:
      ValueError: if `nfe` is below 1, `f` negative, or a time above 1 or NaN.
    """
    check_between("tau", tau, high=1, slack=ROUNDING)
    check_number("eps", eps, 0, 1)
    f = max(_checked_scale(nfe, final_step_size_scale), eps)
    base = Segments(nfe, f).base
    tau = jnp.maximum(jnp.asarray(tau), eps)
    index = jnp.clip(jnp.ceil(tau / base + (1 - f)), 1, nfe)
    tau_src = jnp.clip((index - (1 - f)) * base, eps, 1)
    return tau_src, jnp.where(index == 1, f * base, base).astype(tau_src.dtype)


def sampling_times(
    nfe: int,
    warp: TimeWarp,
    final_step_size_scale: float = 1.0,
    h: float = 0.0,
    start: float = 1.0,
) -> FlowMapTimes:
    """Times of the flow-map SDE sampler.

    Args:
      nfe: number of network evaluations, at least 1.
      warp: raw time to noise level.
      final_step_size_scale: relative length of the last segment.
      h: stochasticity; 0 is deterministic, `inf` replaces all noise between segments.
      start: noise level of the first evaluation; the segments share the rest of the raw time.

    Returns:
      The times, `[nfe]` each, float64 NumPy: constants of the compiled sampler.

    Raises:
      ValueError: if `nfe` is below 1, `h` or the scale negative, `start` not in (0, 1], or any of
        them is traced.
    """
    if any(isinstance(value, jax.core.Tracer) for value in (h, start)):
        raise ValueError(
            "sampling_times is computed before the program: call it outside of jit and pass its "
            "times to `sample_segments`, for one program for all `h` and `start`"
        )
    nfe = whole("nfe", nfe, 1)
    check_warp(warp)
    check_number("start", start, 0, 1, open_low=True)
    check_number("h", h, 0, finite=False)
    segments, h, start = Segments(nfe, final_step_size_scale), float(h), float(start)
    tau = segments.starts * warp.unwarp(start)
    sigma = np.append(warp.warp(tau), 0.0)
    src, to = sigma[:-1], sigma[1:]
    if h == 0:
        m = np.ones(nfe)
    elif np.isinf(h):
        m = np.zeros(nfe)
    else:
        m = (to * (1 - src) / np.maximum(src * (1 - to), 1e-6)) ** (h * h)
    dst = to * m / np.maximum(1 - to + to * m, 1e-6)
    return FlowMapTimes(src, dst, to, m)


def check_warp(warp: TimeWarp) -> None:
    """Refuses anything that does not map raw times to noise levels, such as a bare shift.

    Args:
      warp: the map.

    Raises:
      ValueError: it has no `warp` and `unwarp`.
    """
    if not (hasattr(warp, "warp") and hasattr(warp, "unwarp")):
        raise ValueError(f"warp must be a TimeWarp, got {warp!r}")


def _checked_scale(nfe: int, final_step_size_scale: float) -> float:
    whole("nfe", nfe, 1)
    check_number("final_step_size_scale", final_step_size_scale, 0)
    return float(final_step_size_scale)
