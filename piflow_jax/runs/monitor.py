"""What a run costs: time, memory, waiting, utilisation, surprising compilations, profiles."""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from absl import logging
from etils import epath

from piflow_jax.buckets import is_remote, repeated_requests
from piflow_jax.parallel import peak_flops
from piflow_jax.runs.spool import Spool

_COMPILED = "/jax/core/compile/backend_compile_duration"
# The second batch may be the first to be placed on the devices by itself.
_WARM_UP = 2


class Monitor:
    """Watches a training loop; use it as a context manager around the loop.

    Args:
      name: the stage's, for messages.
      directory: where profiles go, for TensorBoard; None on processes that write none.
      batch_size: examples per step.
      peak: FLOPs per second of a device at most; 0 looks the device up, see `peak_flops`.
      profile: first and last step to profile; empty for none.
      saving: seconds so far for which the loop has waited for its checkpoints.
    """

    def __init__(
        self,
        name: str,
        directory: str | os.PathLike | None,
        *,
        batch_size: int,
        peak: float = 0.0,
        profile: tuple[int, ...] = (),
        saving: Callable[[], float] = float,
    ):
        self._name = name
        self._directory = directory
        self._batch_size = batch_size
        self._flops: dict[int, int] = {}
        self._peak = (peak or peak_flops(jax.devices()[0]) or 0.0) * jax.device_count()
        self._profile = profile
        self._profiling: Spool | None = None
        self._upload: threading.Thread | None = None
        self._started = 0
        self._since = (0, time.perf_counter())
        self._waited = 0.0
        self._bucket = {}
        if directory is not None and is_remote(directory):
            self._bucket = {"bucket_wait": saving, "bucket_repeats": repeated_requests}
        self._so_far = {name: count() for name, count in self._bucket.items()}
        self._listening = False
        self._compilations: list[float] = []

    def __enter__(self) -> "Monitor":
        """Returns itself."""
        jax.monitoring.register_event_duration_secs_listener(self._heard)
        return self

    def __exit__(self, kind, value, traceback) -> None:
        """Stops listening, and ends a profile that the run did not reach the end of."""
        jax.monitoring.unregister_event_duration_listener(self._heard)
        if self._profiling:
            self._stop_profile()
        if self._upload is not None:
            self._upload.join()

    def start(self, step: int, last: int) -> None:
        """The loop begins after this step, and goes to the last one: the clock starts."""
        self._started = step
        self._since = (step, time.perf_counter())
        self._waited = 0.0
        if self._profile and self._directory is not None:
            begin, end = self._profile
            if end <= step or begin > last:
                text = "%s: config.profile = %s lies outside of steps %d to %d: no profile"
                logging.info(text, self._name, self._profile, step + 1, last)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for a batch."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Around what may compile now and then, such as saving."""
        listening, self._listening = self._listening, False
        try:
            yield
        finally:
            self._listening = listening

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Around what is no training: its time is not a step's, and it may compile."""
        began = time.perf_counter()
        with self.compiling():
            yield
        since, clock = self._since
        self._since = (since, clock + time.perf_counter() - began)

    def before(self, step: int, last_result: Any, flops: int) -> None:
        """Before a step is started: profiles begin and end here, and compilations are noticed.

        Args:
          step: the step.
          last_result: what the step before returned, which a profile's end has to wait for.
          flops: matrix-product FLOPs of the step, on all devices.
        """
        self._flops[step] = flops
        for seconds in self._compilations:
            logging.warning(
                "%s: something was compiled again before step %d, in %.1f s; a step that compiles "
                "again and again is slow: is a shape or a dtype of the data changing?",
                self._name,
                step,
                seconds,
            )
        self._compilations.clear()
        self._listening = step > self._started + _WARM_UP
        if not self._profile or self._directory is None:
            return
        first, last = self._profile
        if not self._profiling and first <= step <= last:
            with self.aside():
                jax.block_until_ready(last_result)
                spool = Spool(epath.Path(self._directory))
                jax.profiler.start_trace(os.fspath(spool.here))
            self._profiling = spool
        elif self._profiling and step > last:
            jax.block_until_ready(last_result)
            self._stop_profile()

    def figures(self, step: int) -> dict[str, float]:
        """Figures of the steps since the last call.

        Args:
          step: the last step that has ended.

        Returns:
          `step_seconds`, `examples_per_second`, `flops_per_second`; `mfu`, if the device's peak is
          known; `data_wait`, the share of the time; `memory_gib`, the most that a device of this
          process has had in use, if the backend counts. Of a run in a bucket also `bucket_wait`,
          seconds for which the loop waited for its checkpoints, and `bucket_repeats`, requests
          that were sent again. Nothing if no step has ended.
        """
        (since, began), now = self._since, time.perf_counter()
        waited, self._waited = self._waited, 0.0
        self._since = (step, now)
        flops = sum(self._flops.pop(ended) for ended in sorted(self._flops) if ended <= step)
        if step <= since:
            return {}
        seconds = (now - began) / (step - since)
        found = {
            "step_seconds": seconds,
            "examples_per_second": self._batch_size / seconds,
            "flops_per_second": flops / (now - began),
            "data_wait": waited / (now - began),
        }
        if self._peak:
            found["mfu"] = found["flops_per_second"] / self._peak
        for name, count in self._bucket.items():
            before, self._so_far[name] = self._so_far[name], count()
            found[name] = self._so_far[name] - before
        counts = [device.memory_stats() for device in jax.local_devices()]
        peaks = [count["peak_bytes_in_use"] for count in counts if count]
        if peaks:
            found["memory_gib"] = max(peaks) / 2**30
        return found

    def _heard(self, event: str, seconds: float, **_: Any) -> None:
        if event == _COMPILED and self._listening:
            self._compilations.append(seconds)

    def _stop_profile(self) -> None:
        spool, self._profiling = self._profiling, None
        with self.aside():
            jax.profiler.stop_trace()
        self._upload = threading.Thread(target=self._bring, args=(spool,), name="profile")
        self._upload.start()

    def _bring(self, spool: Spool) -> None:
        """Brings a profile to where it belongs; the run does not depend on it."""
        with contextlib.closing(spool):
            try:
                spool.upload()
            except OSError as error:
                logging.warning("%s: no profile in %s: %s", self._name, self._directory, error)
                return
        logging.info(
            "%s: profile in %s (tensorboard --logdir, with tensorboard-plugin-profile)",
            self._name,
            self._directory,
        )


def step_memory(compiled: jax.stages.Compiled) -> Mapping[str, int]:
    """Bytes of a device's memory that a compiled step takes.

    Args:
      compiled: the step; donated arguments and what replaces them are counted once.

    Returns:
      `arguments`, `temporary` and their sum with the results, `peak`.
    """
    memory = compiled.memory_analysis()
    peak = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
    return {
        "arguments": memory.argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "peak": peak,
    }
