"""pi-Flow in JAX: few-step image generation by policy-based imitation distillation."""

__version__ = "0.1.0"
