"""Floating point operations of a DiT, counted from its shapes."""

from piflow_jax.models.dit import DiT
from piflow_jax.models.heads import DXHead, GMHead
from piflow_jax.models.layers import TIME_FEATURES

__all__ = ["forward_flops"]


def forward_flops(module: DiT, height: int, width: int) -> int:
    """FLOPs of one forward evaluation of one example; a backward pass costs twice that.

    Matrix products only, two operations per multiply-add. XLA's own count is of no use here: it
    counts the body of a loop once, and layers and substeps are loops.

    Args:
      module: the network.
      height: sites of the input.
      width: sites of the input.

    Returns:
      The count.
    """
    tokens = (height // module.patch_size) * (width // module.patch_size)
    d = module.hidden
    patch = module.patch_size**2 * module.in_channels
    per_token = (4 + 2 * module.mlp_ratio) * d * d
    block = tokens * per_token + 2 * tokens * tokens * d + 6 * d * d
    head = module.head
    if isinstance(head, GMHead):
        rows = head.num_components * (patch + module.patch_size**2)
    elif isinstance(head, DXHead):
        rows = head.num_grid * patch
    else:
        rows = patch
    embedding = TIME_FEATURES * d + d * d + 2 * d * d
    return int(2 * (module.depth * block + tokens * d * (patch + rows) + embedding))
