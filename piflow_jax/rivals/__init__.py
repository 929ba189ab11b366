"""pi-Flow (arXiv 2510.14974) and its rivals: the table of the methods that can be compared.

A method is a file of this folder, with its loss, its step and its row, and a place in `METHODS`.
Times are ours: `t = 1` is noise and `t = 0` data, whatever a paper has.
"""

import dataclasses

from piflow_jax.config import nearest
from piflow_jax.rivals.base import Method, Rival
from piflow_jax.rivals.consistency import CONSISTENCY
from piflow_jax.rivals.distribution_matching import DMD
from piflow_jax.rivals.meanflow import MEANFLOW
from piflow_jax.rivals.parallel_decoding import PDD
from piflow_jax.rivals.piflow import ARC, GM
from piflow_jax.rivals.reflow import REFLOW, REGRESSION
from piflow_jax.rivals.shortcut import SHORTCUT

__all__ = ["CREDIT", "METHODS", "Method", "Rival", "find_method"]

_ROWS = (GM, ARC, MEANFLOW, SHORTCUT, CONSISTENCY, REFLOW, REGRESSION, DMD, PDD)
METHODS: dict[str, Method] = {row.name: row for row in _ROWS}
# Behind a method's name: the teacher's training is added to its budget.
CREDIT = "+teacher"


def find_method(name: str) -> Method:
    """The row of a method.

    Args:
      name: a key of `METHODS`, or one with an ending that its row knows, such as `gm_2nfe`; with
        `CREDIT` behind it or not.

    Returns:
      The row.

    Raises:
      ValueError: there is no such method; the message names those that there are, and the nearest.
    """
    alone = name.removesuffix(CREDIT)
    rows = [METHODS.get(alone)]
    rows += [row.variant(alone.removeprefix(f"{key}_")) for key, row in METHODS.items()]
    for row in rows:
        if row is not None and row.name == alone:
            return dataclasses.replace(row, credit=name != alone)
    known = [*METHODS, *(f"{key}_{end}" for key, row in METHODS.items() for end in row.endings)]
    raise ValueError(
        f"there is no {name!r}{nearest(alone, known)}; there are {', '.join(known)} and the like, "
        f"each with {CREDIT!r} behind it or not"
    )
