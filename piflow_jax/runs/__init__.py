"""A run and its directory: the loop, checkpoints, metrics, signals and the lock."""
