"""One run in a directory: against real processes."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from piflow_jax.runs import run_lock
from piflow_jax.runs.run_lock import RunLock

HOLD = """
import sys, time
from piflow_jax.runs.run_lock import RunLock
with RunLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(100)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_the_second_run_is_refused_until_the_first_is_gone(tmp_path, holder):
    with pytest.raises(BlockingIOError) as caught:
        RunLock(tmp_path)
    for part in (str(tmp_path), str(holder.pid), socket.gethostname(), "--workdir"):
        assert part in str(caught.value)
    holder.send_signal(signal.SIGKILL)  # nobody tidies up
    holder.wait()
    with RunLock(tmp_path):
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
    with RunLock(tmp_path):
        pass


def test_a_holder_elsewhere_is_waited_for(tmp_path, holder):
    """A network file system notices with delay that a machine went away."""
    path = tmp_path / "run.lock"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"host": "another"}))
    began = time.monotonic()
    with pytest.raises(BlockingIOError, match="on another"):
        RunLock(tmp_path, patience=1.5)
    assert time.monotonic() - began >= 1.5
    holder.kill()
    holder.wait()
    with RunLock(tmp_path):
        pass


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    said = []
    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(run_lock.logging, "warning", lambda *words: said.append(words))
    with RunLock(tmp_path):
        pass
    assert "cannot be locked" in said[0][0]


def test_the_directory_of_a_first_run_is_made(tmp_path):
    with RunLock(tmp_path / "runs" / "new"):
        assert (tmp_path / "runs" / "new" / "run.lock").exists()
