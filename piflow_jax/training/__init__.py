"""Training: state, optimiser, steps, the loop, checkpoints and metrics."""
