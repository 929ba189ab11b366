"""Checkpoints that several files of tests read, and break."""

import shutil
from pathlib import Path

import pytest

from piflow_jax.runs.workdir import user_path
from tests import buckets
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


@pytest.fixture
def service():
    """An empty bucket, `gs://bucket`, and what is to go wrong with it."""
    service = buckets.service()
    service.reset()
    yield service
    service.reset()


@pytest.fixture(params=["disk", "bucket"])
def place(request, tmp_path):
    """A work directory, which need not be on this machine."""
    if request.param == "disk":
        return user_path(tmp_path)
    request.getfixturevalue("service")
    return user_path("gs://bucket/run")
