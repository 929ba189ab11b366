"""Leaving on a signal: finish the step, save, go."""

import signal
import threading
from types import FrameType

from absl import logging


class GracefulExit:
    """Turns SIGTERM and the first SIGINT into a flag that the training loop reads between steps.

    A second SIGINT raises `KeyboardInterrupt` at once, for the user who will not wait. The previous
    handlers come back on leaving. Python allows handlers in the main thread only; elsewhere this
    does nothing but say so.

    With several processes, the signal reaches them at different steps, so the loop agrees on
    one: the flag travels with every batch, and the step takes its maximum. There,
    `jax.distributed.initialize` starts a preemption notifier in C++ with a SIGTERM handler of its
    own. The last one installed wins: entered later, this class takes the signal, and
    `multihost_utils.reached_preemption_sync_point` no longer hears of it. Orbax and TensorFlow
    install no handlers.

    Attributes:
      requested: the signal's name, such as `"SIGTERM"`, or None.

    Example::

        with GracefulExit() as leaving:
            for step in range(start, steps):
                ...
                if leaving.requested:
                    checkpointer.save(...)
                    break
    """

    def __init__(self):
        self.requested: str | None = None
        self._previous = {}

    def __enter__(self) -> "GracefulExit":
        """Installs the handlers and returns itself.

        Returns:
          This object, whose `requested` says whether to leave.
        """
        if threading.current_thread() is not threading.main_thread():
            logging.warning(
                "not in the main thread: SIGTERM will end the run without a last checkpoint"
            )
            return self
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind, value, traceback) -> None:
        """Puts the previous handlers back."""
        for number, handler in self._previous.items():
            # None stands for a handler that was not installed from Python and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested == "SIGINT":
            raise KeyboardInterrupt
        if self.requested is None or number == signal.SIGINT:
            self.requested = signal.Signals(number).name
