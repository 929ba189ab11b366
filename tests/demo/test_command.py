"""The command line of the page."""

import shutil

import jax.numpy as jnp
import pytest

from piflow_jax.demo import Drawer, main


@pytest.fixture(autouse=True)
def gradio(monkeypatch):
    """As if it were installed, which these tests do not need."""
    monkeypatch.setattr("piflow_jax.demo.command.find_spec", lambda name: name)


@pytest.fixture
def served(monkeypatch):
    """What would be served, and how, by command."""
    found = []
    monkeypatch.setattr("piflow_jax.demo.command.make_page", lambda *drawers: drawers)
    monkeypatch.setattr(
        "piflow_jax.demo.command.serve", lambda *where, **how: found.append((*where, how))
    )
    return found


def test_the_command_line_says_what_is_loaded(run, served):
    main([f"--checkpoint={run}", "--dtype=bfloat16"])
    main([f"--checkpoint={run}", "--port=1234", "--origin=https://example.org"])
    (one,), *where = served[0]
    assert where == ["127.0.0.1", 7860, {"origins": []}]
    assert one.student.network.module.dtype == jnp.bfloat16
    (other,), *where = served[1]
    assert where == ["127.0.0.1", 1234, {"origins": ["https://example.org"]}]
    assert other.student.network.module.dtype == jnp.float32


def test_several_students_and_those_that_ship(run, served, monkeypatch, capsys):
    main([f"--checkpoint={run}", f"--checkpoint={run}"])
    assert len(served[0][0]) == 2
    monkeypatch.setattr("piflow_jax.demo.command.shipped_names", lambda: (str(run),))
    main([])
    (one,) = served[1][0]
    assert one.title == "digits" and one.teacher is not None
    with pytest.raises(SystemExit):
        main(["--help"])
    assert f"by default {run}" in " ".join(capsys.readouterr().out.split()).replace("- ", "-")
    # A teacher of another run.
    main([f"--checkpoint={run / 'student' / 'checkpoints'}", f"--teacher={run}"])
    assert served[2][0][0].teacher is not None


def test_without_gradio_nothing_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr("piflow_jax.demo.command.find_spec", lambda name: None)
    monkeypatch.setattr(Drawer, "load", None)
    with pytest.raises(SystemExit):
        main(["--checkpoint=fashion_mnist"])
    assert 'error: the page needs Gradio: pip install -e ".[demo]"' in capsys.readouterr().err


def test_a_checkpoint_is_needed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("piflow_jax.demo.command.shipped_names", tuple)
    with pytest.raises(SystemExit):
        main([])
    assert "--checkpoint" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([f"--checkpoint={tmp_path / 'nowhere'}"])
    assert "nowhere: no such checkpoint" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="nowhere: no such checkpoint"):
        Drawer.load(tmp_path / "nowhere")


def test_a_run_whose_student_has_no_checkpoint_yet_says_so(run, tmp_path, capsys):
    shutil.copytree(run / "teacher", tmp_path / "teacher")
    for _ in range(2):
        with pytest.raises(SystemExit):
            main([f"--checkpoint={tmp_path}"])
        (line,) = capsys.readouterr().err.splitlines()[-1:]
        assert f"error: there is no checkpoint in {tmp_path / 'student' / 'checkpoints'}" in line
        (tmp_path / "student" / "checkpoints").mkdir(parents=True, exist_ok=True)
