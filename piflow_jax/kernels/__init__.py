"""Fused rollouts of Gaussian-mixture policies: pure array programs that know nothing of policies.

Every site's differential equation is independent of the others, so a block of sites can take all
its substeps while its mixture stays on chip. `mixture_rollout` picks the program by platform.
"""

from piflow_jax.kernels.recurrence import Recurrence
from piflow_jax.kernels.rollout import mixture_rollout

__all__ = ["Recurrence", "mixture_rollout"]
