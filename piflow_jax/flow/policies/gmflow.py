"""GMFlow policy: the exact velocity of a Gaussian-mixture posterior (arXiv 2510.14974, Sec. 3.2).

The network predicts a mixture over the velocity at the source `(x_s, s)`. Conjugacy with the flow's
Gaussian transition gives the mixture's posterior mean of `x_0` at every later `(x_t, t)` in closed
form, and hence a velocity field without another network evaluation.
"""

import flax.struct
import jax
import jax.numpy as jnp

from piflow_jax.flow.policies.base import per_sample, promote

__all__ = ["GMFlowPolicy", "GMOutput"]


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


@flax.struct.dataclass
class GMFlowPolicy:
    """Velocity field of a Gaussian mixture predicted at `(x_src, sigma_src)`.

    Make one with `GMFlowPolicy.create`. With `alpha = 1 - t` and times clamped to at least `eps`,

        zeta = (alpha_t / t)^2 - (alpha_s / s)^2
        nu   = alpha_t x_t / t^2 - alpha_s x_s / s^2
        den  = max(v zeta + 1, eps)
        x0   = sum_k softmax_k(a_k + <m_k, nu - zeta m_k / 2> / den) (v nu + m_k) / den
        u    = (x_t - x0) / t

    Evaluated as written this loses all digits in float32 near `t = 0`, where `nu` and `zeta m_k` are
    large and nearly equal. The stored quantities are therefore relative to an arbitrary point `r`
    near the mixture (its mean): with `d_k = m_k - r`, `y_t = x_t - alpha_t r` and `y_s` likewise,

        e = nu - zeta r = alpha_t y_t / t^2 - alpha_s y_s / s^2
        u = ((1 - v alpha_t / t - v alpha_s^2 / s^2) y_t + v alpha_s y_s / s^2 - sum_k w_k d_k)
            / (den t) - r

    with `w_k = softmax_k(a_k + <d_k, e - zeta d_k / 2> / den)`. The result does not depend on `r`.

    Attributes:
      offsets: `[B, *sites, K, C]`, component means of `x_0` relative to `center`.
      logweights: `[B, *sites, K]`.
      variance: `[B]`, variance of `x_0`, shared by all components and sites.
      center: `[B, *sites, C]`, the reference point `r`; carries no gradient.
      residual_src: `[B, *sites, C]`, `y_s`.
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
        """Builds the policy of a network's output.

        Args:
          output: the mixture, `K >= 1` components.
          x_src: `[B, *sites, C]`, the state that the network saw.
          sigma_src: `[B]`, its noise level.
          eps: smallest time used in the formulas; the reference takes 1e-6 in training and 1e-4 in
            its sampler.

        Returns:
          The policy, in float32 or float64.

        Raises:
          ValueError: if the shapes do not belong together.
        """
        _check_shapes(output, x_src, sigma_src)
        means, logweights, logstd, x_src, sigma_src = promote(
            output.means, output.logweights, output.logstd, x_src, sigma_src
        )
        sigma = per_sample(sigma_src, x_src.ndim)
        x0_means = jnp.expand_dims(x_src, -2) - jnp.expand_dims(sigma, -2) * means
        weights = jax.nn.softmax(logweights, axis=-1)
        center = jax.lax.stop_gradient(jnp.einsum("...k,...kc->...c", weights, x0_means))
        # x_src is an input of the network, not an output: constant in every use of a policy, but
        # its gradient is kept, for whoever differentiates through a sampler.
        return cls(
            offsets=x0_means - jnp.expand_dims(center, -2),
            logweights=logweights,
            variance=jnp.square(jnp.exp(logstd) * sigma_src),
            center=center,
            residual_src=x_src - (1 - jnp.maximum(sigma, eps)) * center,
            sigma_src=sigma_src,
            eps=eps,
        )

    def velocity(self, x: jax.Array, sigma: jax.Array) -> jax.Array:
        """Velocity at `(x, sigma)`; see the class and `Policy.velocity`."""
        x, sigma, _ = promote(x, sigma, self.center)
        t = jnp.maximum(sigma, self.eps)
        s = jnp.maximum(self.sigma_src, self.eps)
        v = self.variance
        snr_t, snr_s = (1 - t) / t, (1 - s) / s  # of the amplitudes: alpha / sigma
        zeta = (snr_t - snr_s) * (snr_t + snr_s)
        raw_denominator = v * zeta + 1
        denominator = jnp.maximum(raw_denominator, self.eps)
        # Positive only where the clamp acts, which takes a query far above the source.
        excess = denominator - raw_denominator

        def expand(value):
            return per_sample(value, x.ndim)

        residual = x - expand(1 - t) * self.center
        pull = expand(snr_t / t / denominator) * residual - expand(
            snr_s / s / denominator
        ) * self.residual_src
        logits = (
            self.logweights
            + jnp.einsum("...kc,...c->...k", self.offsets, pull)
            - expand(0.5 * zeta / denominator) * jnp.sum(jnp.square(self.offsets), -1)
        )
        weights = jax.nn.softmax(logits, axis=-1)
        mean_offset = jnp.einsum("...k,...kc->...c", weights, self.offsets)
        numerator = (
            expand(1 - v * snr_t - v * jnp.square(snr_s) + excess) * residual
            + expand(v * snr_s / s) * self.residual_src
            + expand(excess) * self.center
            - mean_offset
        )
        return numerator / expand(denominator * t) - self.center

    def drop(self, mask: jax.Array) -> "GMFlowPolicy":
        """GM dropout: removes whole components, the same ones at every site.

        Args:
          mask: `[B, K]`, True removes the component. Where a sample would lose all K, it keeps all.

        Returns:
          The policy with log-weight `-inf` on the removed components.
        """
        mask = mask & ~jnp.all(mask, axis=-1, keepdims=True)
        sites = (1,) * (self.logweights.ndim - 2)
        mask = jnp.reshape(mask, (mask.shape[0], *sites, mask.shape[1]))
        return self.replace(logweights=jnp.where(mask, -jnp.inf, self.logweights))

    def with_temperature(self, temperature: float | jax.Array) -> "GMFlowPolicy":
        """Sharpens the mixture: log-weights divided and the variance multiplied by `temperature`.

        Args:
          temperature: clamped to `[eps, 1]`; 1 leaves the velocities unchanged.

        Returns:
          The sharpened policy.
        """
        temperature = jnp.clip(jnp.asarray(temperature, self.variance.dtype), self.eps, 1.0)
        return self.replace(
            logweights=jax.nn.log_softmax(self.logweights / temperature, axis=-1),
            variance=self.variance * temperature,
        )


def _check_shapes(output: GMOutput, x_src: jax.Array, sigma_src: jax.Array) -> None:
    batch, *sites, channels = x_src.shape
    components = output.means.shape[-2]
    expected = {
        "means": (batch, *sites, components, channels),
        "logweights": (batch, *sites, components),
        "logstd": (batch,),
    }
    for name, shape in expected.items():
        found = getattr(output, name).shape
        if found != shape:
            raise ValueError(
                f"GMOutput.{name} has shape {found}; x_src of shape {x_src.shape} asks for {shape}"
            )
    if sigma_src.shape != (batch,):
        raise ValueError(f"sigma_src has shape {sigma_src.shape}, expected {(batch,)}")
