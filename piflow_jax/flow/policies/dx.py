"""DX policy: `x_0` predicted at several times of the segment (arXiv 2510.14974, Sec. 3.2)."""

from typing import Literal, get_args

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from piflow_jax.arguments import check_between, check_choice, check_number
from piflow_jax.flow.policies.base import check_query, per_sample, promote
from piflow_jax.flow.schedule import TimeWarp

__all__ = ["DXPolicy"]

Mode = Literal["grid", "polynomial"]


@flax.struct.dataclass
class DXPolicy:
    """Velocity field towards an `x_0` that varies with time only, `u = (x_t - x_0(tau)) / t`.

    Make one with `DXPolicy.create`. The policy has a raw time of its own (`shift`) and a segment of
    its own (`segment_size`); both stay as trained when the number of evaluations or the schedule
    changes at test time.

    Attributes:
      x0: `[B, N, *sites, C]`. `grid`: values at `tau_dst + n / (N - 1) * (tau_src - tau_dst)`, so
        index 0 is the segment's end and `N - 1` its source, clamped outside. `polynomial`:
        coefficients of `(tau_src - tau)^n`.
      tau_src: `[B]`, raw time of the source.
      tau_dst: `[B]`, raw time of the segment's end.
      shift: shift of the raw time.
      mode: `grid` or `polynomial`.
      eps: lower bound on the time and on the segment length that the policy divides by.
    """

    x0: jax.Array
    tau_src: jax.Array
    tau_dst: jax.Array
    shift: float = flax.struct.field(pytree_node=False, default=1.0)
    mode: Mode = flax.struct.field(pytree_node=False, default="grid")
    eps: float = flax.struct.field(pytree_node=False, default=1e-4)

    @classmethod
    def create(
        cls,
        output: jax.Array,
        x_src: jax.Array,
        sigma_src: jax.Array,
        segment_size: float | jax.Array = 1.0,
        shift: float = 1.0,
        mode: Mode = "grid",
        eps: float = 1e-4,
    ) -> "DXPolicy":
        """Builds the policy from a network's output.

        Args:
          output: `[B, *sites, N, C]` velocities at the source; each stands for
            `x0_n = x_src - sigma_src * output_n`.
          x_src: `[B, *sites, C]`, the state that the network saw.
          sigma_src: `[B]`, its noise level.
          segment_size: raw-time length of the policy's segment, a scalar or `[B]`; a traced
            negative one leads to higher noise.
          shift: shift of the policy's raw time.
          mode: `grid` (linear interpolation) or `polynomial`.
          eps: lower bound on the time and on the segment length that the policy divides by.

        Returns:
          The policy, in float32 or float64.

        Raises:
          ValueError: the mode is unknown, shapes do not match, or a known number is out of range.
        """
        check_choice("DX mode", mode, get_args(Mode))
        states = np.shape(x_src)
        if output.ndim < 3 or output.shape[:-2] + output.shape[-1:] != states or not output.size:
            raise ValueError(
                f"DX output has shape {output.shape}, not [B, *sites, N, C] for x_src of shape "
                f"{states}"
            )
        if np.shape(sigma_src) != states[:1]:
            raise ValueError(f"sigma_src has shape {np.shape(sigma_src)}, expected {states[:1]}")
        check_between("sigma_src", sigma_src)
        check_between("segment_size", segment_size, 0)
        check_number("eps", eps, 0)
        output, x_src, sigma_src = promote(output, x_src, sigma_src)
        # N comes next to the batch, so that a query reads two contiguous slabs instead of striding
        # over sites.
        output = jnp.moveaxis(output, -2, 1)
        tau_src = TimeWarp(shift).unwarp(sigma_src)
        tau_dst = jnp.maximum(tau_src - segment_size, 0)
        sigma = per_sample(sigma_src, output.ndim)
        return cls(
            x0=jnp.expand_dims(x_src, 1) - sigma * output,
            tau_src=tau_src,
            tau_dst=tau_dst,
            shift=shift,
            mode=mode,
            eps=eps,
        )

    def velocity(self, x: jax.Array, sigma: jax.Array) -> jax.Array:
        """Velocity at `x[B, *sites, C]` and noise levels `sigma[B]`; see `Policy.velocity`."""
        batch, _, *rest = self.x0.shape
        check_query(x, sigma, (batch, *rest))
        x, sigma, _ = promote(x, sigma, self.x0)
        tau = TimeWarp(self.shift).unwarp(sigma)
        x0 = self._interpolate(tau) if self.mode == "grid" else self._polynomial(tau)
        return (x - x0) / per_sample(jnp.maximum(sigma, self.eps), x.ndim)

    def _interpolate(self, tau: jax.Array) -> jax.Array:
        intervals = self.x0.shape[1] - 1
        if intervals == 0:
            return self.x0[:, 0]
        length = jnp.maximum(self.tau_src - self.tau_dst, self.eps)
        position = jnp.clip((tau - self.tau_dst) / length, 0, 1) * intervals
        left = jnp.clip(jnp.floor(position).astype(jnp.int32), 0, intervals - 1)
        grids = jnp.broadcast_to(self.x0, (*left.shape, *self.x0.shape[1:]))
        pair = jax.vmap(lambda grid, i: jax.lax.dynamic_slice_in_dim(grid, i, 2))(grids, left)
        fraction = per_sample(position - left, self.x0.ndim - 1)
        return (1 - fraction) * pair[:, 0] + fraction * pair[:, 1]

    def _polynomial(self, tau: jax.Array) -> jax.Array:
        elapsed = self.tau_src - tau
        powers = jnp.stack([elapsed**n for n in range(self.x0.shape[1])], axis=1)
        return jnp.einsum("bn,bn...->b...", powers, self.x0)
