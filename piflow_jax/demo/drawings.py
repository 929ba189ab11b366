"""What a drawing of the page is: values, without how they are made or shown."""

import dataclasses
from typing import Any

import jax
import numpy as np

from piflow_jax.demo.paths import Way


@dataclasses.dataclass(frozen=True)
class Row:
    """What one system made of the noise.

    Attributes:
      system: `student` or `teacher`.
      evaluations: of its network.
      samples: `[N, *sites, C]`, or `[N, F, *sites, C]` of a morph.
      pictures: the same in [-1, 1], with one channel or three.
      seconds: that it took, without compilation.
      guidance: scale of the classifier-free guidance; 1 is none.
    """

    system: str
    evaluations: int
    samples: np.ndarray
    pictures: np.ndarray
    seconds: float
    guidance: float = 1.0

    @property
    def said(self) -> str:
        """Such as `teacher, 32 evaluations, guidance 2`."""
        guided = "" if self.guidance == 1 else f", guidance {self.guidance:g}"
        return f"{self.system}, {plural(self.evaluations)}{guided}"

    def folded(self, many: int, frames: int) -> "Row":
        """The same with an axis of frames, of samples that are `many` times `frames`."""
        samples, pictures = (
            a.reshape(many, frames, *a.shape[1:]) for a in (self.samples, self.pictures)
        )
        return dataclasses.replace(self, samples=samples, pictures=pictures)


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A picture of the page.

    Attributes:
      names: of its columns.
      rows: the student, and its teacher where there is one.
      notes: sentences on what the student was not trained for.
      facts: what it was made of.
      as_trained: the student's row with as many evaluations as it was trained for, where it was
        asked for others.
    """

    names: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    facts: dict[str, Any]
    as_trained: Row | None = None

    def distance(self, row: Row) -> float | None:
        """Mean squared distance of a row's samples from the teacher's; None without a teacher."""
        teachers = [other for other in self.rows if other.system == "teacher"]
        if not teachers:
            return None
        return float(np.mean(np.square(row.samples - teachers[0].samples)))


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """One sample's way from noise to data.

    Attributes:
      name: of its class.
      taus: raw times `[F]`.
      levels: their noise levels.
      ways: `(system, evaluations, way)`, whose states are pictures `[F, H, W, 1 or 3]`.
      facts: what it was made of.
    """

    name: str
    taus: np.ndarray
    levels: np.ndarray
    ways: tuple[tuple[str, int, Way], ...]
    facts: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Batch:
    """Samples that are asked for.

    Attributes:
      names: of the samples.
      condition: labels `[N]` or embedded prompts; None without conditions.
      noise: `float32[N, *sites, C]`.
    """

    names: tuple[str, ...]
    condition: Any
    noise: np.ndarray

    @property
    def arrays(self) -> Any:
        """The condition on the host, as programs take it."""
        return jax.tree.map(np.asarray, self.condition)


def plural(evaluations: int) -> str:
    """Such as `1 evaluation` and `2 evaluations`."""
    return f"{evaluations} evaluation{'s' * (evaluations != 1)}"
