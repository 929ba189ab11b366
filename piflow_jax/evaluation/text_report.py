"""The report on pictures made from prompts: figures, and the protocol that they depend on.

Source: the figures of pi-Flow's text-to-image tables (arXiv 2510.14974, section 5.2).
"""

import dataclasses
import os
from typing import Any

from etils import epath

from piflow_jax.whole_files import write_json

__all__ = ["TextReport"]

_TITLES = {
    "teacher_fid": "teacher {fid}",
    "patch_fid": "teacher patch {fid}",
    "clip": "CLIP similarity",
    "teacher_clip": "CLIP similarity of the teacher",
    "diversity": "diversity",
    "teacher_diversity": "diversity of the teacher",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextReport:
    """Figures of a student's pictures; None if their inputs were not given.

    Attributes:
      teacher_fid: Frechet distance to the teacher's pictures, resized as a whole.
      patch_fid: Frechet distance to the teacher's pictures, on central patches.
      clip: Mean cosine between picture and prompt.
      teacher_clip: The same for the teacher's pictures.
      diversity: Mean dissimilarity of two pictures of the same prompt.
      teacher_diversity: The same for the teacher's pictures.
      protocol: Everything that the figures depend on.
    """

    teacher_fid: float | None = None
    patch_fid: float | None = None
    clip: float | None = None
    teacher_clip: float | None = None
    diversity: float | None = None
    teacher_diversity: float | None = None
    protocol: dict[str, Any]

    def table(self) -> str:
        """The available figures, one per line; called FID only with the published features."""
        published = self.protocol.get("inception", {}).get("published")
        fid = "FID" if published else "Frechet distance"
        figures = [(title.format(fid=fid), getattr(self, name)) for name, title in _TITLES.items()]
        return "\n".join(
            f"{title:32}{value:10.4f}" for title, value in figures if value is not None
        )

    def write(self, path: str | os.PathLike) -> None:
        """Writes the report as JSON, completely or not at all.

        Args:
          path: The file; an existing one is replaced.
        """
        write_json(epath.Path(path), dataclasses.asdict(self))
