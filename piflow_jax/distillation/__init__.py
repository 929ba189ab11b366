"""Distillation: the stages of a run, what is seen of them, and `piflow_jax.distill`."""
