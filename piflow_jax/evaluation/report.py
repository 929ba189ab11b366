"""The report: systems compared on the same noise and labels, as table, JSON and picture."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from piflow_jax.evaluation.evaluator import Figures
from piflow_jax.evaluation.floor import Floor
from piflow_jax.whole_files import write_json

__all__ = ["Report", "Row"]

_NO_MEASURE = "where figures are taken there, they do not measure it"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One system in a report.

    Attributes:
      system: its name, such as `teacher`.
      nfe: network evaluations per sample.
      figures: its measured figures.
      endpoint_mse: mean squared distance of its (unclipped) endpoints from those of the teacher at
        its largest number of evaluations; None for that system itself.
      seconds: sampling time in seconds, without compilation.
      pixel_frechet: Frechet distance in the principal components of the real images' pixels, a
        second judge; None where these are the figures' own space.
    """

    system: str
    nfe: int
    figures: Figures
    endpoint_mse: float | None
    seconds: float
    pixel_frechet: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """A comparison with its protocol.

    Attributes:
      rows: the systems.
      data_diversity: the real data's own diversity.
      floor: one half of the real data against the other.
      protocol: everything that the figures depend on.
    """

    rows: Sequence[Row]
    data_diversity: float
    floor: Floor
    protocol: dict[str, Any]

    def find(self, system: str, nfe: int) -> Row:
        """The row of a system at a number of evaluations.

        Args:
          system: Its name.
          nfe: Network evaluations per sample.

        Returns:
          The first such row.

        Raises:
          KeyError: There is no such row.
        """
        for row in self.rows:
            if (row.system, row.nfe) == (system, nfe):
                return row
        raise KeyError(f"no row for {system} at {nfe} NFE")

    def write(self, path: str | os.PathLike) -> None:
        """Writes the report as JSON to `path`; an existing file is replaced atomically."""
        write_json(epath.Path(path), dataclasses.asdict(self))

    def table(self) -> str:
        """The report for people, in fixed-width columns that are also Markdown; names the space."""
        trained = self.protocol.get("trained_on", ())
        names = {"frechet": "Frechet", "pixel_frechet": "Frechet of pixels"}
        names |= {name: f"{names[name]} (trained on)" for name in trained}
        head = ("system", "NFE", names["frechet"], "precision", "recall", "diversity")
        head += (names["pixel_frechet"], "endpoint", "sec")

        def shown(figures, diversity):
            shares = (f"{value:.3f}" for value in (figures.precision, figures.recall))
            return f"{figures.frechet:.3f}", *shares, f"{diversity:.2f}"

        cells = [head]
        for row in self.rows:
            figures = shown(row.figures, row.figures.diversity)
            more = (_shown(row.pixel_frechet, 3), _shown(row.endpoint_mse, 4))
            cells.append((row.system, str(row.nfe), *figures, *more, f"{row.seconds:.1f}"))
        floor = shown(self.floor, self.data_diversity)
        cells.append(("data, half against half", "-", *floor, "-", "-", "-"))
        widths = [max(map(len, column)) for column in np.transpose(cells).tolist()]

        def line(row):
            first = row[0].ljust(widths[0])
            rest = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
            return f"| {' | '.join([first, *rest])} |"

        rule = "| " + " | ".join("-" * width for width in widths) + " |"
        space = (
            f"features: {self.protocol['features']}, sha256 {self.protocol['features_sha256']}; "
            "figures compare only within these"
        )
        lines = [line(head), rule, *map(line, cells[1:]), "", space]
        if trained:
            spaces = "; ".join(self.protocol["trained_in"])
            lines.append(f"the student was trained on distances in {spaces}: {_NO_MEASURE}")
        return "\n".join(lines)


def _shown(value: float | None, decimals: int) -> str:
    return "-" if value is None else f"{value:.{decimals}f}"
