"""`config.train.initial`: a student that starts where another one ended."""

import jax
import numpy as np
import pytest

import piflow_jax
from configs.fashion_mnist import get_config
from piflow_jax.config import ConfigError, parse
from piflow_jax.distillation.stages import student_stage
from piflow_jax.loading.runs import load_average, load_teacher, spaces_of, student_dir
from piflow_jax.modes.export import export
from piflow_jax.modes.train import initial_start, train
from piflow_jax.parallel import device_mesh
from piflow_jax.systems.assembly import Systems
from piflow_jax.systems.datasets import load_source
from piflow_jax.systems.network import abstract_variables
from piflow_jax.systems.shapes import DataShape
from piflow_jax.systems.spec import TRAINED_IN, student_spec
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


@pytest.fixture(scope="module")
def exported(ended):
    """The files of `--mode=export` by the network: a whole student, or its adapters."""
    workdir, name, _, _ = ended
    export(settings_of(name), workdir)
    inside = {"dit": "student.safetensors", "flux": "adapter/diffusion_pytorch_model.safetensors"}
    return workdir / inside[name]


@pytest.mark.parametrize("place", [".", "student/checkpoints", "weights"])
def test_it_has_the_averaged_weights_of_the_other(ended, exported, place):
    workdir, name, source, data = ended
    # The number of evaluations may be another one.
    path = exported if place == "weights" else workdir / place
    config = settings_of(name, train__initial=str(path), train__nfe=4)
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


def test_a_wrong_path_is_said_before_anything_is_made(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr("piflow_jax.modes.train.open_judge", lambda *given: opened.append(given))
    config = settings_of("dit", train__initial=str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"config\.train\.initial = .*nowhere: no such check"):
        train(config, tmp_path / "run")
    assert not opened


def test_weights_of_another_network_are_refused_by_key(ended, exported):
    _, name, _, data = ended
    config = settings_of(name, train__initial=str(exported), policy__num_components=3)
    with pytest.raises(ConfigError, match=r"(?s)config\.train\.initial = .*policy\.num_components"):
        initial_start(Systems.of(config, data))


def test_weights_keep_the_spaces_that_their_student_was_trained_in(tmp_path):
    config = settings_of("dit")
    source = load_source(config.data)
    spaces = ("a, sha256 0", "b")
    data = DataShape.of(config.data.name, source)
    workdir = save_run(config, data, tmp_path, **{TRAINED_IN: list(spaces)})
    export(config, workdir)
    for path in (workdir, workdir / "student.safetensors"):
        assert spaces_of(path) == spaces
        assert piflow_jax.load(path).settings.trained_in == spaces


def test_a_shipped_student_and_its_teacher_go_on():
    config = get_config("gm_corrected")
    config.train.initial = config.teacher.weights = "fashion_mnist"
    config, data = parse(config), piflow_jax.load("fashion_mnist").settings.data
    systems = Systems.of(config, data)
    started = initial_start(systems)["initial"]
    shipped = systems.student_network.trained(piflow_jax.load("fashion_mnist").params)
    jax.tree.map(np.testing.assert_array_equal, started, shipped)
    teacher = load_teacher(config, data, "nothing")
    jax.tree.map(
        np.testing.assert_array_equal, teacher, piflow_jax.load_teacher("fashion_mnist")[1]
    )
