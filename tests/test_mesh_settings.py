"""What a mesh in a configuration may be: what is left open is filled, and the rest has to fit."""

import pytest

from piflow_jax.config import ConfigError, mesh_sizes, parse
from tests import tiny_text
from tests.settings import changed, refusal


@pytest.mark.parametrize(
    ("values", "devices", "sizes"),
    [
        ({}, 8, (8, 1, 1)),
        ({"data": 1, "fsdp": -1}, 8, (1, 8, 1)),
        ({"data": 2, "fsdp": 4}, 8, (2, 4, 1)),
        ({"data": -1, "fsdp": 2, "tensor": 2}, 8, (2, 2, 2)),
        # The width is 64, eight tiles.
        ({"fsdp": -1}, 4, (1, 4, 1)),
        ({"fsdp": -1}, 32, (4, 8, 1)),
        ({"fsdp": -1}, 12, (3, 4, 1)),
        ({"fsdp": -1, "tensor": 4}, 64, (2, 8, 4)),
    ],
)
def test_a_mesh_fills_what_is_left_open(values, devices, sizes):
    values = {f"mesh__{axis}": size for axis, size in values.items()}
    config = parse(changed(**values, evaluation__batch_size=8), None)
    assert tuple(mesh_sizes(config, devices).values()) == sizes


def test_parts_that_are_not_asked_for_are_sixteen_at_most():
    wide = {"mesh__data": -1, "mesh__fsdp": -1, "model__dit__hidden": 256}
    config = parse(changed(**wide, evaluation__batch_size=64), None)
    assert tuple(mesh_sizes(config, 64).values()) == (4, 16, 1)
    config = parse(changed(**wide | {"mesh__data": 1}, evaluation__batch_size=64), None)
    assert tuple(mesh_sizes(config, 64).values()) == (1, 64, 1)


def test_parts_divide_the_width_of_the_tokens():
    """Else the sharding of the first parameter would be an error without a key."""
    values = {"mesh__fsdp": 8, "evaluation__batch_size": 8}
    message = "config.mesh.fsdp (8) must divide config.model.dit.hidden (60)"
    assert refusal(8, model__dit__hidden=60, **values) == message
    assert parse(changed(model__dit__hidden=64, **values), 8).mesh.fsdp == 8


def test_parts_divide_the_rank_of_adapters():
    config = tiny_text.get_config()
    config.model.flux.hidden, config.model.flux.num_heads = 64, 8
    config.model.flux.lora_rank = 12
    config.train.batch_size = config.evaluation.batch_size = config.teacher.batch_size = 8
    config.mesh.data = config.mesh.fsdp = -1
    assert tuple(mesh_sizes(parse(config, 8), 8).values()) == (2, 4, 1)
    config.mesh.data = 1
    with pytest.raises(ConfigError) as error:
        parse(config, 8)
    assert str(error.value) == "config.mesh.fsdp (8) must divide config.model.flux.lora_rank (12)"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": 3}, "config.mesh (data 3 x fsdp 1 x tensor 1) does not fit the 8 devices"),
        ({"fsdp": 3}, "config.mesh (data -1 x fsdp 3 x tensor 1) does not fit the 8 devices"),
        (
            {"tensor": -1},
            "only one size of config.mesh may be -1, or data and fsdp, but config.mesh.data and "
            "config.mesh.tensor are",
        ),
        ({"fsdp": 0}, "config.mesh.fsdp must be at least 1, or -1 to fill, got 0"),
        (
            {"data": 1, "tensor": 8},
            "config.mesh.tensor (8) must divide config.model.dit.num_heads (4)",
        ),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(values, message):
    values = {f"mesh__{axis}": size for axis, size in values.items()}
    assert refusal(8, **{"evaluation__batch_size": 8}, **values) == message
