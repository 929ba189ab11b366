"""The modes of the command line, one module each."""

from piflow_jax.modes.command import MODES, run

__all__ = ["MODES", "run"]
