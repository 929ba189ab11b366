"""One run in a directory of a bucket at a time: an object that its owner keeps alive."""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tensorstore as ts
from absl import logging
from etils import epath

from piflow_jax.runs.steps import cause

_BEAT = 15.0  # seconds between two signs of life
_REQUEST = 60.0  # seconds that one may take, with all repetitions of the client


class Lease:
    """An object that only one process at a time holds.

    It is written only over the generation that was read before, or where there is none, so that of
    two processes one is refused by the service. The owner replaces it every 15 seconds; whoever
    finds one that stays as it is takes it over. Clocks of different machines are not compared.

    Args:
      path: the object, in a bucket.
      silence: seconds after which an owner that gives no sign of life counts as dead. On the same
        machine a process is looked for instead.
      lost: called, in another thread, if another process has taken the object over: this one gave
        no sign of life.

    Raises:
      BlockingIOError: another process holds it; names its process, machine and start.
      OSError: the object cannot be read or written.
    """

    def __init__(self, path: epath.Path, *, silence: float, lost: Callable[[str], None]):
        self._path, self._lost = path, lost
        self._record = this_process() | {
            "machine": _machine(),
            "started": _started(os.getpid()),
            "owner": uuid.uuid4().hex,
            "beat": 0,
        }
        try:
            self._store = ts.KvStore.open(os.fspath(path)).result(timeout=_REQUEST)
            self._generation = self._acquire(silence)
        except BlockingIOError:
            raise
        except Exception as error:  # TensorStore has errors of many kinds
            raise OSError(
                f"cannot write {path} ({cause(error)}), which keeps other runs out; check the "
                "network and the rights in this bucket, or pass another --workdir"
            ) from error
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="run.lock", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Lets the next one in, at once if the bucket can be reached."""
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(Exception):  # the next one waits for signs of life then
            self._store.write("", None, if_equal=self._generation).result(timeout=_REQUEST)

    def _acquire(self, silence: float) -> bytes:
        seen, since = None, time.monotonic()
        while True:
            found = self._store.read("").result(timeout=_REQUEST)
            generation, holder = found.stamp.generation, parsed_holder(found.value)
            here = _lives(holder) if found.state == "value" else False
            silent = generation == seen and time.monotonic() - since >= silence
            if here is False or (here is None and silent):
                if (written := self._write(generation)) is not None:
                    return written
                continue  # another one was quicker
            if here or (seen is not None and generation != seen):
                raise in_use(self._path, holder)
            if seen is None:
                text = "waiting for a sign of life of %s, held on %s"
                logging.info(text, self._path, holder.get("host", "?"))
                seen, since = generation, time.monotonic()
            time.sleep(min(silence / 4, 1.0))

    def _write(self, over: bytes) -> bytes | None:
        """Writes over a generation; returns the new one, or None if it is another's by now."""
        self._record["beat"] += 1
        value = json.dumps(self._record).encode()
        written = self._store.write("", value, if_equal=over).result(timeout=_REQUEST)
        if written.generation:
            return written.generation
        # The answer to a write that succeeded may have been lost, and the write repeated.
        found = self._store.read("").result(timeout=_REQUEST)
        ours = parsed_holder(found.value).get("owner") == self._record["owner"]
        return found.stamp.generation if ours else None

    def _keep(self) -> None:
        while not self._ended.wait(_BEAT):
            try:
                generation = self._write(self._generation)
            except Exception as error:
                logging.warning("%s: no sign of life written: %s", self._path, cause(error))
                continue
            if generation is None:
                self._lost(
                    f"{self._path.parent} was taken over by another run, since this one gave no "
                    "sign of life for too long; the other goes on from the last checkpoint"
                )
                return
            self._generation = generation


def this_process() -> dict[str, Any]:
    """What a holder says of itself, as JSON values."""
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": since}


def parsed_holder(text: str | bytes) -> dict[str, Any]:
    """What a holder said of itself; nothing if it cannot be read."""
    try:
        holder = json.loads(text)
    except (RecursionError, ValueError):  # it is just being written, or was edited
        return {}
    return holder if isinstance(holder, dict) else {}


def in_use(path: epath.Path, holder: Mapping[str, Any]) -> BlockingIOError:
    """The error that another process holds `path`."""
    return BlockingIOError(
        f"{path.parent} is in use by process {holder.get('pid', '?')} on "
        f"{holder.get('host', '?')}, since {holder.get('since', '?')}. Stop that run or wait for "
        "its end, or pass another --workdir."
    )


def _lives(holder: dict) -> bool | None:
    """Whether a holder on this machine still runs; None for one elsewhere."""
    if not _machine() or holder.get("machine") != _machine():
        return None
    return _started(holder.get("pid")) == holder.get("started")


def _machine() -> str:
    """This boot of this machine, and the space of its process numbers; empty if it has no names."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: object) -> str:
    """When a process of this machine began, by which it differs from later ones of its number."""
    try:
        status = Path(f"/proc/{int(pid)}/stat").read_text(encoding="utf-8", errors="replace")
    except (OSError, TypeError, ValueError):
        return ""
    # Behind the name, in brackets, which may hold anything.
    fields = status.rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else fields[19]
