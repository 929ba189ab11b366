"""GMFlow policy: the exact velocity of a Gaussian-mixture posterior (arXiv 2510.14974, Sec. 3.2).

The network predicts a mixture over the velocity at the source `(x_s, s)`. Conjugacy with the flow's
Gaussian transition gives the mixture's posterior mean of `x_0` at every later `(x_t, t)` in closed
form, and hence a velocity field without another network evaluation.
"""

from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from piflow_jax.arguments import check_between, check_number
from piflow_jax.flow.policies.base import check_mask, check_output, check_query, per_sample, promote

__all__ = ["GMFlowPolicy", "GMOutput", "MixtureCoefficients"]


@flax.struct.dataclass
class GMOutput:
    """A Gaussian mixture over the velocity at the segment's source.

    Attributes:
      means: `[B, *sites, K, C]`, means of the velocity.
      logweights: `[B, *sites, K]`, log-weights; they need not be normalised.
      logstd: `[B]`, log standard deviation of the velocity, one scalar per sample.
    """

    means: jax.Array
    logweights: jax.Array
    logstd: jax.Array


class MixtureCoefficients(NamedTuple):
    """Coefficients of a mixture's velocity at a noise level, each `[B]` or `[B, N]`.

    In the policy's notation, with the residual `y = x_t - (1 - t) r` at the clamped time `t`:

        e / den = pull y + pull_src y_s
        w       = softmax_k(a_k + <d_k, e / den - half_zeta d_k>)
        u + r   = (weight y + weight_src y_s + weight_center r - sum_k w_k d_k) / denominator

    The clamp raises the noise level by `lift`.
    """

    pull: jax.Array
    pull_src: jax.Array
    half_zeta: jax.Array
    weight: jax.Array
    weight_src: jax.Array
    weight_center: jax.Array
    denominator: jax.Array
    lift: jax.Array


@flax.struct.dataclass
class GMFlowPolicy:
    """Velocity field of a Gaussian mixture predicted at `(x_src, sigma_src)`.

    Make one with `GMFlowPolicy.create`. With `alpha = 1 - t` and times clamped to at least `eps`,

        zeta = (alpha_t / t)^2 - (alpha_s / s)^2
        nu   = alpha_t x_t / t^2 - alpha_s x_s / s^2
        den  = max(v zeta + 1, eps)
        x0   = sum_k softmax_k(a_k + <m_k, nu - zeta m_k / 2> / den) (v nu + m_k) / den
        u    = (x_t - x0) / t

    Evaluated as written, this loses all digits in float32 near `t = 0`, where `nu` and `zeta m_k`
    are large and nearly equal. The fields are therefore relative to an arbitrary point `r` near the
    mixture (its mean). With `d_k = m_k - r`, `y_t = x_t - alpha_t r` and `y_s` likewise,

        e = nu - zeta r = alpha_t y_t / t^2 - alpha_s y_s / s^2
        u = ((1 - v alpha_t / t - v alpha_s^2 / s^2) y_t + v alpha_s y_s / s^2 - sum_k w_k d_k)
            / (den t) - r

    with `w_k = softmax_k(a_k + <d_k, e - zeta d_k / 2> / den)`. The result does not depend on `r`.

    Sites are the minor axes of the fields, and the program spells out sums over channels and
    components. A query is then a series of elementwise loops over sites, which compilers vectorise
    and fuse on every backend (on a CPU thirty times faster than reductions over a minor K).

    Attributes:
      offsets: `[B, K, C, *sites]`, component means of `x_0` relative to `center`.
      logweights: `[B, K, *sites]`.
      variance: `[B]`, variance of `x_0`, shared by all components and sites.
      center: `[B, C, *sites]`, the reference point `r`; carries no gradient.
      residual_src: `[B, C, *sites]`, `y_s`.
      sigma_src: `[B]`.
      eps: smallest time used in the formulas.
    """

    offsets: jax.Array
    logweights: jax.Array
    variance: jax.Array
    center: jax.Array
    residual_src: jax.Array
    sigma_src: jax.Array
    eps: float = flax.struct.field(pytree_node=False, default=1e-6)

    @classmethod
    def create(
        cls, output: GMOutput, x_src: jax.Array, sigma_src: jax.Array, eps: float = 1e-6
    ) -> "GMFlowPolicy":
        """Builds the policy from a network's output.

        Args:
          output: the mixture, `K >= 1` components.
          x_src: `[B, *sites, C]`, the state that the network saw.
          sigma_src: `[B]`, its noise level.
          eps: smallest time used in the formulas; the reference uses 1e-6 in training and 1e-4 in
            its sampler.

        Returns:
          The policy, in float32 or float64.

        Raises:
          ValueError: if the shapes do not match, there is no component, or `eps` or a known noise
            level is not a number.
        """
        check_output(output, x_src, sigma_src)
        check_between("sigma_src", sigma_src)
        check_number("eps", eps, 0)
        means, logweights, logstd, x_src, sigma_src = promote(
            output.means, output.logweights, output.logstd, x_src, sigma_src
        )
        x_src = jnp.moveaxis(x_src, -1, 1)
        means = jnp.moveaxis(means, (-2, -1), (1, 2))
        logweights = jnp.moveaxis(logweights, -1, 1)
        x0_means = jnp.expand_dims(x_src, 1) - per_sample(sigma_src, means.ndim) * means
        weights = jnp.expand_dims(jax.nn.softmax(logweights, axis=1), 2)
        center = jax.lax.stop_gradient(jnp.sum(weights * x0_means, axis=1))
        alpha_src = 1 - jnp.maximum(per_sample(sigma_src, x_src.ndim), eps)
        return cls(
            offsets=x0_means - jnp.expand_dims(center, 1),
            logweights=logweights,
            variance=jnp.square(jnp.exp(logstd) * sigma_src),
            center=center,
            residual_src=x_src - alpha_src * center,
            sigma_src=sigma_src,
            eps=eps,
        )

    @property
    def states(self) -> tuple[int, ...]:
        """Shape `(B, *sites, C)` of the policy's states."""
        batch, channels, *sites = self.center.shape
        return batch, *sites, channels

    def velocity(self, x: jax.Array, sigma: jax.Array) -> jax.Array:
        """Velocity at `x[B, *sites, C]` and noise levels `sigma[B]`; see `Policy.velocity`."""
        of, residual, pull = self._at(x, sigma)
        mean_offset = self._mean_offset(pull, of.half_zeta)
        numerator = (
            of.weight * residual
            + of.weight_src * self.residual_src
            + of.weight_center * self.center
            - mean_offset
        )
        return jnp.moveaxis(numerator / of.denominator - self.center, 1, -1)

    def weights(self, x: jax.Array, sigma: jax.Array) -> jax.Array:
        """Posterior weights `softmax(a')` of the components at a state.

        Args:
          x: states `[B, *sites, C]`.
          sigma: noise levels `[B]`, see `velocity`.

        Returns:
          `[B, *sites, K]`, with a sum of 1 over the components. At the source they are the
          mixture's own; towards `t = 0` the component nearest to the state takes all.
        """
        of, _, pull = self._at(x, sigma)
        logits = self._logits(pull, of.half_zeta)
        return jnp.moveaxis(jax.nn.softmax(logits, axis=1), 1, -1)

    def _at(
        self, x: jax.Array, sigma: jax.Array
    ) -> tuple["MixtureCoefficients", jax.Array, jax.Array]:
        """Coefficients, the residual `y` and `e / den` of a query, `[B, C, *sites]`."""
        check_query(x, sigma, self.states)
        x, sigma, _ = promote(x, sigma, self.center)
        numbers = self.coefficients(sigma)
        of = MixtureCoefficients(*(per_sample(number, x.ndim) for number in numbers))
        # Relative to the centre at the clamped time.
        lifted = per_sample(1 - sigma, x.ndim) - of.lift
        residual = jnp.moveaxis(x, -1, 1) - lifted * self.center
        return of, residual, of.pull * residual + of.pull_src * self.residual_src

    def coefficients(self, sigma: jax.Array) -> "MixtureCoefficients":
        """Coefficients of the velocity at a noise level: numbers per sample, without site axes.

        Args:
          sigma: noise levels `[B]`, or `[B, N]` for several per sample.

        Returns:
          The coefficients, shaped like `sigma`.
        """
        t = jnp.maximum(sigma, self.eps)
        s = per_sample(jnp.maximum(self.sigma_src, self.eps), sigma.ndim)
        v = per_sample(self.variance, sigma.ndim)
        snr_t, snr_s = (1 - t) / t, (1 - s) / s  # ratios of amplitudes, alpha / sigma
        zeta = (snr_t - snr_s) * (snr_t + snr_s)
        raw_denominator = v * zeta + 1
        denominator = jnp.maximum(raw_denominator, self.eps)
        # Positive only where the clamp acts. That takes a query far above the source.
        excess = denominator - raw_denominator
        return MixtureCoefficients(
            pull=snr_t / t / denominator,
            pull_src=-snr_s / s / denominator,
            half_zeta=0.5 * zeta / denominator,
            weight=1 - v * snr_t - v * jnp.square(snr_s) + excess,
            weight_src=v * snr_s / s,
            weight_center=excess,
            denominator=denominator * t,
            lift=t - sigma,
        )

    def _logits(self, pull: jax.Array, half_zeta: jax.Array) -> jax.Array:
        """`a' [B, K, *sites]`, up to a constant, for `e / den` and `zeta / (2 den)`."""
        # Spelled out over C too: on a CPU only reductions along K are fast.
        by_channel = zip(jnp.unstack(self.offsets, axis=2), jnp.unstack(pull, axis=1), strict=True)
        inner = sum(d * (jnp.expand_dims(p, 1) - half_zeta * d) for d, p in by_channel)
        return self.logweights + inner

    def _mean_offset(self, pull: jax.Array, half_zeta: jax.Array) -> jax.Array:
        """`sum_k w_k d_k[B, C, *sites]` for `e / den [B, C, *sites]` and `zeta / (2 den)`."""
        logits = jax.lax.optimization_barrier(self._logits(pull, half_zeta))
        # As separate reductions, they are not recomputed for each component.
        largest = jax.lax.stop_gradient(jnp.max(logits, axis=1, keepdims=True))
        weights = jax.lax.optimization_barrier(jnp.exp(logits - largest))
        pairs = zip(jnp.unstack(weights, axis=1), jnp.unstack(self.offsets, axis=1), strict=True)
        weighted = sum(jnp.expand_dims(w, 1) * d for w, d in pairs)
        return weighted / jnp.sum(weights, axis=1, keepdims=True)

    def drop(self, mask: jax.Array) -> "GMFlowPolicy":
        """GM dropout: removes whole components, the same ones at every site.

        Args:
          mask: `[B, K]`, True removes the component. Where a sample would lose all K, it keeps all.

        Returns:
          The policy with log-weight `-inf` on the removed components.

        Raises:
          ValueError: the mask has another shape, or fractional values.
        """
        mask = check_mask(mask, self.logweights.shape[:2])
        mask = jnp.reshape(mask, mask.shape + (1,) * (self.logweights.ndim - 2))
        return self.replace(logweights=jnp.where(mask, -jnp.inf, self.logweights))

    def with_temperature(self, temperature: float | jax.Array) -> "GMFlowPolicy":
        """Sharpens the mixture: log-weights divided and the variance multiplied by `temperature`.

        Args:
          temperature: clamped to `[eps, 1]`; 1 leaves the velocities unchanged.

        Returns:
          The sharpened policy.

        Raises:
          ValueError: it is not a single number, or it is known and not finite.
        """
        check_number("temperature", temperature)
        temperature = jnp.clip(jnp.asarray(temperature, self.variance.dtype), self.eps, 1.0)
        return self.replace(
            logweights=jax.nn.log_softmax(self.logweights / temperature, axis=1),
            variance=self.variance * temperature,
        )
