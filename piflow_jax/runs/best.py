"""The best checkpoint so far, beside the latest ones."""

import contextlib
import json
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from piflow_jax.runs.checkpoint import Checkpointer, CheckpointError
from piflow_jax.runs.workdir import user_path
from piflow_jax.whole_files import write_json


class BestCheckpoint(contextlib.AbstractContextManager):
    """Keeps the checkpoint with the smallest distance; use it as a context manager.

    `best.json` next to the checkpoints has this distance, so a continued run compares with it. A
    run that continues after a kill repeats some steps. If one of them is better, it replaces a best
    checkpoint of the same step or a later one.

    Args:
      directory: where the checkpoints go.
      measured: settings that distances depend on, and that a continued run may change.

    Attributes:
      checkpointer: what saves them.

    Raises:
      CheckpointError: `best.json` is damaged, its distance was measured with other settings, or
        checkpoints cannot be written.
    """

    def __init__(self, directory: str | os.PathLike, measured: Mapping[str, Any]):
        self.checkpointer = Checkpointer(directory, keep=1, rewind=True)
        self._record = user_path(directory).parent / "best.json"
        self._distance, self._measured = float("inf"), dict(measured)
        # A run may be killed after it removes a best checkpoint and before it saves a better one.
        # The record is then alone and does not count.
        if self.checkpointer.latest_step() is not None and self._record.exists():
            try:
                record = json.loads(self._record.read_text(encoding="utf-8"))
                self._distance = float(record["distance"])
                if math.isnan(self._distance):  # nothing would be better than it
                    raise ValueError("its distance is nan")
                before = dict(record.get("measured", {}))  # older records have none
            except (OSError, RecursionError, ValueError, KeyError, TypeError) as error:
                raise CheckpointError(
                    f"{self._record} is damaged ({error!r}); remove it to start the comparison anew"
                ) from error
            self._check(before)

    def _check(self, before: Mapping[str, Any]) -> None:
        for key, value in self._measured.items():
            if before.get(key, value) != value:
                raise CheckpointError(
                    f"{self._record} has a distance that was measured with {key} = "
                    f"{before[key]!r}, which is {value!r} now, so later ones cannot be compared "
                    f"with it. Set it back, or move {self._record.parent} away to start the "
                    "comparison anew"
                )

    def __exit__(self, kind, value, traceback) -> None:
        """Closes."""
        self.checkpointer.__exit__(kind, value, traceback)

    def offer(
        self,
        step: int,
        distance: float,
        save: Callable[[Checkpointer, Callable[[], None]], object],
    ) -> bool:
        """Keeps a state if it is better than what is there, in the background.

        Args:
          step: its step.
          distance: smaller is better.
          save: saves it to the checkpointer that it is given, and `then` calls its other argument.

        Returns:
          Whether it was kept.
        """
        # Processes may have measured a little differently; the first one decides.
        better = distance < self._distance
        if not multihost_utils.broadcast_one_to_all(np.asarray(better)):
            return False

        def then():
            if jax.process_index() == 0:
                record = {"step": step, "distance": distance, "measured": self._measured}
                write_json(self._record, record)

        save(self.checkpointer, then)
        self._distance = distance
        return True
