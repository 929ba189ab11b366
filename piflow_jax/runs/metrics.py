"""Where a run's numbers go: TensorBoard event files, a JSON-lines file, and the console.

Events are written on the writer's own thread, while the training step compiles; an error there is
raised by the next call. Make a writer after your own imports, not between them.
"""

import collections
import contextlib
import errno
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from piflow_jax.progress import clock, live_line
from piflow_jax.runs.spool import Spool
from piflow_jax.runs.steps import cause
from piflow_jax.runs.workdir import user_path
from piflow_jax.whole_files import replacing, visible

OnMetrics = Callable[[str, int, Mapping[str, float]], None]
"""`(stage, step, scalars)`, called with all that is written."""

_EVENTS = "events.out.tfevents."  # how names of event files begin
_RESERVED = ("step", "stage", "time")
_SHOWN = {"loss": "loss", "grad_norm": "grad"}  # on the console, and their names there
_UPLOAD_EVERY = 30.0  # seconds, where no checkpoint is saved before
_REMEDY = "Install them with: pip install -e . (or: pip install clu tensorboard)"


class MetricWriter(contextlib.AbstractContextManager):
    """Writes the scalars and images of one stage of a run; use it as a context manager.

    Files appear in `<workdir>/<stage>/`: `events.out.tfevents.*` and `metrics.jsonl`, one object a
    line with `step`, `stage`, `time` (seconds since the epoch) and the scalars; values that JSON
    lacks are the strings "NaN", "Infinity" and "-Infinity", which `float` understands. Those of a
    `workdir` in a bucket are collected here and uploaded now and then, see `saving`. On a terminal
    one live line shows the progress; elsewhere a log line every `print_every` steps does. Only
    process 0 writes; elsewhere every method does nothing.

    Args:
      workdir: the run's directory.
      stage: the stage's name, such as `"teacher"`; also the name of its directory.
      total_steps: the step at which the stage ends.
      first_step: how many steps were done before, 0 for a new stage. What lines and event files
        have of later steps, written by a run that was killed after its last checkpoint, is removed.
      print_every: steps between log lines where there is no terminal.
      on_metrics: called with the scalars of each step that are written, in process 0.

    Raises:
      ImportError: clu or TensorBoard is missing; the message names the remedy.
      OSError: the directory cannot be written; names it and the remedy.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        stage: str,
        total_steps: int,
        *,
        first_step: int = 0,
        print_every: int = 100,
        on_metrics: OnMetrics | None = None,
    ):
        if print_every < 1:
            raise ValueError(f"print_every must be at least 1, got {print_every}")
        self._active = jax.process_index() == 0
        if not self._active:
            return
        _require("clu", "tensorboard")
        self._stage = stage
        self._total = total_steps
        self._print_every = print_every
        self._on_metrics = on_metrics
        self._directory = user_path(workdir) / stage
        with self._writing():
            self._spool = Spool(self._directory)
            self._spool.fetch("metrics.jsonl")
            self._lines = _open_lines(self._spool.here / "metrics.jsonl", first_step)
        self._bar = live_line(stage, first_step, total_steps)
        self._printed = first_step
        self._points: collections.deque[tuple[int, float]] = collections.deque(maxlen=20)
        # One worker: events stay in order, and behind the opening of their file.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="metrics")
        forgetting = self._worker.submit(_forget_events, self._spool, first_step)
        self._events = self._worker.submit(_open_events, str(self._spool.here))
        self._pending: list[Future] = [forgetting, self._events]

    def __exit__(self, kind, value, traceback) -> None:
        """Closes; an exception already on its way out is not replaced by one of the writer's."""
        try:
            self.close()
        except Exception as error:
            if value is None:
                raise
            logging.error("while leaving after %s: metrics not written: %s", kind.__name__, error)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes scalars of one step, and shows them.

        Args:
          step: the number of optimiser steps done.
          scalars: values on the host, by name. `examples_per_second`, where given, is shown.

        Raises:
          ValueError: a scalar is called step, stage or time.
          OSError: the line, or an earlier event, could not be written.
        """
        if not self._active:
            return
        taken = [name for name in _RESERVED if name in scalars]
        if taken:
            raise ValueError(f"a scalar cannot be called {', '.join(taken)}")
        scalars = {name: float(value) for name, value in scalars.items()}
        head = {"step": int(step), "stage": self._stage, "time": round(time.time(), 3)}
        line = head | {name: _as_json(value) for name, value in scalars.items()}
        with self._writing():
            self._lines.write(json.dumps(line, allow_nan=False) + "\n")
        self._enqueue("write_scalars", int(step), scalars)
        if self._spool.due(_UPLOAD_EVERY):
            self._pending.append(self._worker.submit(self._upload))
        self._progress(int(step), scalars)
        if self._on_metrics is not None:
            self._on_metrics(self._stage, int(step), scalars)

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Writes images to the event file.

        Args:
          step: the number of optimiser steps done.
          images: arrays `[H, W, C]` or `[N, H, W, C]` with 1 or 3 channels, of uint8, or of floats
            in [0, 1].

        Raises:
          OSError: the line, or an earlier event, could not be written.
        """
        if self._active:
            arrays = {name: np.asarray(image) for name, image in images.items()}
            self._enqueue("write_images", int(step), arrays)

    def saving(self) -> Callable[[], None]:
        """Brings what has been written to where it stays, without waiting for a bucket.

        Returns:
          What to call before a checkpoint of the same step counts as saved, from any thread: it
          waits for the upload. It raises OSError if that failed.
        """
        if not (self._active and self._spool.remote):
            return lambda: None
        uploading = self._worker.submit(self._upload)

        def wait() -> None:
            with self._writing():
                uploading.result()

        return wait

    def _upload(self) -> None:
        self._events.result().flush()
        self._spool.upload()

    def say(self, text: str) -> None:
        """Prints a line for the reader without breaking the live one.

        Args:
          text: the line.
        """
        if not self._active:
            return
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            logging.info("%s", text)

    def close(self) -> None:
        """Writes what is pending and closes the files.

        Raises:
          OSError: an event could not be written.
        """
        if not self._active:
            return
        self._active = False
        if self._bar is not None:
            self._bar.close()
        try:
            with self._writing():
                self._lines.close()
            self._check(wait=True)
            with self._writing():
                self._worker.submit(lambda: self._events.result().close()).result()
                self._worker.submit(self._spool.upload).result()
        finally:
            self._worker.shutdown(wait=True)
            self._spool.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Around what writes to the directory; its errors name the directory and the remedy."""
        try:
            yield
        except ImportError:
            raise
        except Exception as error:  # those of a bucket are of many kinds
            raise OSError(
                f"cannot write metrics to {self._directory} ({cause(error)}). Check that it is "
                "writable and has free space, or pass another --workdir."
            ) from error

    def _enqueue(self, method: str, step: int, values: Mapping) -> None:
        self._check()
        call = lambda: getattr(self._events.result(), method)(step, values)  # noqa: E731
        self._pending.append(self._worker.submit(call))

    def _check(self, *, wait: bool = False) -> None:
        """Raises the first error of the finished writes."""
        pending, self._pending = self._pending, []
        for future in pending:
            if not wait and not future.done():
                self._pending.append(future)
                continue
            with self._writing():
                future.result()

    def _progress(self, step: int, scalars: Mapping[str, float]) -> None:
        if not self._points or step > self._points[-1][0]:
            self._points.append((step, time.monotonic()))
        parts = [
            f"{label} {scalars[name]:.4g}" for name, label in _SHOWN.items() if name in scalars
        ]
        if not parts:
            return
        # Between the last few writes; compiling happens before the first one.
        (first, began), (last, ended) = self._points[0], self._points[-1]
        seconds = (ended - began) / (last - first) if last > first else None
        if seconds is not None:
            parts.append(_step_time(seconds))
        if "examples_per_second" in scalars:
            parts.append(f"{scalars['examples_per_second']:,.0f} ex/s")
        if seconds is not None and step < self._total:
            parts.append(f"ETA {clock(seconds * (self._total - step))}")
        if self._bar is not None:
            self._bar.postfix[0] = "  ".join(parts)
            self._bar.update(step - self._bar.n)
        elif step - self._printed >= self._print_every or step >= self._total:
            self._printed = step
            width = len(str(self._total))
            head = f"{self._stage}  {step:>{width}}/{self._total}"
            logging.info("%s", "  ".join([head, *parts]))


def _step_time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms/step" if seconds < 1 else f"{seconds:.3g} s/step"


def _open_lines(path: epath.Path, first_step: int):
    """Opens a JSON-lines file for appending, without the lines of steps that will be done again."""
    if path.exists():
        if not os.path.isfile(path):  # epath takes a pipe, which would block, for a file
            raise OSError(errno.EINVAL, f"{path.name} is not a regular file; remove it")
        kept, again = [], False
        # What is no text, in an edited file, is no line either.
        for line in path.read_bytes().decode(errors="replace").splitlines():
            try:
                if first_step > 0 and json.loads(line)["step"] <= first_step:
                    kept.append(line + "\n")
                else:
                    again = True
            except (ValueError, KeyError, RecursionError, TypeError):
                logging.warning("%s: dropping a line cut short by a killed run", path)
        if again:
            text = "%s: dropping the lines of steps after %d, which are done again"
            logging.info(text, path, first_step)
        with replacing(path) as rewritten:
            rewritten.write_text("".join(kept), encoding="utf-8")
    # A line at a time, so that tail -f works.
    return open(path, "a", encoding="utf-8", buffering=1)


def _forget_events(spool: Spool, first_step: int) -> None:
    """Removes the events of steps that will be done again, as `_open_lines` removes their lines.

    Of the readers of event files some drop what a restart repeats, and some do not.
    """
    spool.fetch(f"{_EVENTS}*")
    for path in sorted(spool.here.iterdir()):
        if not path.name.startswith(_EVENTS):
            continue
        if first_step == 0:
            path.unlink()
        elif any(event.step > first_step for event, _ in _records(path)):
            rewritten = path.with_name("events.tmp")  # no name of an event file, to TensorBoard
            with rewritten.open("wb") as file:
                file.writelines(
                    record for event, record in _records(path) if event.step <= first_step
                )
            rewritten.replace(path)


def logged_images(directory: epath.Path) -> list[tuple[int, bytes]]:
    """The images that a stage wrote while it trained.

    Args:
      directory: the stage's directory, with its event files.

    Returns:
      `(step, PNG)` in the order of the steps; of each step the last image.
    """
    from tensorboard.plugins.image.metadata import PLUGIN_NAME

    found = {}
    for path in visible(directory):
        if not path.name.startswith(_EVENTS):
            continue
        for event, _ in _records(path):
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == PLUGIN_NAME:
                    found[event.step] = value.tensor.string_val[2]  # behind width and height
    return sorted(found.items())


def _records(path: epath.Path) -> Iterator[tuple[Any, bytes]]:
    """The events of an event file with their records, to the first that is damaged or cut short.

    A record is the length of an event (8 bytes), its checksum (4), the event, its checksum (4).
    """
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    left = path.stat().length
    with path.open("rb") as file:
        while len(head := file.read(12)) == 12:
            size = int.from_bytes(head[:8], "little") + 4
            left -= 12 + size
            if left < 0:
                return
            body = file.read(size)
            try:
                yield Event.FromString(body[:-4]), head + body
            except DecodeError:
                return


def _as_json(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _require(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"metrics need {', '.join(missing)}, not installed here. {_REMEDY}")


def _open_events(directory: str):
    """Imports what event files need, and opens one."""
    try:
        from piflow_jax.runs.events import EventWriter
    except ImportError as error:
        raise ImportError(f"metrics need clu and tensorboard: {error}. {_REMEDY}") from error
    return EventWriter(directory)
