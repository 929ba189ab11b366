"""Distillation: the stages of a run, their looks at samples, and `piflow_jax.distill`."""
