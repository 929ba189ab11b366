"""`config.train.initial`: a student that starts where another one ended."""

import jax
import numpy as np
import pytest

from piflow_jax.config import ConfigError, parse
from piflow_jax.distillation.stages import student_stage
from piflow_jax.loading.runs import load_average, student_dir
from piflow_jax.modes.train import initial_start
from piflow_jax.parallel import device_mesh
from piflow_jax.systems.assembly import Systems
from piflow_jax.systems.datasets import load_source
from piflow_jax.systems.network import abstract_variables
from piflow_jax.systems.shapes import DataShape
from piflow_jax.systems.spec import student_spec
from tests import tiny, tiny_text
from tests.saved_runs import save_run


def settings_of(network, **changes):
    config = tiny.get_config() if network == "dit" else tiny_text.get_config(network)
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return parse(config)


@pytest.fixture(scope="module", params=["dit", "flux"])
def ended(request, tmp_path_factory):
    """A run that has ended, its network's name and its data."""
    config = settings_of(request.param)
    source = load_source(config.data)
    data = DataShape.of(config.data.name, source)
    return save_run(config, data, tmp_path_factory.mktemp("ended")), request.param, source, data


@pytest.mark.parametrize("place", [".", "student/checkpoints"])
def test_it_has_the_averaged_weights_of_the_other(ended, place):
    workdir, name, source, data = ended
    # The number of evaluations may be another one.
    config = settings_of(name, train__initial=str(workdir / place), train__nfe=4)
    systems = Systems.of(config, data, getattr(source, "null", None))
    teacher = abstract_variables(systems.teacher_network)
    teacher = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), teacher)
    stage = student_stage(systems, source, teacher, device_mesh(), **initial_start(systems))
    state = jax.jit(stage.init)(*stage.init_arguments)
    other = settings_of(name)
    spec = student_spec(other, data)
    saved = load_average(student_dir(other, workdir), systems.student_network, spec)
    for started in (state.params, state.ema_params):
        for a, b in zip(*map(jax.tree.leaves, (started, saved)), strict=True):
            np.testing.assert_array_equal(a, b)
    assert stage.config["train.initial"] == config.train.initial


def test_another_network_is_refused_by_key(ended, tmp_path):
    workdir, name, _, data = ended
    config = settings_of(name, train__initial=str(workdir), policy__num_components=3)
    with pytest.raises(ConfigError, match=r"(?s)config\.train\.initial = .*policy\.num_components"):
        initial_start(Systems.of(config, data))
    config = settings_of(name, train__initial=str(tmp_path))
    with pytest.raises(ConfigError, match=r"config\.train\.initial = .*no checkpoint"):
        initial_start(Systems.of(config, data))
