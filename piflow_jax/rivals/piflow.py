"""pi-Flow's own entries in the comparison: students of a policy, a number of evaluations, a loss.

pi-ID trains them as it trains the run's student (arXiv 2510.14974; ArcFlow, arXiv 2602.09014). A
name is that of the policy with both others behind it: `gm_2nfe_timed`.
"""

from piflow_jax.rivals.base import Method

__all__ = ["ARC", "GM", "WEIGHTS"]

# Weights of pi-ID that are no part of its paper, by the end of a method's name.
WEIGHTS = {"adaptive": {"train.adaptive_power": 1.0}, "timed": {"train.time_power": 1.0}}


def _student(kind: str, title: str, words: tuple[str, ...] = ()) -> Method | None:
    """The student of a policy and of the words behind its name."""
    weight = words[-1] if words and words[-1] in WEIGHTS else ""
    counts = words[:-1] if weight else words
    nfe, unit, rest = (counts[0] if counts else "1nfe").partition("nfe")
    if len(counts) > 1 or not nfe.isdecimal() or int(nfe) < 1 or not unit or rest:
        return None
    return Method(
        name="_".join([kind, *words]),
        title=f"{title}, {weight}" if weight else title,
        given="teacher",
        settings={"policy.kind": kind, "train.nfe": int(nfe)} | WEIGHTS.get(weight, {}),
        # A weight of the loss costs nothing that a clock would show.
        timed_as="_".join([kind, *counts]),
        endings=("2nfe", *WEIGHTS),
        variant=lambda ending: _student(kind, title, tuple(ending.split("_"))),
    )


GM = _student("gm", "**pi-Flow, GM**")
ARC = _student("arc", "pi-Flow, ArcFlow")
