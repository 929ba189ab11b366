"""The segments that a student is trained on (paper, Sec. 3.1)."""

from piflow_jax.config import TrainConfig
from piflow_jax.flow.schedule import Segments


def said_evaluations(train: TrainConfig) -> str:
    """The numbers of evaluations that the student is trained for, such as `1, 2 or 4`."""
    *others, last = map(str, train.evaluations)
    return f"{', '.join(others)} or {last}" if others else last


def longest_segment(train: TrainConfig) -> float:
    """Raw-time length of the longest segment that the student is trained on, at most 1."""
    return max(segments.longest for segments in _trained(train))


def shortest_segment(train: TrainConfig) -> float:
    """Raw-time length of the shortest segment that the student is trained on."""
    return min(segments.shortest for segments in _trained(train))


def _trained(train: TrainConfig) -> list[Segments]:
    return [Segments(nfe, train.final_step_size_scale) for nfe in train.evaluations]
