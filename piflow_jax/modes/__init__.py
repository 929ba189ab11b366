"""The modes of the command line, one module each."""

from piflow_jax.modes.adm import write_reference
from piflow_jax.modes.command import MODES, run
from piflow_jax.modes.compile import compile_sampling, compile_step
from piflow_jax.modes.evaluate import evaluate
from piflow_jax.modes.evaluate_prompts import evaluate_images
from piflow_jax.modes.export import export
from piflow_jax.modes.features import make_features
from piflow_jax.modes.prepare import prepare_latents
from piflow_jax.modes.prepare_images import prepare_pixels
from piflow_jax.modes.prepare_prompts import prepare_prompts
from piflow_jax.modes.rivals import compare_rivals
from piflow_jax.modes.sample import sample
from piflow_jax.modes.train import train

__all__ = [
    "MODES",
    "compare_rivals",
    "compile_sampling",
    "compile_step",
    "evaluate",
    "evaluate_images",
    "export",
    "make_features",
    "prepare_latents",
    "prepare_pixels",
    "prepare_prompts",
    "run",
    "sample",
    "train",
    "write_reference",
]
