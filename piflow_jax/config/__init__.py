"""Configurations: one schema, checked before anything is compiled.

`configs/*.py` fill an `ml_collections.ConfigDict` made by `base_config`; `parse` turns it into
frozen dataclasses, or refuses it with the key and the allowed range. Each field's metadata is its
documentation; `python -m piflow_jax.config` prints `docs/configuration.md`.
"""

from piflow_jax.config.correctors import CorrectorConfig
from piflow_jax.config.networks import ModelConfig, NetworkConfig
from piflow_jax.config.optimizers import OptimizerConfig
from piflow_jax.config.parsing import (
    ConfigError,
    base_config,
    check_devices,
    check_group,
    check_variant,
    key_types,
    mesh_sizes,
    naming,
    nearest,
    parse,
)
from piflow_jax.config.schema import (
    Config,
    DataConfig,
    EvaluationConfig,
    MeshConfig,
    PolicyConfig,
    ProcessesConfig,
    RivalsConfig,
    TeacherConfig,
    TrainConfig,
)

__all__ = [
    "Config",
    "ConfigError",
    "CorrectorConfig",
    "DataConfig",
    "EvaluationConfig",
    "MeshConfig",
    "ModelConfig",
    "NetworkConfig",
    "OptimizerConfig",
    "PolicyConfig",
    "ProcessesConfig",
    "RivalsConfig",
    "TeacherConfig",
    "TrainConfig",
    "base_config",
    "check_devices",
    "check_group",
    "check_variant",
    "key_types",
    "mesh_sizes",
    "naming",
    "nearest",
    "parse",
]
