"""What those who wait are shown: a line now and then in a log, a live line on a terminal."""

import io
import sys
import time

import jax
import pytest
from absl import logging

from piflow_jax import progress
from piflow_jax.progress import Progress, tracked


@pytest.fixture
def said(monkeypatch):
    """Lines of the log, on a clock that goes 6 seconds at each look."""
    lines, now = [], [0.0]

    def monotonic():
        now[0] += 6
        return now[0]

    monkeypatch.setattr(progress.time, "monotonic", monotonic)
    monkeypatch.setattr(logging, "info", lambda text, *values: lines.append(text % values))
    return lines


def test_a_log_has_a_line_now_and_then_with_the_time_left(said):
    with Progress("teacher, 8 NFE", 1000) as work:
        work.compiling()
        work.start()
        for _ in range(10):
            work.advance(100)
    # 6 seconds for each hundred; the end needs no line.
    assert said == [
        "teacher, 8 NFE: compiling",
        "teacher, 8 NFE: 300/1,000, 0:42 left",
        "teacher, 8 NFE: 600/1,000, 0:24 left",
        "teacher, 8 NFE: 900/1,000, 0:06 left",
    ]


def test_whoever_takes_batches_is_followed(said):
    assert list(tracked(["ab", "cd", "ef", "g"], "features", 7)) == ["ab", "cd", "ef", "g"]
    assert said == ["features: 6/7, 0:03 left"]


def test_other_processes_say_nothing(said, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with Progress("work", 4) as work:
        work.compiling()
        for _ in range(4):
            work.advance()
    assert not said


def test_a_terminal_has_a_line_that_goes_away(said, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress("teacher, 8 NFE", 4) as work:
        work.compiling()
        work.start()
        time.sleep(0.25)  # tqdm redraws it no more often
        work.advance(2)
        assert "2/4" in terminal.getvalue() and "compiling" in terminal.getvalue()
        assert "| 0:06 left" in terminal.getvalue()
    assert not terminal.getvalue().split("\r")[-1].strip() and not said
