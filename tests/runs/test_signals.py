"""Signals are real ones, sent to this process."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from piflow_jax.runs.signals import GracefulExit


def send(number):
    os.kill(os.getpid(), number)  # handled before the next bytecode of the main thread


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_sets_the_flag_and_the_block_goes_on(number):
    with GracefulExit() as leaving:
        assert leaving.requested is None
        send(number)
        assert leaving.requested == number.name
    assert leaving.requested == number.name


def test_second_interrupt_raises():
    with GracefulExit() as leaving:
        send(signal.SIGINT)
        assert leaving.requested == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_repeated_sigterm_and_one_interrupt_do_not_raise():
    with GracefulExit() as leaving:
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        assert leaving.requested == "SIGTERM"
        send(signal.SIGINT)
        assert leaving.requested == "SIGINT"


def test_previous_handlers_come_back_even_after_an_exception():
    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(ZeroDivisionError), GracefulExit() as leaving:
            assert signal.getsignal(signal.SIGINT) != interrupt
            raise ZeroDivisionError
        assert signal.getsignal(signal.SIGINT) == interrupt
        send(signal.SIGTERM)
        assert seen == [signal.SIGTERM] and leaving.requested is None
    finally:
        signal.signal(signal.SIGTERM, before)


def test_elsewhere_than_in_the_main_thread_it_does_nothing():
    before = signal.getsignal(signal.SIGTERM)
    result = []

    def run():
        with GracefulExit() as leaving:
            result.append((leaving.requested, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert result == [(None, before)]


LOOP = """
import time
from piflow_jax.runs.signals import GracefulExit
with GracefulExit() as leaving:
    print("ready", flush=True)
    while not leaving.requested:
        time.sleep(0.01)
print("saved", leaving.requested, flush=True)
"""


def test_a_killed_process_finishes_in_order():
    process = subprocess.Popen([sys.executable, "-c", LOOP], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    output, _ = process.communicate(timeout=20)
    assert (output, process.returncode) == ("saved SIGTERM\n", 0)
