"""Which settings a resumed run may change, by name; nothing is compiled here."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from piflow_jax.config import parse
from piflow_jax.distillation.stages import student_stage, teacher_stage
from piflow_jax.modes.train import train
from piflow_jax.parallel import device_mesh
from piflow_jax.runs.changes import changed_settings
from piflow_jax.runs.checkpoint import CheckpointError
from piflow_jax.systems.assembly import Systems
from piflow_jax.systems.datasets import load_source
from piflow_jax.systems.network import abstract_variables
from piflow_jax.systems.networks import teacher_network
from piflow_jax.systems.shapes import DataShape
from tests import tiny, tiny_text
from tests.saved_runs import save_stage


def stage_of(network, make=student_stage, fill=0.0, **changes):
    config = tiny.get_config() if network == "dit" else tiny_text.get_config(network)
    config.update_from_flattened_dict({"train.batch_size": 8, f"model.{network}.depth": 2})
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    config = parse(config)
    source = load_source(config.data)
    data = DataShape.of(config.data.name, source)
    systems = Systems.of(config, data, getattr(source, "null", None))
    if make is teacher_stage:
        return teacher_stage(systems, source, device_mesh())
    abstract = abstract_variables(teacher_network(config.model, data))
    params = jax.tree.map(lambda leaf: np.full(leaf.shape, fill, leaf.dtype), abstract)
    return student_stage(systems, source, params, device_mesh())


def resume(before, after, forget=(), step=1):
    """Continues from a checkpoint of the one stage with the other one's settings."""
    saved = json.loads(json.dumps(dict(before.config)))
    for key in forget:
        del saved[key]
    return changed_settings(saved, after, "runs/x", step)


@pytest.mark.parametrize("make", [teacher_stage, student_stage])
@pytest.mark.parametrize(
    "change", [{"model__remat": "full"}, {"model__attention": "xla"}, {"model__scan_unroll": 2}]
)
def test_how_networks_are_computed_may_change(make, change):
    resume(stage_of("dit", make), stage_of("dit", make, **change))


@pytest.mark.parametrize(
    "change",
    [
        {"train__microbatches": 2},
        {"teacher__checkpoint": "/elsewhere"},
        {"teacher__weights": "w.pth", "teacher__weights_format": "original_dit"},
        {"teacher__steps": 7, "teacher__batch_size": 4, "teacher__label_dropout": 0.3},
        {"teacher__optimizer__learning_rate": 1e-5, "teacher__optimizer__decay": "cosine"},
    ],
)
def test_a_student_goes_on_with_the_same_teacher_from_elsewhere(change):
    before = stage_of("dit")
    resume(before, stage_of("dit", **change))
    # Another teacher is another one whatever its name.
    other = r"\n  teacher\.parameters: this teacher is not the one .* student .*fingerprint"
    with pytest.raises(CheckpointError, match=other):
        resume(before, stage_of("dit", fill=1e-3, **change))


def test_a_checkpoint_without_the_teachers_identity_is_bound_to_its_name():
    before, forget = stage_of("dit"), ["teacher.parameters"]
    resume(before, stage_of("dit"), forget)
    with pytest.raises(
        CheckpointError, match=r"config\.teacher\.checkpoint: the checkpoint has ''"
    ):
        resume(before, stage_of("dit", teacher__checkpoint="/elsewhere"), forget)


@pytest.mark.parametrize(
    "change",
    [
        {"teacher__guidance_scale": 2.0},
        {"train__num_states": 3},
        {"model__dtype": "bfloat16"},
        {"policy__num_components": 3},
        {"seed": 1},
    ],
)
def test_what_a_student_learns_may_not(change):
    (key,) = change
    with pytest.raises(CheckpointError, match=rf"config\.{key.replace('__', '.')}: the"):
        resume(stage_of("dit"), stage_of("dit", **change))


@pytest.mark.parametrize(("dropout", "allowed"), [(0.0, True), (0.1, False)])
def test_microbatches_with_dropout_in_adapters_may_not_change(dropout, allowed):
    """Each of them has a key of its own for it."""
    before, after = (
        stage_of("flux", model__flux__lora_dropout=dropout, train__microbatches=count)
        for count in (1, 2)
    )
    if allowed:
        resume(before, after)
        return
    with pytest.raises(CheckpointError, match=r"config\.train\.microbatches: .* has 1, .* 2"):
        resume(before, after)


def test_stages_of_other_keys_are_unlike():
    before = stage_of("dit")
    more = dataclasses.replace(before, config=dict(before.config) | {"new": 1})
    with pytest.raises(CheckpointError, match=r"config\.new: the checkpoint has None"):
        resume(before, more)


@pytest.mark.parametrize("make", [teacher_stage, student_stage])
def test_mirror_images_are_other_data(make):
    with pytest.raises(CheckpointError, match=r"config\.data\.mirror"):
        resume(stage_of("dit", make), stage_of("dit", make, data__mirror=True))


@pytest.mark.parametrize("key", ["checkpoint", "weights"])
def test_no_teacher_is_trained_beside_a_student_of_a_given_one(key, tmp_path):
    """That is what happens if the command is repeated without the teacher."""
    recorded = {"teacher.checkpoint": "", "teacher.weights": "", f"teacher.{key}": "/runs/a"}
    save_stage(tmp_path, "student", {"w": np.zeros(1)}, {}, recorded)
    config = tiny.get_config()
    with pytest.raises(CheckpointError, match=rf"taught by config\.teacher\.{key} = '/runs/a'"):
        train(parse(config), tmp_path)
    assert not (tmp_path / "teacher").exists()
