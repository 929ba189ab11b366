"""`python -m piflow_jax.main --config=configs/digits.py --workdir=runs/digits`."""

import logging as std_logging
import os
import sys

# Before JAX and TensorFlow are loaded: their start-up chatter is not for the reader of a run.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

from absl import app, flags, logging

from piflow_jax import modes
from piflow_jax.config import ConfigError
from piflow_jax.config.command_line import load_config, override

_CONFIG = flags.DEFINE_string(
    "config",
    None,
    "Config file, such as configs/digits.py, or the name of one that ships with the package, such "
    "as digits; with a variant, digits:dx. "
    "--config.KEY=VALUE overrides one of its keys.",
    required=True,
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "The run's directory; a run there is continued.", required=True
)
_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    list(modes.MODES),
    "train: teacher if none is given, student, report. evaluate: the report again. "
    "sample: a grid of the student's samples, or a picture of each prompt. export: weights under "
    "official names. prepare: cached latents or prompts. statistics: a reference for FID. "
    "features: the space in which samples are measured. "
    "compile, compile_sampling: the step or the sampler for config.topology, ahead of time. "
    "rivals: methods at equal compute.",
)
_PROMPTS = flags.DEFINE_string(
    "prompts", None, "List of prompts to sample or to prepare; short for --config.data.prompts."
)


def main(argv: list[str]) -> int:
    """Runs the mode; words that are no flags override keys. Returns the exit status."""
    logging.set_verbosity(logging.INFO)
    std_logging.getLogger("jax._src.xla_bridge").setLevel(std_logging.WARNING)  # absent backends
    logging.get_absl_handler().setFormatter(std_logging.Formatter("%(message)s"))
    words = argv[1:]
    if _PROMPTS.value is not None:
        words.append(f"--config.data.prompts={_PROMPTS.value}")
    try:
        config = load_config(_CONFIG.value)
        override(config, words, known_flags=flags.FLAGS)
    except ConfigError as error:
        return _refuse(error)
    return modes.run(_MODE.value, config, _WORKDIR.value)


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the flags that are no keys of the config, and returns the other words."""
    flags.FLAGS.set_gnu_getopt(True)  # flags may follow what is none of them
    try:
        return flags.FLAGS(argv, known_only=True)
    except (flags.Error, ValueError) as error:
        sys.exit(_refuse(f"--flagfile: {error}" if isinstance(error, UnicodeError) else error))


def _refuse(error: Exception | str) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


def run() -> None:
    """Parses the command line and runs `main`."""
    app.run(main, flags_parser=parse_flags)


if __name__ == "__main__":
    run()
