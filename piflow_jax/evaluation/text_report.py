"""The report of pictures made from prompts: figures, and the protocol that they depend on.

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
    """Figures of a student's pictures; None where what they need was not given.

    Attributes:
      teacher_fid: Frechet distance to the teacher's pictures, whole ones resized.
      patch_fid: Frechet distance to the teacher's pictures, of central patches.
      clip: Mean cosine of picture and prompt.
      teacher_clip: The same of the teacher's pictures.
      diversity: Mean dissimilarity of two pictures of one prompt.
      teacher_diversity: The same of the teacher's pictures.
      protocol: All that the figures depend on.
    """

    teacher_fid: float | None = None
    patch_fid: float | None = None
    clip: float | None = None
    teacher_clip: float | None = None
    diversity: float | None = None
    teacher_diversity: float | None = None
    protocol: dict[str, Any]

    def table(self) -> str:
        """The figures that there are, one a line; FID only if the features are the published."""
        published = self.protocol.get("inception", {}).get("published")
        fid = "FID" if published else "Frechet distance"
        figures = [(title.format(fid=fid), getattr(self, name)) for name, title in _TITLES.items()]
        return "\n".join(
            f"{title:32}{value:10.4f}" for title, value in figures if value is not None
        )

    def write(self, path: str | os.PathLike) -> None:
        """Writes the report as JSON, as a whole or not at all.

        Args:
          path: The file; one that exists is replaced.
        """
        write_json(epath.Path(path), dataclasses.asdict(self))
