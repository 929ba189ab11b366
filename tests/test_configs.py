"""Every shipped configuration and variant is accepted, and says what its file promises."""

import importlib.util
from pathlib import Path

import pytest

from piflow_jax.config import parse

CONFIGS = Path(__file__).parents[1] / "configs"


def load(name):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("variant", load("digits").VARIANTS)
def test_digits_variants_are_valid(variant):
    config = parse(load("digits").get_config(variant))
    expected = {
        "gm": ("gm", 1, False, 1.0),
        "dx": ("dx", 1, False, 1.0),
        "gm_2nfe": ("gm", 2, False, 1.0),
        "datafree": ("gm", 2, True, 1.0),
        "guided": ("gm", 1, False, 2.0),
    }[variant]
    train = config.train
    found = (config.policy.kind, train.nfe, train.data_free, config.teacher.guidance_scale)
    assert found == expected


def test_mnist_is_valid():
    assert parse(load("mnist").get_config()).data.name == "mnist"


def test_unknown_variant_is_named():
    with pytest.raises(ValueError, match="variants gm, dx, gm_2nfe, datafree, guided, not 'xd'"):
        load("digits").get_config("xd")
