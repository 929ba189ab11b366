"""pi-Flow (arXiv 2510.14974) and its rivals: the table of methods for comparison.

A method is a file in this folder, with its loss, its step and its row, and an entry in `METHODS`.
Times are ours, `t = 1` for noise and `t = 0` for data, whatever a paper uses.
"""

import dataclasses
import math

from piflow_jax.config import nearest
from piflow_jax.rivals.base import Method, Rival
from piflow_jax.rivals.consistency import CONSISTENCY
from piflow_jax.rivals.distribution_matching import DMD
from piflow_jax.rivals.meanflow import MEANFLOW
from piflow_jax.rivals.parallel_decoding import PDD
from piflow_jax.rivals.piflow import ARC, GM
from piflow_jax.rivals.reflow import REFLOW, REGRESSION
from piflow_jax.rivals.shortcut import SHORTCUT

__all__ = ["CREDIT", "METHODS", "RATE", "Method", "Rival", "find_method"]

_ROWS = (GM, ARC, MEANFLOW, SHORTCUT, CONSISTENCY, REFLOW, REGRESSION, DMD, PDD)
METHODS: dict[str, Method] = {row.name: row for row in _ROWS}
# A suffix of a method's name: the method's budget also includes the teacher's training.
CREDIT = "+teacher"
# Behind a method's name, before a factor of its learning rate.
RATE = "@"


def find_method(name: str) -> Method:
    """Looks up the row of a method.

    Args:
      name: a key of `METHODS`, or a key with an ending that its row knows, such as `gm_2nfe`; with
        or without the suffix `CREDIT`, and `RATE` with a factor of the learning rate at the end:
        `meanflow+teacher@0.3`.

    Returns:
      The row.

    Raises:
      ValueError: there is no such method, or the factor is not a positive number; the message lists
        the methods and suggests the nearest.
    """
    called, rate, factor = name.partition(RATE)
    alone = called.removesuffix(CREDIT)
    rows = [METHODS.get(alone)]
    rows += [row.variant(alone.removeprefix(f"{key}_")) for key, row in METHODS.items()]
    for row in rows:
        if row is not None and row.name == alone:
            scaled = row.rate * _factor(name, factor) if rate else row.rate
            return dataclasses.replace(row, credit=called != alone, rate=scaled)
    known = [*METHODS, *(f"{key}_{end}" for key, row in METHODS.items() for end in row.endings)]
    raise ValueError(
        f"there is no {name!r}{nearest(alone, known)}; there are {', '.join(known)} and the like, "
        f"each with {CREDIT!r} behind it or not"
    )


def _factor(name: str, text: str) -> float:
    try:
        factor = float(text)
    except ValueError:
        factor = math.nan
    if not 0 < factor < math.inf:
        raise ValueError(
            f"{name!r} has {text!r} behind {RATE!r}: put a positive number there, the factor of "
            "its learning rate"
        )
    return factor
