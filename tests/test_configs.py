"""Every shipped configuration and variant is accepted, and says what its file promises."""

import importlib.util
from pathlib import Path

import pytest

from piflow_jax.config import mesh_sizes, parse

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


@pytest.mark.parametrize(
    ("variant", "policy", "window", "guidance", "interval", "steps", "time_scale", "nfe"),
    [
        ("gm_repa", 32, 0, 3.2, (0.0, 0.7), 140_000, 1.0, 1),
        ("gm_repa_2nfe", 32, 0, 2.8, (0.0, 0.7), 24_000, 1.0, 2),
        ("gm_fm", 32, 0, 2.7, (0.0, 0.6), 140_000, 1000.0, 1),
        ("dx_repa_10", 10, 10, 3.2, (0.0, 0.7), 40_000, 1.0, 1),
        ("dx_repa_20", 20, 5, 3.2, (0.0, 0.7), 40_000, 1.0, 1),
        ("dx_repa_40", 40, 3, 3.2, (0.0, 0.7), 40_000, 1.0, 1),
    ],
)
def test_imagenet_recipes_are_those_of_the_design(
    variant, policy, window, guidance, interval, steps, time_scale, nfe
):
    """Section 6 of the design."""
    config = parse(load("imagenet").get_config(variant))
    train, model, teacher = config.train, config.model, config.teacher
    grid = config.policy.kind == "dx"
    assert (config.policy.num_grid if grid else config.policy.num_components) == policy
    assert (train.window_substeps, train.total_substeps, train.num_states) == (window, 128, 2)
    assert (teacher.guidance_scale, teacher.guidance_interval) == (guidance, interval)
    assert (train.steps, train.batch_size, train.nfe, train.shift) == (steps, 4096, nfe, 1.0)
    assert (model.depth, model.num_heads, model.hidden, model.patch_size) == (28, 16, 1152, 2)
    assert model.time_scale == time_scale
    assert (train.gm_dropout, config.policy.logstd_hidden) == (0.0 if grid else 0.05, 1024)
    optimizer = train.optimizer
    assert (optimizer.kind, optimizer.learning_rate) == ("adamw", 5e-5)
    assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay) == (0.9, 0.95, 0.0)
    assert (optimizer.warmup_steps, optimizer.grad_clip, optimizer.ema_gamma) == (400, 50, 7)


def test_imagenet_splits_its_state_over_sixteen_devices_at_most():
    config = parse(load("imagenet").get_config(), None)
    sizes = {n: tuple(mesh_sizes(config, n).values()) for n in (1, 8, 16, 64, 1024)}
    assert sizes == {
        1: (1, 1, 1),
        8: (1, 8, 1),
        16: (1, 16, 1),
        64: (4, 16, 1),
        1024: (64, 16, 1),
    }


def test_unknown_variant_is_named():
    with pytest.raises(ValueError, match="variants gm, dx, gm_2nfe, datafree, guided, not 'xd'"):
        load("digits").get_config("xd")
