"""FLUX.2 at full width, see `full_width.py`."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest


@pytest.mark.slow
def test_flux2_at_full_width_is_that_of_diffusers(tmp_path):
    """One block of each kind; each implementation takes 10 GB."""
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    found = {}
    for which in ("ours", "theirs"):
        path = tmp_path / f"{which}.npy"
        command = [sys.executable, "-m", "tests.models.full_width", which, str(path)]
        root = Path(__file__).parents[2]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found[which] = np.load(path)
    assert found["theirs"].std() > 0.1  # there is something to compare
    error = np.abs(found["ours"] - found["theirs"]).max() / np.abs(found["theirs"]).max()
    assert error < 1e-4
