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
    "base_config": "piflow_jax.config",
    "check_teacher": "piflow_jax.diagnostics.teacher",
    "data": "piflow_jax.data",
    "distill": "piflow_jax.distillation.own",
    "few_step_sample": "piflow_jax.flow.sampling",
    "imitation_loss": "piflow_jax.flow.imitation",
    "load": "piflow_jax.loading",
    "load_exported": "piflow_jax.exported",
    "load_teacher": "piflow_jax.loading",
    "load_torch_state": "piflow_jax.convert",
    "ode_sample": "piflow_jax.flow.sampling",
    "policy_outputs": "piflow_jax.systems.policies",
    "rollout": "piflow_jax.flow.rollout",
    "sde_sample": "piflow_jax.flow.sampling",
    "sample_intervals": "piflow_jax.flow.imitation",
    "train_teacher": "piflow_jax.distillation.own",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'piflow_jax' has no attribute {name!r}")
    home = importlib.import_module(_HOMES[name])
    return home if _HOMES[name] == f"piflow_jax.{name}" else getattr(home, name)


def __dir__() -> list[str]:
    return sorted(__all__)
