"""The command line of the page."""

import argparse
import socket
from importlib.util import find_spec

from piflow_jax.demo.drawer import Drawer
from piflow_jax.demo.page import make_page
from piflow_jax.demo.server import serve
from piflow_jax.loading import shipped_names
from piflow_jax.runs.checkpoint import CheckpointError


def main(arguments: list[str] | None = None) -> None:
    """Serves the page until it is interrupted.

    Args:
      arguments: of the command line, without the program's name.
    """
    shipped = shipped_names()
    parser = argparse.ArgumentParser(
        prog="python -m piflow_jax.demo",
        description="A page that shows a student next to its teacher.",
    )
    parser.add_argument(
        "--checkpoint",
        action="append",
        help="what piflow_jax.load takes; given several times, the page has all of them"
        + (f"; by default {', '.join(shipped)}" if shipped else ""),
        required=not shipped,
    )
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 serves other machines too")
    parser.add_argument(
        "--origin",
        action="append",
        default=[],
        help="whose pages may call this one too, such as https://example.org; * is any",
    )
    parser.add_argument("--prompts", help="prepared prompts, for a student that reads text")
    parser.add_argument("--teacher", help="weights of its teacher, or the run that has them")
    parser.add_argument("--vae", help="the autoencoder of its latents")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="the network's compute dtype",
    )
    flags = parser.parse_args(arguments)
    if find_spec("gradio") is None:
        parser.error('the page needs Gradio: pip install -e ".[demo]"')
    try:  # before what may take minutes
        with socket.socket(socket.AF_INET6 if ":" in flags.host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((flags.host, flags.port))
    except (OSError, OverflowError) as error:
        parser.error(f"cannot listen at {flags.host}, port {flags.port} ({error}): pass another")
    given = {name: getattr(flags, name) for name in ("teacher", "prompts", "vae", "dtype")}
    try:
        students = [Drawer.load(path, **given) for path in flags.checkpoint or shipped]
        page = make_page(*students)
    except (CheckpointError, FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    serve(page, flags.host, flags.port, origins=flags.origin)
