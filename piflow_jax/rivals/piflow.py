"""pi-Flow's own entries: students with a given policy, number of evaluations and loss.

pi-ID trains them like the run's student (arXiv 2510.14974; ArcFlow, arXiv 2602.09014). A name
consists of the policy, the number of evaluations and the loss: `gm_2nfe_timed`, `gm_corrected`.
"""

from piflow_jax.rivals.base import Method

__all__ = ["ARC", "GM"]

# Weights of the pi-ID loss by the ending of a method's name. Only `plain` is in its paper; without
# an ending, the weight is the run's.
_NONE = {"train.adaptive_power": 0.0, "train.time_power": 0.0, "train.state_power": 0.0}
WEIGHTS = {
    "plain": _NONE,
    "adaptive": {"train.adaptive_power": 1.0},
    "timed": {"train.time_power": 1.0},
    "timed2": {"train.time_power": 2.0},
    "drawn": _NONE | {"train.state_power": 1.0},
}
# The marginal corrector from the first step on, with the optimiser that the run's settings name.
LOSSES = WEIGHTS | {
    "corrected": {"train.corrector.kind": "critic", "train.corrector.share": 0.5},
}


def _student(kind: str, title: str, words: tuple[str, ...] = ()) -> Method | None:
    """The student of a policy and of the endings of its name."""
    loss = words[-1] if words and words[-1] in LOSSES else ""
    counts = words[:-1] if loss else words
    nfe, unit, rest = (counts[0] if counts else "1nfe").partition("nfe")
    if len(counts) > 1 or not nfe.isdecimal() or int(nfe) < 1 or not unit or rest:
        return None
    return Method(
        name="_".join([kind, *words]),
        title=f"{title}, {loss}" if loss else title,
        given="teacher",
        settings={"policy.kind": kind, "train.nfe": int(nfe)} | LOSSES.get(loss, {}),
        # A weight of the loss takes no measurable time.
        timed_as="_".join([kind, *(counts if loss in WEIGHTS else words)]),
        endings=("2nfe", *LOSSES),
        variant=lambda ending: _student(kind, title, tuple(ending.split("_"))),
    )


GM = _student("gm", "**pi-Flow, GM**")
ARC = _student("arc", "ArcFlow, by pi-ID")
