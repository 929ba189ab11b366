"""The rollout in scripted PyTorch, in the paper's formulas and the reference's layout."""

import torch
from torch import Tensor

__all__ = ["rollout"]


def _wide(value: Tensor) -> Tensor:
    return value.reshape(-1, 1, 1, 1)


@torch.jit.script
def rollout(
    x: Tensor,
    means: Tensor,
    logweights: Tensor,
    variance: Tensor,
    x_src: Tensor,
    sigma_src: Tensor,
    start: Tensor,
    end: Tensor,
    total: int,
) -> Tensor:
    """Euler steps of `x[B, C, H, W]` in `means[B, K, C, H, W]`, `logweights[B, K, H, W]`.

    `variance`, `sigma_src`, `start` and `end` are `[B]`; raw time is the noise level.
    """
    eps = 1e-6
    count = ((start - end) * total).round().clamp(min=1)
    size = (start - end) / count
    s = _wide(sigma_src.clamp(min=eps))
    v = _wide(variance)
    for index in range(int(count.max().item())):
        now = start - size * torch.clamp(count - 1, max=index)
        after = start - size * torch.clamp(count, max=index + 1)
        step = _wide(torch.where(index < count, after - now, torch.zeros_like(now)))
        t = _wide(now.clamp(min=eps))
        zeta = ((1 - t) / t).square() - ((1 - s) / s).square()
        nu = (1 - t) / t.square() * x - (1 - s) / s.square() * x_src
        denominator = (v * zeta + 1).clamp(min=eps)
        wide = nu.unsqueeze(1)
        inner = (means * (wide - 0.5 * zeta.unsqueeze(1) * means)).sum(2)
        weights = (logweights + inner / denominator).softmax(1).unsqueeze(2)
        x0 = (v * nu + (weights * means).sum(1)) / denominator
        x = x + step * (x - x0) / t
    return x
