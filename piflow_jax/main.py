"""`python -m piflow_jax.main --config=configs/digits.py --workdir=runs/digits`."""

import logging as std_logging
import os
import sys

# Before JAX and TensorFlow are loaded: their start-up chatter is not for the reader of a run.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

from absl import app, flags, logging
from ml_collections import config_flags

from piflow_jax import stages

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, such as configs/digits.py.")
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's directory; a run there is continued.")
_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    list(stages.MODES),
    "train: teacher if none is given, student, report. evaluate: the report again. "
    "sample: a grid of the student's samples, or a picture of each prompt. export: weights under "
    "official names. prepare: cached latents or prompts. statistics: a reference for FID. "
    "compile, compile_sampling: the step or the sampler for config.topology, ahead of time.",
)
_PROMPTS = flags.DEFINE_string(
    "prompts", None, "List of prompts to sample or to prepare; short for --config.data.prompts."
)


def main(argv: list[str]) -> int:
    """Runs the mode and returns the exit status."""
    if len(argv) > 1:
        settings = "settings are --config.key=value"
        print(f"error: unexpected arguments {argv[1:]}; {settings}", file=sys.stderr)
        return 2
    logging.set_verbosity(logging.INFO)
    std_logging.getLogger("jax._src.xla_bridge").setLevel(std_logging.WARNING)  # absent backends
    logging.get_absl_handler().setFormatter(std_logging.Formatter("%(message)s"))
    if _PROMPTS.value is not None:
        _CONFIG.value.data.prompts = _PROMPTS.value
    return stages.run(_MODE.value, _CONFIG.value, _WORKDIR.value)


def _parse_flags(argv: list[str]) -> list[str]:
    """absl's parser, with a line instead of a traceback for an unknown key of the config."""
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError) as error:
        keys = [flag.split("=")[0][2:] for flag in argv if flag.startswith("--config.")]
        if not keys:  # the config file itself is at fault: its author needs the traceback
            raise
        reason = " ".join(str(error).replace("\\n", " ").replace("\\'", "").strip("\"'").split())
        print(f"error: cannot override {' or '.join(keys)}: {reason}", file=sys.stderr)
        sys.exit(2)


def run() -> None:
    """Parses the flags and runs `main`."""
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=_parse_flags)


if __name__ == "__main__":
    run()
