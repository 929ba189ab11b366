"""The table of bytes that processes read of weights."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_table_is_that_of_the_document():
    command = [sys.executable, "-m", "benchmarks.weights_read"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    table = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=True
    ).stdout
    assert table in (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    shares = [line.split("|")[5].strip() for line in table.splitlines()[2:]]
    assert shares == ["100.00%", "25.00%", "6.25%"]
