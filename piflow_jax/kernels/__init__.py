"""Fused rollouts of Gaussian-mixture policies: pure array programs, independent of policies.

The differential equation of each site is independent of the others, so a block of sites can take
all its substeps while its mixture stays on chip. `mixture_rollout` picks the program by platform.

Source: the GMFlow policy of pi-Flow (arXiv 2510.14974, Sec. 3.2) and its rollout (Alg. 1), with the
formulas of `piflow_jax.flow.policies.GMFlowPolicy`.
"""

from piflow_jax.kernels.recurrence import Recurrence
from piflow_jax.kernels.rollout import mixture_rollout

__all__ = ["Recurrence", "mixture_rollout"]
