"""The work directory: one tiny run is made once; each row edits a copy of it and starts again.

A row is what was done to the folder, the settings of the next start, its exit status and the words
that it must say. Nothing may end in a traceback, start again in silence, or blame the wrong thing.
"""

import contextlib
import json
import logging
import os
import re
import shutil
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax.config import ConfigError, parse
from piflow_jax.evaluation.kept import KeptFileError
from piflow_jax.loading import load
from piflow_jax.loading import load_teacher as load_notebook_teacher
from piflow_jax.loading.runs import load_teacher
from piflow_jax.modes import command
from piflow_jax.runs import quiet
from piflow_jax.runs.best import BestCheckpoint
from piflow_jax.runs.checkpoint import Checkpointer, CheckpointError, read_spec
from piflow_jax.runs.loop import run_stage
from piflow_jax.runs.run_lock import RunLock
from piflow_jax.runs.workdir import check_writable, user_path
from piflow_jax.systems.shapes import DataShape
from tests import tiny
from tests.runs.test_loop import OPTIONS, make_stage


def start(workdir, mode="train", **changes):
    """What a start ends with: the exit status, and all that it says."""
    config = tiny.get_config()
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("absl")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command.processes, "start", lambda settings: None)
        patch.setattr(command, "_refuse", lambda text, code: said.append(f"error: {text}") or code)
        patch.setattr(sys.modules["piflow_jax.modes.train"], "evaluate", lambda *_, **__: None)
        try:
            return command.run(mode, config, workdir), "\n".join(said)
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The work directory of a run that has ended: steps 4 and 6 of teacher and student."""
    workdir = tmp_path_factory.mktemp("made") / "run"
    assert start(workdir)[0] == 0
    return workdir


@pytest.fixture
def run(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "run"))


# --- Edits of a path below the run's folder ---------------------------------------------------


def nothing(path):
    del path


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def empty(path):
    for entry in path.iterdir():
        remove(entry)


def foreign(path):
    empty(path)
    (path / "notes.txt").touch()


def linked(path):
    target = path.with_name("precious")
    target.write_text("keep")
    remove(path)
    path.symlink_to(target)


def renamed(name):
    return lambda path: path.rename(path.with_name(name))


def holding(text):
    return lambda path: path.write_bytes(text)


def replaced(make):
    return lambda path: remove(path) or make(path)


def copied(name):
    return replaced(lambda path: shutil.copytree(path.with_name(name), path))


def with_record(edit):
    def both(path):
        edit(path)
        stage = next(p for p in path.parents if p.name in ("student", "teacher"))
        remove(stage / "checkpoints.json")

    return both


STEPS, NEWEST, META = ("student/checkpoints" + end for end in ("", "/6", "/6/meta/metadata"))
RECORD, LINES = "student/checkpoints.json", "student/metrics.jsonl"
LOST = rf"error: .*/{STEPS} lacks step 6, the last .* saved there.* delete .*/{RECORD} to "
OF_6, OF_4 = (rf"is that of step {step}; .* rename it back.* fall back" for step in (6, 4))
NO_FILE = r"cannot write metrics to .*/student \(.* metrics.jsonl is not a regular file; remove it"
MORE = {"train__steps": 8}
LESS, LESS_TEACHER = {"train__steps": 4}, {"teacher__steps": 4}
RATE = {"train__optimizer__learning_rate": 1e-4}

REFUSED = [
    # What was saved is gone, or is not what it is called.
    (STEPS, empty, {}, 1, LOST + "start from the beginning"),
    (STEPS, remove, {}, 1, LOST + "start from the beginning"),
    ("teacher/checkpoints", remove, {}, 1, "error: .*/teacher/checkpoints lacks step 6"),
    (NEWEST, remove, {}, 1, LOST + "go on from step 4"),
    (NEWEST, renamed("6.bak"), {}, 1, LOST + "go on from step 4"),
    (NEWEST, renamed("5"), {}, 1, LOST + "go on from step 5"),
    (NEWEST, renamed("99999999"), {}, 1, f"/99999999 {OF_6}"),
    (NEWEST, copied("4"), {}, 1, f"/{NEWEST} {OF_4}"),
    (NEWEST, replaced(Path.mkdir), {}, 1, f"/{NEWEST} is partial: it lacks state and meta"),
    (NEWEST, replaced(Path.touch), {}, 1, LOST + "go on from step 4"),
    (META, holding(b"[" * 99_999), {}, 1, f"/{NEWEST} is corrupt.* Delete .* and .*{RECORD}"),
    (META, holding(b"\xff\xfe"), {}, 1, f"/{NEWEST} is corrupt.* Delete .* and .*{RECORD}"),
    (RECORD, holding(b"{"), {}, 1, f"{RECORD} is damaged .* delete it to go on"),
    (RECORD, holding(b"\xff\xfe"), {}, 1, f"{RECORD} is damaged"),
    (RECORD, holding(b"[" * 99_999), {}, 1, f"{RECORD} is damaged"),
    (RECORD, holding(b'{"step": 1e400}'), {}, 1, f"{RECORD} is damaged .*its step is inf"),
    (RECORD, holding(b'{"step": -5}'), {}, 1, f"{RECORD} is damaged .*its step is -5"),
    (RECORD, holding(b'{"step": true}'), {}, 1, f"{RECORD} is damaged .*its step is True"),
    (RECORD, replaced(Path.mkdir), {}, 1, f"cannot read .*{RECORD}"),
    (STEPS, with_record(foreign), {}, 1, "other things: notes.txt. Move them away"),
    ("teacher/checkpoints", with_record(foreign), {}, 1, "other things: notes.txt. Move them away"),
    # Settings that ask for less than there is, or for other steps than those that were done.
    (".", nothing, LESS_TEACHER, 1, "at step 6, beyond the 4 .* Raise config.teacher.steps to 6"),
    (".", nothing, LESS, 1, "at step 6, beyond the 4 .* Raise config.train.steps to 6"),
    (".", nothing, RATE, 1, "config.train.optimizer.learning_rate: the checkpoint has 0.001"),
    # Other things where files and folders of a run belong.
    ("student", replaced(Path.touch), {}, 1, r"cannot write to .*/student \(Not a directory\)"),
    (STEPS, replaced(Path.touch), {}, 1, rf"cannot write to .*/{STEPS} \(Not a directory\)"),
    (LINES, replaced(Path.mkdir), MORE, 1, NO_FILE),
    (LINES, replaced(os.mkfifo), MORE, 1, NO_FILE),
    ("run.lock", linked, {}, 1, r"cannot write .*/run.lock \(it is a link\).* remove it"),
    ("run.lock", replaced(Path.mkdir), {}, 1, r"cannot write .*/run.lock \(Is a directory\)"),
    ("run.lock", replaced(os.mkfifo), {}, 1, r"run.lock \(it is not a regular file\)"),
]


@pytest.mark.parametrize(("name", "edit", "changes", "status", "says"), REFUSED)
def test_an_edited_run_is_refused_in_a_sentence(run, name, edit, changes, status, says):
    edit(run / name)
    ended, said = start(run, **changes)
    assert ended == status and re.search(says, said), said
    assert "\n" not in said.split("error: ")[1] or changes == RATE  # which lists settings
    if edit is linked:
        assert (run / "precious").read_text() == "keep"


OTHER = MORE | RATE | {"train__optimizer__grad_clip": 0.0, "train__optimizer__warmup_steps": 7}
NO_LINES = holding(b'\xff\xfe{}\n\x00[1]\n{"step": null}\n' + b"[" * 99_999)
AGAIN = rf"student: continuing from step 4.*\n.*{LINES}: dropping the lines of steps after 4"

GOES_ON = [
    (NEWEST, with_record(remove), {}, 4, AGAIN),
    ("student", remove, {}, None, "student  6/6"),
    (LINES, NO_LINES, OTHER, 6, "step 6 on, config.train.optimizer.learning_rate is 0.0001"),
    ("run.lock", holding(b"\xff\x00"), {}, 6, "student: already trained"),
]


@pytest.mark.parametrize(("name", "edit", "changes", "step", "says"), GOES_ON)
def test_an_edited_run_goes_on_and_says_from_where(run, name, edit, changes, step, says):
    edit(run / name)
    ended, said = start(run, **changes)
    assert ended == 0 and re.search(says, said), said
    assert (f"student: continuing from step {step}" in said) == (step is not None)
    last = changes.get("train__steps", 6)
    assert json.loads((run / RECORD).read_text()) == {"step": last}
    steps = [json.loads(line)["step"] for line in (run / LINES).read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[-1] == last


# --- Where a run lies -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("", "error: --workdir is empty; name a directory"),
        ("file:///tmp/run", "error: --workdir file:///tmp/run has the unknown scheme file://"),
        ("a\\b", "a\\b has a backslash"),
        ("a\0b", "error: --workdir has a NUL character: 'a\\x00b'"),
        ("a" * 300, "error: --workdir is too long for a file system: 'aaaa"),
        ("a/" * 3000, "error: --workdir is too long for a file system: 'a/a/"),
        ("a/" * 2000, "error: --workdir is too long for a file system: 'a/a/"),
        ("\udcff", "is not UTF-8, as checkpoints need it"),
    ],
)
def test_a_work_directory_that_cannot_be_is_refused(tmp_path, monkeypatch, path, says):
    monkeypatch.chdir(tmp_path)
    ended, said = start(path)
    assert ended == 2 and says in said
    assert not [entry for entry in tmp_path.rglob("*") if entry.is_file()]


def test_the_home_directory_is_the_same_for_all_of_a_run(tmp_path, monkeypatch):
    """Lock, metrics and checkpoints; and it is found again from elsewhere, by every reader."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    with RunLock("~/run"):
        run_stage(make_stage(4), "~/run", **OPTIONS)
        with BestCheckpoint("~/run/toy/best/checkpoints", {}):
            pass
    assert sorted(os.listdir(tmp_path)) == ["home"]
    assert sorted(os.listdir(tmp_path / "home" / "run")) == ["run.lock", "toy"]
    monkeypatch.chdir("/")
    assert read_spec("~/run/toy/checkpoints")[0] == 4
    assert user_path("~/run") == user_path(tmp_path / "home" / "run")


def test_a_current_directory_that_is_gone_is_said(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(ConfigError, match="relative, and the current directory no longer exists"):
        user_path("run")
    assert str(user_path(tmp_path)) == str(tmp_path)


NAMES = ["lr[3e-3]", "s[!a]", "a*b", "a?b", "{a,b}", "a b", "%41", "#x", "a:b", "ä", "~x", "-x"]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved_under_an_odd_name_is_restored(tmp_path, name):
    """Orbax globs below a directory of checkpoints; a neighbour must not match either."""
    state = {"a": jnp.arange(4.0)}
    for directory in (tmp_path / "aXb" / "checkpoints", tmp_path / name / "checkpoints"):
        with Checkpointer(directory) as checkpointer:
            checkpointer.save(1, state, data_state={}, config={}, spec={})
    with Checkpointer(directory) as checkpointer:
        np.testing.assert_array_equal(checkpointer.restore(state).state["a"], state["a"])


@contextlib.contextmanager
def another_user(directory):
    """Root may write everywhere."""
    if os.geteuid():
        yield
        return
    for parent in (directory, *directory.parents):  # of pytest's; beyond are others'
        if "pytest" not in parent.as_posix():
            break
        parent.chmod(0o755)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_directory_that_cannot_be_written_is_found_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["piflow_jax.modes.train"], "load_source", pytest.fail)
    (tmp_path / "there").mkdir(mode=0o555)
    with another_user(tmp_path):
        ended, said = start(tmp_path / "there" / "run")
    assert ended == 1
    assert f"error: cannot write to {tmp_path}/there (Permission denied); make it" in said
    check_writable(tmp_path / "new" / "run")
    assert sorted(os.listdir(tmp_path)) == ["there"]


# --- load -------------------------------------------------------------------------------------


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)


def test_the_folder_of_a_step_is_loaded(made, tmp_path):
    student = load(made)
    elsewhere = shutil.copytree(made / NEWEST, tmp_path / "the best one")
    for path in (made / STEPS, made / NEWEST, elsewhere):
        same(load(path), student)
    with pytest.raises(AssertionError):
        same(load(made / STEPS / "4"), student)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, None),
        ({"evaluation__seed": 5}, None),
        ({"seed": 5}, r"note: config.seed = 5 is the seed of training; .* config.evaluation.seed"),
        ({"evaluation__nfe": 2}, r"note: config.evaluation: this student was trained for nfe=1, "),
        ({"evaluation__temperature": 0.5}, r"note: .*: temperature=0.5 has no effect with nfe=1"),
    ],
)
def test_what_sampling_does_not_do_is_said(run, changes, says):
    ended, said = start(run, "sample", evaluation__grid_samples=2, **changes)
    assert ended == 0
    assert "note: " not in said if says is None else re.search(says, said), said


def test_samples_of_other_seeds_are_other_files(run):
    for seed in (0, 5):
        assert start(run, "sample", evaluation__grid_samples=2, evaluation__seed=seed)[0] == 0
    student, other = run / "student.png", run / "student-seed5.png"
    assert student.read_bytes() != other.read_bytes()


def test_the_settings_of_training_are_the_runs(made):
    trained = parse(tiny.get_config()).train
    assert trained.batch_size == 8 and trained.optimizer.warmup_steps == 2
    for path in (made, made / NEWEST):
        assert load(path).settings.train == trained


def test_the_teacher_of_a_run_is_found_in_its_directory(made):
    config = tiny.get_config()
    weights = []
    for place in ("", "teacher", "teacher/checkpoints", "teacher/checkpoints/6"):
        config.teacher.checkpoint = str(made / place)
        data = DataShape(name="digits", sample_size=8, channels=1, num_classes=10)
        weights.append(load_teacher(parse(config), data, "elsewhere"))
        jax.tree.map(np.testing.assert_array_equal, weights[0], weights[-1])


@pytest.mark.parametrize(
    ("path", "error", "says"),
    [
        ("", ConfigError, "the path is empty"),
        (".", CheckpointError, r"holds no checkpoint but other things: state\. Name a run's"),
    ],
)
def test_the_users_own_files_are_left_alone(tmp_path, monkeypatch, path, error, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "state").mkdir()
    with pytest.raises(error, match=says) as caught:
        load(path)
    assert not re.search("Move|Delete", str(caught.value))


def test_what_is_read_of_an_edited_run_is_not_another_step(run):
    remove(run / NEWEST)
    with pytest.raises(CheckpointError, match="lacks step 6"):
        load(run)


@pytest.mark.parametrize(("file", "dropped"), [("/x/orbax/y.py", True), ("/x/mine.py", False)])
def test_reads_of_orbax_that_are_given_up_print_no_traceback(file, dropped):
    names = {}
    exec(compile("async def read(): pass", file, "exec"), names)
    read, said = names["read"](), []
    given_up = types.SimpleNamespace(object=read, exc_value=Exception("while reading array index"))
    quiet._no_late_reads(said.append, given_up)
    read.close()
    assert said == ([] if dropped else [given_up])


def test_a_damaged_file_of_the_run_ends_it_with_a_sentence(tmp_path, monkeypatch):
    def damaged(*_):
        raise KeptFileError("x.json is damaged; delete it")

    monkeypatch.setitem(command.MODES, "train", command.Mode(run=damaged))
    assert start(tmp_path / "run") == (1, "error: x.json is damaged; delete it")


# --- A bucket ---------------------------------------------------------------------------------

BUCKET = "gs://bucket/run"
LOGIN = "there are no valid credentials; run `gcloud auth application-default login`"
GRANT = "objects in gs://bucket; grant their account the role roles/storage.object"


def called(load):
    def door(tmp_path):
        with pytest.raises(OSError) as caught:
            load(BUCKET)
        return str(caught.value)

    return door


def started(mode, workdir=None, **changes):
    return lambda tmp_path: start(workdir or tmp_path / "run", mode, **changes)[1]


DOORS = {
    "load": called(load),
    "load_teacher": called(load_notebook_teacher),
    "sample": started("sample", BUCKET),
    "evaluate": started("evaluate", BUCKET),
    "export": started("export", BUCKET),
    "train": started("train", BUCKET),
    "teacher": started("train", teacher__checkpoint=BUCKET),
    "weights": started("train", teacher__weights=f"{BUCKET}/x.safetensors"),
    "data": started("train", data__name="latents", data__data_dir=BUCKET),
    "pictures": started("train", data__name="images", data__images=BUCKET),
}


@pytest.mark.parametrize(
    ("status", "words"),
    [(401, [LOGIN]), (403, [GRANT]), (404, ["no such", "is missing", "there is no "])],
)
@pytest.mark.parametrize("door", DOORS)
def test_a_bucket_that_cannot_be_used_is_one_sentence(service, tmp_path, door, status, words):
    service.deny_all = status
    said = DOORS[door](tmp_path)
    last = said[said.rfind("error: ") :] if "error: " in said else said
    assert "gs://bucket" in last and any(word in last for word in words), said
    assert not {"\n", "{"} & set(last) and "Traceback" not in said
