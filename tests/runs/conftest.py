"""Checkpoints that several files of tests read, and break."""

import shutil
from pathlib import Path

import pytest

from tests.runs.checkpoints import save


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with steps 1 and 2; tests copy it before they break it."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    save(directory, 1, 2)
    return directory


@pytest.fixture
def broken(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))
