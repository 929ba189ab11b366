"""Floating point operations: of a network by its shapes, of a program by its matrix products."""

import math

import jax

from piflow_jax.models.dit import DiT
from piflow_jax.models.flux import Flux
from piflow_jax.models.heads import DXHead, GMHead
from piflow_jax.models.joint import MLP_RATIO
from piflow_jax.models.layers import TIME_FEATURES
from piflow_jax.models.qwen_image import QwenImage

__all__ = ["forward_flops", "gradient_flops", "traced_flops"]


def forward_flops(
    module: DiT | Flux | QwenImage, height: int, width: int, text_length: int = 0
) -> int:
    """FLOPs of one forward evaluation of one example.

    Matrix products only, two operations per multiply-add; adapters are counted, the logstd head, a
    vector by sample, is not. XLA's own count is of no use here: it counts the body of a loop once,
    and layers and substeps are loops.

    Args:
      module: the network.
      height: sites of the input.
      width: sites of the input.
      text_length: tokens of text, of a network that reads them.

    Returns:
      The count.
    """
    tokens = (height // module.patch_size) * (width // module.patch_size)
    d = module.hidden
    patch = module.patch_size**2 * module.in_channels
    ends = tokens * d * (patch + _head_rows(module)) + 2 * d * d  # with the last modulation
    if isinstance(module, DiT):
        per_token = (4 + 2 * module.mlp_ratio) * d * d
        block = tokens * per_token + 2 * tokens * tokens * d + 6 * d * d
        return int(2 * (module.depth * block + ends + TIME_FEATURES * d + d * d))
    return 2 * (ends + _text_products(module, tokens, text_length))


def _head_rows(module: DiT | Flux | QwenImage) -> int:
    """Outputs of the head for a token."""
    head, pixels = module.head, module.patch_size**2
    if isinstance(head, GMHead):
        return head.num_components * pixels * (module.in_channels + 1)
    return pixels * module.in_channels * (head.num_grid if isinstance(head, DXHead) else 1)


def _text_products(module: Flux | QwenImage, tokens: int, text_length: int) -> int:
    """Multiply-adds of the embedders and blocks of a network that reads text."""
    d, all_tokens = module.hidden, tokens + text_length
    rank = module.lora.rank if module.lora else 0
    time = TIME_FEATURES * d + d * d
    total = text_length * module.text_features * d + time
    total += rank * (TIME_FEATURES + 3 * d)  # adapters of the embedder of time
    attention = 4 * all_tokens * d * d + 2 * all_tokens * all_tokens * d
    mlp = all_tokens * 2 * (MLP_RATIO * d * d + rank * (1 + MLP_RATIO) * d)
    joint = attention + mlp + 2 * 6 * d * d
    if isinstance(module, QwenImage):
        return total + module.depth * joint
    total += time * module.guidance_embed + module.pooled_features * d + d * d
    # The output of a single block reads attention beside the MLP, and so does its adapter.
    single = attention + mlp + all_tokens * rank * d + 3 * d * d
    return total + module.double_depth * joint + module.single_depth * single


def gradient_flops(
    module: DiT | Flux | QwenImage, height: int, width: int, text_length: int = 0
) -> int:
    """FLOPs of a forward and a backward pass, without recomputation, of one example.

    The backward pass costs twice the forward one, but for products with weights of a base that
    stays as it is: of these no gradient is taken by the weights.

    Args:
      module: the network.
      height: see `forward_flops`.
      width: see `forward_flops`.
      text_length: see `forward_flops`.

    Returns:
      The count.
    """
    forward = forward_flops(module, height, width, text_length)
    if isinstance(module, DiT) or module.lora is None:
        return 3 * forward
    d, tokens = module.hidden, (height // module.patch_size) * (width // module.patch_size)
    flux = isinstance(module, Flux)
    depth = module.double_depth + module.single_depth if flux else module.depth
    attention = 2 * depth * 2 * (tokens + text_length) ** 2 * d
    trained = 2 * (tokens * d * _head_rows(module) + 2 * d * d)
    base = forward_flops(module.clone(lora=None), height, width, text_length)
    return 3 * forward - (base - attention - trained)


def traced_flops(function, *args) -> int:
    """FLOPs of the matrix products in a traced program, loops counted as often as they run.

    Counted from the program that JAX hands to the compiler: recomputation by remat is in it, what
    the compiler merges later is too. `while` loops, whose length is not known, count once;
    rollouts have no matrix products that matter.

    Args:
      function: what to trace.
      *args: its arguments, or their shapes.

    Returns:
      The count, two operations per multiply-add.
    """
    return _jaxpr_flops(jax.make_jaxpr(function)(*args).jaxpr)


def _jaxpr_flops(jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            depth = math.prod(left[axis] for axis in contracted)
            total += 2 * depth * math.prod(equation.outvars[0].aval.shape)
            continue
        repeats = params["length"] if name == "scan" else 1
        if name == "cond":
            total += max(_jaxpr_flops(branch.jaxpr) for branch in params["branches"])
            continue
        for value in params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += repeats * _jaxpr_flops(inner)
    return total
