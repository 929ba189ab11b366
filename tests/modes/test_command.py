"""What is common to all modes: what they check before they start, and how they say no."""

import builtins
import dataclasses
import os

import jax
import pytest

from piflow_jax.config import ConfigError, parse
from piflow_jax.data.prompt_lists import Prompt
from piflow_jax.data.text_encoders import WordEncoder
from piflow_jax.loading.runs import load_student
from piflow_jax.modes import command
from piflow_jax.modes.autoencoder import load_autoencoder
from piflow_jax.modes.prepare_prompts import encode_prompts
from piflow_jax.systems.judges import load_inception
from piflow_jax.systems.networks import NETWORKS
from tests import tiny, tiny_text


def start(mode, settings, workdir, **batches):
    config = settings.get_config()
    for group, size in batches.items():
        config[group].batch_size = size
    command._start(parse(config, None), command.MODES[mode], workdir)


@pytest.fixture
def eight_devices(monkeypatch):
    monkeypatch.setattr(command.processes, "start", lambda settings: None)
    monkeypatch.setattr(jax, "device_count", lambda: 8)


@pytest.mark.usefixtures("eight_devices")
@pytest.mark.parametrize("settings", [tiny, tiny_text])
@pytest.mark.parametrize(
    ("mode", "used"),
    [
        ("train", {"train", "teacher", "evaluation"}),
        ("rivals", {"train", "teacher", "evaluation"}),
        ("evaluate", {"evaluation"}),
        ("sample", {"evaluation"}),
        ("export", set()),
        ("prepare", set()),
        ("statistics", set()),
    ],
)
def test_a_mode_checks_the_batches_that_it_makes(tmp_path, settings, mode, used):
    groups = ("train", "teacher", "evaluation")
    start(mode, settings, tmp_path, **{group: 8 if group in used else 6 for group in groups})
    for group in used:
        sizes = dict.fromkeys(groups, 8) | {group: 6}
        with pytest.raises(ConfigError, match=rf"config\.{group}\.batch_size must be"):
            start(mode, settings, tmp_path, **sizes)


@pytest.mark.parametrize(("tensor", "whole"), [(1, True), (2, False), (-1, False)])
def test_weights_are_gathered_whole_unless_products_are_split(tmp_path, monkeypatch, tensor, whole):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "")
    config = tiny.get_config()
    config.mesh.tensor = tensor
    command._start(parse(config, None), command.MODES["compile"], tmp_path)
    assert ("windowed_einsum" in os.environ["LIBTPU_INIT_ARGS"]) == whole


def refusal(capsys, mode, config, workdir):
    assert command.run(mode, config, workdir) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    """Runs a mode that Ctrl-C ends."""

    def interrupt(config, workdir):
        raise KeyboardInterrupt

    def run(mode):
        row = dataclasses.replace(command.MODES[mode], run=interrupt)
        monkeypatch.setitem(command.MODES, mode, row)
        return command.run(mode, tiny.get_config(), tmp_path)

    monkeypatch.setattr(command.processes, "start", lambda settings: None)
    return run


def test_ctrl_c_of_a_process_does_not_wait_for_others(interrupted, monkeypatch):
    """They may wait for it in a sum, where their own Ctrl-C does not reach them."""
    ended = []
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: ended.append("waits"))
    monkeypatch.setattr(command.processes.os, "_exit", ended.append)
    interrupted("evaluate")
    assert ended[:1] == [130]


@pytest.mark.parametrize("mode", ["train", "evaluate", "sample"])
def test_ctrl_c_is_one_sentence(capsys, interrupted, mode):
    assert interrupted(mode) == 130
    error = capsys.readouterr().err
    assert error.startswith("error: stopped by Ctrl-C; the same command continues")
    assert error.count("\n") == 1


@pytest.mark.parametrize("mode", ["sample", "evaluate", "export"])
def test_what_reads_a_run_makes_no_directory(tmp_path, capsys, monkeypatch, mode):
    monkeypatch.setattr(command.processes, "start", lambda settings: None)
    assert command.run(mode, tiny.get_config(), tmp_path / "nowhere") == 1
    assert "nowhere" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_prompt_in_place_of_a_list_is_refused_in_a_sentence(tmp_path, capsys, monkeypatch):
    """`--mode=sample --prompts="a red fox"`."""
    monkeypatch.setattr(command.processes, "start", lambda settings: None)
    encode_prompts([Prompt("a red fox")], WordEncoder(12, 10), tmp_path / "cache", source="foxes")
    config = tiny_text.get_config("flux")
    config.data.name, config.data.data_dir = "prompts", str(tmp_path / "cache")
    config.data.prompts = "a red fox"
    error = refusal(capsys, "sample", config, tmp_path)
    assert "config.data.prompts: a red fox is no list of prompts" in error
    assert "a .txt file has a prompt on each line" in error


@pytest.fixture
def needs_pytorch(tmp_path, monkeypatch):
    """A file of weights that cannot be read, for want of PyTorch."""
    original = builtins.__import__

    def without_torch(name, *rest, **named):
        if name == "torch":
            raise ImportError("No module named 'torch'")
        return original(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without_torch)
    file = tmp_path / "weights.pth"
    file.write_bytes(b"")
    return str(file)


def test_weights_that_need_pytorch_are_refused_in_a_sentence(
    tmp_path, capsys, monkeypatch, needs_pytorch
):
    monkeypatch.setattr(command.processes, "start", lambda settings: None)
    config = tiny.get_config()
    config.teacher.weights = needs_pytorch
    error = refusal(capsys, "train", config, tmp_path)
    assert f"config.teacher.weights = {needs_pytorch!r}: " in error
    assert "is a PyTorch file: pip install torch, or convert it to .safetensors" in error


@pytest.mark.parametrize(
    ("key", "load"),
    [
        ("evaluation.weights", lambda config: load_student(config, NETWORKS["dit"].official, "")),
        ("evaluation.features", lambda config: load_inception(config.evaluation)),
        ("data.vae", load_autoencoder),
    ],
)
def test_whatever_file_it_is_that_needs_pytorch(needs_pytorch, key, load):
    config = tiny.get_config()
    config.update_from_flattened_dict({"data.name": "latents", key: needs_pytorch})
    with pytest.raises(ConfigError, match=rf"config\.{key} = .*: pip install torch"):
        load(parse(config))
