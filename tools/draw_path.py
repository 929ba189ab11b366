"""Draws one sample's way from noise to data as an animation, as the page does.

    python tools/draw_path.py runs/digits docs/images/digits_path.webp --label=3

The student is above its teacher, and each state is left of the `x_0` that it heads for.
"""

import argparse
from pathlib import Path

from piflow_jax.demo import Drawer
from piflow_jax.demo.page import drawn
from piflow_jax.demo.views import film_of


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="work directory of a run")
    parser.add_argument("out", type=Path, help="the WebP file")
    parser.add_argument("--label", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--teacher_nfe", type=int, default=32)
    flags = parser.parse_args(arguments)
    drawer = Drawer.load(flags.run)
    path = drawer.path(flags.label, flags.seed, drawer.nfe, flags.teacher_nfe)
    flags.out.write_bytes(film_of(drawn(path)))


if __name__ == "__main__":
    main()
