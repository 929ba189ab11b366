"""The schema of optimisers."""

import dataclasses

from piflow_jax.config.fields import config_field as _field


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimiser. After its warm-up, gradient clipping and a Karras EMA begin."""

    kind: str = _field(
        "adamw",
        "update rule; muon updates the matrices of the blocks, and adamw the rest",
        choices=("adamw", "muon"),
    )
    learning_rate: float = _field(1e-3, "peak learning rate", above=0)
    warmup_steps: int = _field(
        100, "steps of linear warm-up; clipping and EMA start at their end", low=0
    )
    decay: str = _field(
        "constant",
        "decay of the learning rate after warm-up; cosine and linear end at 2% of the peak",
        choices=("constant", "cosine", "linear"),
    )
    growth_rate_scale: float = _field(
        1.0,
        "factor of the learning rate for the layer that predicts the rates of growth (arc)",
        above=0,
        low=1e-6,
        most=1e3,
    )
    moment_dtype: str = _field(
        "float32", "dtype of the first moment", choices=("float32", "bfloat16")
    )
    beta1: float = _field(0.9, "Adam's first decay rate", low=0, high=0.9999)
    beta2: float = _field(0.95, "Adam's second decay rate", low=0, high=0.99999)
    weight_decay: float = _field(0.0, "decoupled weight decay", low=0)
    grad_clip: float = _field(50.0, "largest global norm of the gradient; 0 does not clip", low=0)
    ema_gamma: float = _field(
        7.0, "gamma of the Karras EMA; larger means a shorter average", above=0, most=1e6
    )
