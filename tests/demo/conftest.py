"""A run to show."""

import pytest

from piflow_jax.config import parse
from piflow_jax.systems.shapes import DataShape
from tests import tiny
from tests.saved_runs import save_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    data = DataShape(name="digits", sample_size=8, channels=1, num_classes=10)
    return save_run(parse(tiny.get_config()), data, tmp_path_factory.mktemp("run"))
