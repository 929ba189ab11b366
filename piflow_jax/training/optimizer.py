"""The optimisers of the recipes and the EMA (docs/method.md, optimisation)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from piflow_jax.config import OptimizerConfig

# Learning rate of the first warm-up step, as a share of the peak.
WARMUP_START = 1e-3
# Share of the peak at which a cosine or linear decay ends.
DECAY_END = 0.02
# Path of the layer that predicts rates of growth, see `ArcHead`.
_RATES = ["head", "rates"]
# Root mean square of Muon's updates before the learning rate, close to Adam's.
MUON_RMS = 0.2


class ClipState(NamedTuple):
    """Number of steps done."""

    count: jax.Array


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up from a thousandth of the peak, then constant, cosine or linear decay.

    Args:
      config: peak, warm-up and decay.
      steps: length of the training.

    Returns:
      The schedule, a function of the number of steps done.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    rest = steps - warmup
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, alpha=DECAY_END),
        "linear": lambda: optax.linear_schedule(peak, DECAY_END * peak, rest),
    }[config.decay]()
    if warmup == 0:
        return after
    return optax.join_schedules(
        [optax.linear_schedule(WARMUP_START * peak, peak, warmup), after], [warmup]
    )


def clip_after(max_norm: float, start: int) -> optax.GradientTransformation:
    """Clips by global norm, but not in the first `start` steps.

    Early gradients are naturally large (heads start at zero), and warm-up already limits the steps.
    Clipping early gradients would change their relative sizes in Adam's moments.

    Args:
      max_norm: largest global norm. 0 does not clip, but has a state of the same structure.
      start: number of steps without clipping.

    Returns:
      The transformation.
    """

    def init(params):
        return ClipState(jnp.zeros((), jnp.int32))

    def update(updates, state, params=None):
        if max_norm:
            norm = optax.global_norm(updates)
            scale = jnp.where(state.count >= start, max_norm / jnp.maximum(norm, max_norm), 1.0)
            updates = jax.tree.map(lambda g: (g * scale).astype(g.dtype), updates)
        return updates, ClipState(state.count + 1)

    return optax.GradientTransformation(init, update)


def muon_matrices(params):
    """Selects the parameters that Muon updates, and the axes along which they are matrices.

    Muon updates the kernels of the transformer blocks. Each maps the token's width (the axis after
    the layers') to the features of one output (the last axis). Axes between them count several
    outputs of one layer, such as query, key and value; each output is a separate matrix.

    Args:
      params: the network's parameters; those under `blocks` have a leading axis of layers.

    Returns:
      A tree of the same structure with `MuonDimensionNumbers`, or None where AdamW updates a
      parameter.
    """

    def matrix(path, leaf):
        names = [getattr(key, "key", None) for key in path]
        hidden = isinstance(leaf, optax.MaskedNode)
        if "blocks" in names and names[-1] == "kernel" and not hidden:
            return MuonDimensionNumbers(reduction_axis=1, output_axis=leaf.ndim - 1)
        return None

    # optax replaces the parameters of other groups by nodes without leaves.
    return jax.tree_util.tree_map_with_path(
        matrix, params, is_leaf=lambda x: isinstance(x, optax.MaskedNode)
    )


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The optimiser with warm-up, and with clipping after the warm-up.

    The layer that predicts ArcFlow's rates of growth takes smaller steps by
    `config.growth_rate_scale`, as in the code of its authors (arXiv 2602.09014).

    `adamw` is the optimiser of the reference. `muon` orthogonalises the momentum of the blocks'
    matrices (Jordan, 2024), scales it to Adam's root mean square (2502.16982), and uses AdamW for
    all other parameters. Both use Nesterov momentum.

    Args:
      config: the settings.
      steps: length of the training, for schedules that decay.

    Returns:
      The transformation.
    """
    rate = learning_rate(config, steps)
    # None means the parameters' own dtype, which is float64 in tests.
    moment_dtype = None if config.moment_dtype == "float32" else config.moment_dtype
    if config.kind == "muon":
        rule = muon(
            rate,
            weight_decay=config.weight_decay,
            adam_b1=config.beta1,
            adam_b2=config.beta2,
            adam_weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=muon_matrices,
            consistent_rms=MUON_RMS,
            mu_dtype=moment_dtype,
        )
    else:
        rule = optax.adamw(
            rate,
            b1=config.beta1,
            b2=config.beta2,
            weight_decay=config.weight_decay,
            mu_dtype=moment_dtype,
        )
    rules = [clip_after(config.grad_clip, config.warmup_steps), rule]
    if config.growth_rate_scale != 1:  # otherwise states are as they were before there was a choice
        scale = optax.scale(config.growth_rate_scale)
        rules.append(optax.masked(scale, growth_rates))
    return optax.chain(*rules)


def growth_rates(params):
    """Selects the parameters of the layer that predicts rates of growth; see `ArcHead`.

    Args:
      params: the network's parameters.

    Returns:
      A tree of the same structure, True for these parameters.
    """

    def of_rates(path, _):
        names = [getattr(key, "key", None) for key in path]
        return names[-3:-1] == _RATES

    return jax.tree_util.tree_map_with_path(of_rates, params)


def karras_decay(step: jax.Array, start: int, gamma: float) -> jax.Array:
    """Weight of the old average, `(1 - 1 / max(step + 1 - start, 1))^(gamma + 1)` (2312.02696).

    Args:
      step: zero-based step of the parameters that enter the average.
      start: step at which averaging starts; before it the average is a copy.
      gamma: larger values give a shorter average.

    Returns:
      The weight in [0, 1), of the default float type.
    """
    t = jnp.maximum(jnp.asarray(step) + 1 - start, 1).astype(jnp.result_type(float))
    return (1 - 1 / t) ** (gamma + 1)


def update_ema(ema, params, step: jax.Array, start: int, gamma: float):
    """One step of the Karras average over a tree of parameters; see `karras_decay`."""
    decay = karras_decay(step, start, gamma)
    return jax.tree.map(lambda e, p: (p + decay * (e - p)).astype(e.dtype), ema, params)
