"""How far work of a known length is: a live line on a terminal, now and then a line in a log."""

import contextlib
import sys
import time
from collections.abc import Collection, Iterable, Iterator
from typing import TypeVar

import jax
from absl import logging

_EVERY = 15.0  # seconds between lines of a log
_T = TypeVar("_T")


class Progress(contextlib.AbstractContextManager):
    """Shows how much of some work is done and the time that is left; use it as a context manager.

    A log has no line of work that ends soon. Only process 0 writes.

    Args:
      name: of the work.
      total: its length, such as a number of samples.
    """

    def __init__(self, name: str, total: int):
        self._name, self._total, self._done = name, total, 0
        self._active = not jax.process_index()
        self._bar = live_line(name, 0, total, leave=False) if self._active else None
        self._began = self._said = time.monotonic()

    def __exit__(self, *error) -> None:
        """Takes the live line away."""
        if self._bar is not None:
            self._bar.close()

    def compiling(self) -> None:
        """Says that a program is being compiled; the clock starts when that is done."""
        if self._bar is not None:
            self._bar.postfix[0] = "compiling"
            self._bar.refresh()
        elif self._active:
            logging.info("%s: compiling", self._name)

    def start(self) -> None:
        """Starts the clock by which the time left is reckoned."""
        self._began = self._said = time.monotonic()

    def advance(self, count: int = 1) -> None:
        """Counts what has been done since the last call."""
        self._done += count
        now = time.monotonic()
        left = clock((now - self._began) * (self._total / self._done - 1))
        if self._bar is not None:
            self._bar.postfix[0] = f"{left} left"
            self._bar.update(count)
        elif self._active and now - self._said >= _EVERY and self._done < self._total:
            self._said = now
            logging.info(
                "%s: %s/%s, %s left", self._name, f"{self._done:,}", f"{self._total:,}", left
            )


def tracked(batches: Iterable[Collection[_T]], name: str, total: int) -> Iterator[Collection[_T]]:
    """Shows the progress of whoever takes batches.

    Args:
      batches: whose lengths count.
      name: of the work.
      total: the sum of their lengths.

    Yields:
      The batches.
    """
    with Progress(name, total) as progress:
        for batch in batches:
            yield batch
            progress.advance(len(batch))


def clock(seconds: float) -> str:
    """A duration as people write it.

    Args:
      seconds: the duration.

    Returns:
      Such as `0:38`, `12:05` or `1:02:03`.
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def live_line(name: str, done: int, total: int, *, leave: bool = True):
    """A line of tqdm with a name, a bar and what is set as `postfix[0]`; None without a terminal.

    Args:
      name: stands in front.
      done: where the work starts.
      total: where it ends.
      leave: whether the line stays when it is closed.

    Returns:
      The `tqdm.tqdm`, on the standard error.
    """
    if not sys.stderr.isatty():
        return None
    from tqdm import tqdm

    return tqdm(
        desc=name,
        initial=done,
        total=total,
        leave=leave,
        dynamic_ncols=True,
        mininterval=0.2,
        # A text of its own would have a comma in front.
        bar_format="{desc}  {n_fmt}/{total_fmt} |{bar:20}| {postfix[0]}",
        postfix=[""],
        file=sys.stderr,
    )
