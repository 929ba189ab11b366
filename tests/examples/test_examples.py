"""The worked examples do what they say."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name):
    path = EXAMPLES / f"{name}.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) < 150
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_ddpm_of_flax_nnx_is_distilled():
    figures = load("nnx_teacher").main().figures
    # The data have variance 1: a student that learned nothing is about 2 away.
    assert figures["student, 1 evaluation"] < 0.05 < figures["teacher, 4 evaluations"]
