"""Output heads: they turn a network's last tokens into its output.

A head takes tokens `[B, h, w, D]` on their grid, already normalised and modulated, and the
conditioning embedding `[B, D]`. It does not depend on the network in front of it. Rows of an output
layer are ordered (patch row, patch column, mixture component or grid point, channel). Weights
stored in another order are permuted once, at conversion.

Source: architectures of pi-Flow, arXiv 2510.14974, as released.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from piflow_jax.flow.policies import ArcOutput, GMOutput
from piflow_jax.models.layers import Linear, unpatchify

FRESH_MEANS_STD = 0.1
TEACHER_MEANS_STD = 0.05
TEACHER_LOGSTD = math.log(0.05)
# Name of the layer of a velocity, or of several on a grid.
VELOCITY = "output"


def repeat_rows(velocity: dict, channels: int, copies: int) -> dict:
    """Repeats the rows of a velocity layer for every mixture component or grid point.

    Args:
        velocity: `kernel [D, p*p*C]` and perhaps `bias [p*p*C]` of the layer.
        channels: `C`.
        copies: `K`.

    Returns:
        `kernel [D, p*p*K*C]` and the bias if there is one, `[p*p*K*C]`, ordered (row, column, K,
        C).
    """

    def repeat(rows: jax.Array) -> jax.Array:
        lead = rows.shape[:-1]
        rows = rows.reshape(*lead, rows.shape[-1] // channels, 1, channels)
        return jnp.repeat(rows, copies, axis=-2).reshape(*lead, -1)

    return {name: repeat(jnp.asarray(rows)) for name, rows in velocity.items()}


def _patch_bias(per_pixel: jax.Array, size: int) -> jax.Array:
    """Tiles `per_pixel[K, C]` over patch positions to a bias of `size` rows."""
    flat = per_pixel.reshape(-1)
    return jnp.tile(flat, size // flat.size)


class Head(nn.Module):
    """An output head: layers on the last tokens, and what subclasses make of their outputs."""

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        embedding: jax.Array,
        x: jax.Array,
        sigma: jax.Array,
        *,
        patch_size: int,
        param_dtype: DTypeLike = jnp.float32,
        velocity_bias: bool = True,
    ) -> Any:
        """Maps tokens to the network's output.

        Args:
            tokens: `[B, h, w, D]` final tokens in the compute dtype.
            embedding: `[B, D]` conditioning embedding; its dtype is the dtype of the output.
            x: `[B, H, W, C]` input of the network.
            sigma: `[B]` time of the input.
            patch_size: Side of a patch, in sites.
            param_dtype: Dtype of fresh parameters.
            velocity_bias: Whether the layer of a teacher's velocity has a bias. Layers that only
                students have do.

        Returns:
            The output, see the subclass.
        """

        def project(name, features, bias_init=nn.initializers.zeros):
            """A zero-initialised output layer, with its output arranged as pixels."""
            layer = Linear(
                (patch_size * patch_size * math.prod(features),),
                axes=("embed", None),
                dtype=tokens.dtype,
                output_dtype=embedding.dtype,
                param_dtype=param_dtype,
                kernel_init=nn.initializers.zeros,
                bias_init=bias_init,
                use_bias=velocity_bias or name != VELOCITY,
                name=name,
                parent=self,
            )
            return unpatchify(layer(tokens), patch_size, features)

        return self._predict(project, embedding, x, sigma, param_dtype)

    def noise_shape(self, channels: int) -> tuple[int, ...] | None:
        """Shape of the normal noise that `from_velocity` needs for `channels`; None for none."""
        return None


class VelocityHead(Head):
    """Predicts one velocity per site, as teachers do."""

    def _predict(self, project, embedding, x, sigma, param_dtype) -> jax.Array:
        """Velocities `u[B, H, W, C]`."""
        return project(VELOCITY, (x.shape[-1],))

    def from_velocity(
        self, params: dict, velocity: dict, *, channels: int, noise: jax.Array | None = None
    ) -> dict:
        """Copies a teacher's output layer; see `GMHead.from_velocity`."""
        return {VELOCITY: dict(velocity)}


class DXHead(Head):
    """Predicts velocities on a grid of times (or polynomial coefficients) per site.

    Attributes:
        num_grid: Number of grid points `N`. In grid mode point 0 is the segment's end; in
            polynomial mode point `n` is the coefficient of `(tau_src - tau)^n`.
        input_skip: Adds `x / sigma` to every point but the first. The policy turns a velocity `u_n`
            into `x - sigma u_n`, so with the skip a zero output row is a zero coefficient. A
            polynomial student can therefore start exactly at its teacher. Leave it off for grid
            mode and for released weights, which were trained without it.
        min_sigma: Lower bound of the skip's divisor.
    """

    num_grid: int
    input_skip: bool = False
    min_sigma: float = 1e-4

    def _predict(self, project, embedding, x, sigma, param_dtype) -> jax.Array:
        """Grid velocities `[B, H, W, N, C]`."""
        out = project(VELOCITY, (self.num_grid, x.shape[-1]))
        if not self.input_skip:
            return out
        return jnp.concatenate([out[..., :1, :], self.skipped(out[..., 1:, :], x, sigma)], axis=-2)

    def skipped(self, coefficients: jax.Array, x: jax.Array, sigma: jax.Array) -> jax.Array:
        """Adds the skip to coefficients beyond the first.

        Args:
            coefficients: `[B, *sites, n, C]` outputs.
            x: `[B, *sites, C]` input of the network.
            sigma: `[B]` time of the input.

        Returns:
            `[B, *sites, n, C]`.
        """
        sigma = jnp.maximum(sigma.astype(coefficients.dtype), self.min_sigma)
        skip = x.astype(coefficients.dtype) / sigma.reshape((-1,) + (1,) * (x.ndim - 1))
        return coefficients + skip[..., None, :]

    def from_velocity(
        self, params: dict, velocity: dict, *, channels: int, noise: jax.Array | None = None
    ) -> dict:
        """Starts every grid point (with `input_skip`: the constant coefficient) at the teacher.

        Args:
            params: The head's own parameters; all are replaced.
            velocity: `kernel [D, p*p*C]` and perhaps `bias [p*p*C]` of the teacher's output layer.
            channels: `C`.
            noise: Unused; mixture heads take `[K, C]`.

        Returns:
            The head's parameters.
        """
        output = repeat_rows(velocity, channels, self.num_grid)
        if self.input_skip:
            first = jnp.repeat(jnp.arange(self.num_grid) == 0, channels)
            keep = _patch_bias(first, output["kernel"].shape[-1])
            output = {
                name: jnp.where(keep.reshape((1,) * (rows.ndim - 1) + (-1,)), rows, 0)
                for name, rows in output.items()
            }
        return {VELOCITY: output}


class _MixtureHead(Head):
    """A head with `K` means per site."""

    num_components: int

    def _means(self, project, channels: int) -> jax.Array:
        def fresh_bias(key, shape, dtype):
            noise = jax.random.normal(key, (self.num_components, channels), dtype)
            return _patch_bias(FRESH_MEANS_STD * noise, shape[0])

        return project("means", (self.num_components, channels), fresh_bias)

    def noise_shape(self, channels: int) -> tuple[int, int]:
        """Shape `(K, C)` of the normal noise that `from_velocity` needs, `C` being `channels`."""
        return (self.num_components, channels)

    def _means_and_weights(
        self, params: dict, velocity: dict, channels: int, noise: jax.Array | None
    ) -> dict:
        """Means at the velocity, with noise in the bias to separate them, and equal weights."""
        means = repeat_rows(velocity, channels, self.num_components)
        kernel = means["kernel"]
        means.setdefault("bias", jnp.zeros(kernel.shape[-1:], kernel.dtype))
        if noise is not None:
            offsets = TEACHER_MEANS_STD * noise.astype(means["bias"].dtype)
            means["bias"] = means["bias"] + _patch_bias(offsets, means["bias"].size)
        return {"means": means, "logweights": jax.tree.map(jnp.zeros_like, params["logweights"])}


class GMHead(_MixtureHead):
    """Predicts a Gaussian mixture of velocities per site, and one standard deviation per sample.

    Initial values: zero output kernels, a bias of the means `N(0, 0.1^2)` per (component, channel),
    equal log-weights, `logstd = 0`.

    Attributes:
        num_components: Number of mixture components `K`.
        logstd_hidden: Width of the hidden layer of the logstd head.
        constant_logstd: A fixed log standard deviation, which replaces the logstd head.
    """

    logstd_hidden: int = 1024
    constant_logstd: float | None = None

    def _predict(self, project, embedding, x, sigma, param_dtype) -> GMOutput:
        """`GMOutput(means[B, H, W, K, C], logweights[B, H, W, K], logstd[B])`.

        Log-weights are normalised over K. The log standard deviation passes no gradient to the
        embedding.
        """
        return GMOutput(
            means=self._means(project, x.shape[-1]),
            logweights=jax.nn.log_softmax(project("logweights", (self.num_components,)), axis=-1),
            logstd=self._logstd(jax.lax.stop_gradient(embedding), param_dtype),
        )

    def _logstd(self, embedding: jax.Array, param_dtype: DTypeLike) -> jax.Array:
        """Log standard deviations `[B]`, in the embedding's own precision."""
        if self.constant_logstd is not None:
            return jnp.full(embedding.shape[:1], self.constant_logstd, embedding.dtype)

        def linear(size, name, **options):
            return Linear((size,), param_dtype=param_dtype, name=name, parent=self, **options)

        into = linear(self.logstd_hidden, "logstd_in", axes=("embed", None))
        out = linear(1, "logstd_out", axes=(None, None), kernel_init=nn.initializers.zeros)
        return out(nn.silu(into(nn.silu(embedding))))[:, 0]

    def from_velocity(
        self, params: dict, velocity: dict, *, channels: int, noise: jax.Array | None = None
    ) -> dict:
        """Starts every component at the teacher, with a little noise in the bias to separate them.

        Args:
            params: The head's own parameters; only the first layer of the logstd head is kept.
            velocity: `kernel [D, p*p*C]` and perhaps `bias [p*p*C]` of the teacher's output layer.
            channels: `C`.
            noise: `[K, C]` standard normal draws, scaled by 0.05 and shared over patch positions;
                None adds none.

        Returns:
            The head's parameters: repeated means, zero log-weight layer, `logstd = log 0.05`.
        """
        head = self._means_and_weights(params, velocity, channels, noise)
        if self.constant_logstd is None:
            last = params["logstd_out"]
            head["logstd_in"] = params["logstd_in"]
            head["logstd_out"] = {
                "kernel": jnp.zeros_like(last["kernel"]),
                "bias": jnp.full_like(last["bias"], TEACHER_LOGSTD),
            }
        return head


class ArcHead(_MixtureHead):
    """Predicts an ArcFlow mixture per site: velocities, weights and rates of growth.

    Initial values: zero kernels, a bias of the means `N(0, 0.1^2)` per (component, channel), equal
    log-weights, and rates spread over `[-max_rate, max_rate] / 2`, so that components differ from
    the start.

    Attributes:
      num_components: Number of mixture components `K`; the first has rate zero.
      max_rate: Bound of the rates, `g = max_rate tanh(.)`, which keeps exponents finite.
    """

    max_rate: float = 4.0

    def _predict(self, project, embedding, x, sigma, param_dtype) -> ArcOutput:
        """`ArcOutput(means[B, H, W, K, C], logweights[B, H, W, K], rates[B, H, W, K])`."""
        k = self.num_components

        def spread_bias(key, shape, dtype):
            return _patch_bias(spread_rates(k, dtype), shape[0])

        return ArcOutput(
            means=self._means(project, x.shape[-1]),
            logweights=jax.nn.log_softmax(project("logweights", (k,)), axis=-1),
            rates=self.bounded(project("rates", (k,), spread_bias)),
        )

    def bounded(self, rates: jax.Array) -> jax.Array:
        """Maps unbounded `rates` of any shape to growth rates within `[-max_rate, max_rate]`."""
        return self.max_rate * jnp.tanh(rates)

    def from_velocity(
        self, params: dict, velocity: dict, *, channels: int, noise: jax.Array | None = None
    ) -> dict:
        """Starts every component at the teacher, with fresh rates; see `GMHead.from_velocity`.

        The policy's velocity at the source is then the teacher's, for any rates.

        Args:
            params: The head's own parameters; all are replaced.
            velocity: `kernel [D, p*p*C]` and perhaps `bias [p*p*C]` of the teacher's output layer.
            channels: `C`.
            noise: `[K, C]` standard normal draws, as for `GMHead`; None adds none.

        Returns:
            The head's parameters.
        """
        rates = jax.tree.map(jnp.zeros_like, params["rates"])
        bias = rates["bias"]
        rates["bias"] = _patch_bias(spread_rates(self.num_components, bias.dtype), bias.size)
        return self._means_and_weights(params, velocity, channels, noise) | {"rates": rates}


def spread_rates(components: int, dtype: DTypeLike) -> jax.Array:
    """A bias `[K]` that spreads an `ArcHead`'s rates over half of their range."""
    return jnp.arctanh(jnp.linspace(-0.5, 0.5, components, dtype=dtype))
