"""Specs, parameter trees and checkpoints are those that were recorded, see `tests/recorded.py`."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from piflow_jax.runs.checkpoint import Checkpointer
from piflow_jax.systems.networks import student_network
from piflow_jax.systems.spec import student_settings
from tests import recorded


@pytest.mark.parametrize("name", recorded.configurations())
def test_specs_and_trees_are_the_recorded_ones(name):
    assert recorded.record(name) == recorded.read(name)


def test_every_recorded_configuration_is_still_there():
    assert set(json.loads(recorded.SPECS.read_text())["configurations"]) == set(
        recorded.configurations()
    )


@pytest.mark.parametrize("kind", recorded.KINDS)
def test_a_checkpoint_written_before_loads(kind, tmp_path):
    workdir = recorded.unpack(kind, tmp_path)
    expected = json.loads((recorded.CHECKPOINTS / "numbers.json").read_text())[kind]
    found = recorded.numbers(kind, workdir)
    assert set(found) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("kind", recorded.KINDS)
def test_the_state_of_a_checkpoint_written_before_is_a_students(kind, tmp_path):
    """Parameters, average, moments and counters: what a run continues from."""
    directory = recorded.unpack(kind, tmp_path) / "student" / "checkpoints"
    with Checkpointer(directory) as checkpointer:
        step = checkpointer.latest_step()
        spec = json.loads((directory / str(step) / "meta" / "metadata").read_text())["meta"]["spec"]
        settings = student_settings(spec)
        config = dataclasses.replace(
            recorded.configuration("digits:gm"), model=settings.model, policy=settings.policy
        )
        optimizer = dataclasses.replace(config.train.optimizer, kind="adamw")
        train = dataclasses.replace(settings.train, optimizer=optimizer)
        student = student_network(settings.model, settings.policy, settings.data)
        state = recorded.initial_state(dataclasses.replace(config, train=train), student)
        restored = checkpointer.restore(state).state
    assert step == int(restored.step) == 6
    assert jax.tree.structure(restored) == jax.tree.structure(state)
