"""What the command line does: train, evaluate, sample. The only rooms that touch the disk."""

from piflow_jax.stages.evaluate import evaluate
from piflow_jax.stages.sample import sample
from piflow_jax.stages.train import train

__all__ = ["evaluate", "sample", "train"]
