"""ArcFlow policy: a mixture of exponentially growing velocities (arXiv 2602.09014, Sec. 3).

The velocity depends on time alone, so its integral over any interval is known in closed form: a
rollout is exact in one evaluation, without substeps.
"""

import flax.struct
import jax
import jax.numpy as jnp

from piflow_jax.flow.policies.base import check_mask, check_output, check_query, per_sample, promote

__all__ = ["ArcFlowPolicy", "ArcOutput"]


@flax.struct.dataclass
class ArcOutput:
    """A mixture of velocities at the segment's source, each with a rate of growth.

    Attributes:
      means: `[B, *sites, K, C]`, velocities of the components at the source.
      logweights: `[B, *sites, K]`, log-weights; they need not be normalised.
      rates: `[B, *sites, K]`, growth per unit of noise level; the first one is taken to be 0.
    """

    means: jax.Array
    logweights: jax.Array
    rates: jax.Array


@flax.struct.dataclass
class ArcFlowPolicy:
    """Velocity field `u(t) = sum_k w_k mu_k exp(g_k (s - t))`, the same at every state.

    Make one with `ArcFlowPolicy.create`. `w` are the softmax of the log-weights; the first
    component is the constant one, `g_0 = 0`.

    Attributes:
      means: `[B, *sites, K, C]`.
      logweights: `[B, *sites, K]`.
      rates: `[B, *sites, K]`.
      sigma_src: `[B]`, the source's noise level `s`.
    """

    means: jax.Array
    logweights: jax.Array
    rates: jax.Array
    sigma_src: jax.Array

    @classmethod
    def create(cls, output: ArcOutput, x_src: jax.Array, sigma_src: jax.Array) -> "ArcFlowPolicy":
        """Builds the policy from a network's output.

        Args:
          output: the mixture, `K >= 1` components.
          x_src: `[B, *sites, C]`, the state that the network saw; only its shape is used.
          sigma_src: `[B]`, its noise level.

        Returns:
          The policy, in float32 or float64.

        Raises:
          ValueError: if the shapes do not match, or there is no component.
        """
        check_output(output, x_src, sigma_src)
        means, logweights, rates, sigma_src = promote(
            output.means, output.logweights, output.rates, sigma_src
        )
        # A mask and not a slice: the rate of the constant component gets no gradient.
        rates = jnp.where(jnp.arange(rates.shape[-1]) == 0, 0, rates)
        return cls(means=means, logweights=logweights, rates=rates, sigma_src=sigma_src)

    @property
    def _states(self) -> tuple[int, ...]:
        return self.means.shape[:-2] + self.means.shape[-1:]

    def velocity(self, x: jax.Array, sigma: jax.Array) -> jax.Array:
        """Velocity at `x[B, *sites, C]` and noise levels `sigma[B]`; see `Policy.velocity`."""
        check_query(x, sigma, self._states)
        x, sigma, _ = promote(x, sigma, self.means)
        elapsed = per_sample(self.sigma_src - sigma, self.rates.ndim)
        return self._mix(jnp.exp(self.rates * elapsed))

    def displacement(self, x: jax.Array, sigma_start: jax.Array, sigma_end: jax.Array) -> jax.Array:
        """Exact change of the state from one noise level down to another.

        `x_end - x = -sum_k w_k mu_k (exp(g_k (s - b)) - exp(g_k (s - a))) / g_k` from `a` down to
        `b`, and `-w_k mu_k (a - b)` in the limit of `g_k = 0`.

        Args:
          x: `[B, *sites, C]`, states; only their dtype is used.
          sigma_start: `[B]`, `a`.
          sigma_end: `[B]`, `b`, not above `a`.

        Returns:
          `[B, *sites, C]`.
        """
        check_query(x, sigma_start, self._states)
        x, start, end, _ = promote(x, sigma_start, sigma_end, self.means)
        ndim = self.rates.ndim
        length = per_sample(start - end, ndim)
        grown = self.rates * length
        # expm1(z) / z by its series near 0, where the quotient loses its digits and its gradient.
        small = jnp.abs(grown) < 1e-3
        safe = jnp.where(small, 1, grown)
        series = 1 + grown / 2 + jnp.square(grown) / 6
        mean = jnp.where(small, series, jnp.expm1(safe) / safe)
        begun = jnp.exp(self.rates * per_sample(self.sigma_src - start, ndim))
        return -self._mix(begun * mean * length)

    def drop(self, mask: jax.Array) -> "ArcFlowPolicy":
        """Removes whole components, the same ones at every site; see `GMFlowPolicy.drop`.

        Args:
          mask: `[B, K]`, True removes the component. Where a sample would lose all K, it keeps all.

        Returns:
          The policy with log-weight `-inf` on the removed components.

        Raises:
          ValueError: the mask has another shape, or fractional values.
        """
        mask = check_mask(mask, (self.logweights.shape[0], self.logweights.shape[-1]))
        sites = (1,) * (self.logweights.ndim - 2)
        mask = jnp.reshape(mask, (mask.shape[0], *sites, mask.shape[1]))
        return self.replace(logweights=jnp.where(mask, -jnp.inf, self.logweights))

    def _mix(self, factors: jax.Array) -> jax.Array:
        """`sum_k w_k factor_k mu_k`, for factors `[B, *sites, K]`."""
        weights = jax.nn.softmax(self.logweights, axis=-1) * factors
        return jnp.sum(weights[..., None] * self.means, axis=-2)
