"""Training: state, optimiser, losses and steps."""
