"""pi-Flow in JAX: few-step image generation by policy-based imitation distillation.

The names below are what a notebook needs; each is imported when it is first used.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "DXPolicy": "piflow_jax.flow.policies",
    "DiT": "piflow_jax.models",
    "GMFlowPolicy": "piflow_jax.flow.policies",
    "GMOutput": "piflow_jax.flow.policies",
    "Schedule": "piflow_jax.flow.teacher",
    "Teacher": "piflow_jax.flow.teacher",
    "TimeWarp": "piflow_jax.flow.schedule",
    "Student": "piflow_jax.student",
    "check_teacher": "piflow_jax.diagnostics.teacher",
    "few_step_sample": "piflow_jax.flow.sampling",
    "imitation_loss": "piflow_jax.flow.imitation",
    "load": "piflow_jax.loading",
    "load_teacher": "piflow_jax.loading",
    "load_torch_state": "piflow_jax.convert",
    "ode_sample": "piflow_jax.flow.sampling",
    "rollout": "piflow_jax.flow.rollout",
    "sample_intervals": "piflow_jax.flow.imitation",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'piflow_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
