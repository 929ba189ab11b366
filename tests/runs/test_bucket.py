"""A run in a bucket leaves there what it leaves on a disk, whatever goes wrong."""

import hashlib
import json
import os
import re
import tempfile
import threading
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import tensorstore
from etils import epath
from flax import linen as nn

import piflow_jax
from piflow_jax.buckets import repeated_requests
from piflow_jax.config import ConfigError, parse
from piflow_jax.convert import (
    open_autoencoder,
    open_weights,
    to_torch_state,
    write_safetensors,
)
from piflow_jax.convert.inception import read_inception
from piflow_jax.evaluation import save_grid
from piflow_jax.evaluation.kept import KeptFileError, read_kept, read_kept_json
from piflow_jax.loading.runs import load_teacher
from piflow_jax.runs import lease
from piflow_jax.runs.checkpoint import Checkpointer, CheckpointError
from piflow_jax.runs.metrics import MetricWriter
from piflow_jax.runs.run_lock import RunLock
from piflow_jax.runs.steps import complete_steps
from piflow_jax.runs.workdir import check_writable, user_path
from piflow_jax.systems.datasets import load_source
from piflow_jax.systems.network import abstract_variables
from piflow_jax.systems.networks import teacher_network
from piflow_jax.systems.shapes import DataShape
from piflow_jax.whole_files import copy_file, replacing, write_json
from tests import tiny
from tests.buckets import names
from tests.convert.test_files import assert_bit_equal, recorded, save_torch
from tests.doors import two_processes
from tests.doors.test_processes import two
from tests.doors.test_weights import load, state
from tests.saved_runs import save_run

RUN = "gs://bucket/run"


# --- Files ------------------------------------------------------------------------------------


def test_files_are_replaced_as_a_whole_and_read_back(service):
    path = user_path(RUN) / "values.json"
    write_json(path, {"a": 1})
    with pytest.raises(ZeroDivisionError), replacing(path) as under_way:
        under_way.write_text("half")
        raise ZeroDivisionError
    assert read_kept_json(path, dict) == {"a": 1}
    save_grid(path.with_name("grid.png"), [("x", np.zeros((1, 8, 8, 1)))])
    assert names(RUN) == ["grid.png", "values.json"]
    with pytest.raises(KeptFileError, match=f"{RUN}/grid.png is damaged"):
        read_kept(path.with_name("grid.png"), np.load)


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        (RUN, 401, f"cannot write to {RUN}: there are no valid credentials; run `gcloud auth"),
        (RUN, 403, "may not write and remove objects in gs://bucket; grant their account the role"),
        ("gs://other/run", 0, "there is no bucket gs://other; create it, or pass another"),
    ],
)
def test_what_cannot_be_written_is_one_sentence(service, path, status, words):
    service.deny = status
    with pytest.raises(OSError, match="cannot write to gs") as caught:
        check_writable(path)
    assert words in str(caught.value) and not set("\n{") & set(str(caught.value))


def test_what_can_be_written_is_left_as_it_was(service):
    service.refuse_every = 2
    check_writable(RUN)
    assert names("gs://bucket") == []


@pytest.mark.parametrize("path", ["gs://", "gs:///run", "s3://bucket/run"])
def test_no_bucket_and_other_stores_are_refused(path):
    with pytest.raises(ConfigError, match=r"names no bucket|unknown scheme s3://"):
        user_path(path, "--workdir")


def test_what_both_clients_repeat_is_counted(service):
    path, before = user_path(RUN) / "values.json", repeated_requests()
    write_json(path, {"a": 1})
    assert repeated_requests() == before
    refused = []
    service.written = lambda name: len(refused) < 2 and not refused.append(name)
    write_json(path, {"a": 2})  # by gcsfs
    assert repeated_requests() == before + 2
    refused.clear()
    tensorstore.KvStore.open(f"{RUN}/").result().write("other", b"b").result()
    assert repeated_requests() == before + 4
    assert read_kept_json(path, dict) == {"a": 2} and (path.parent / "other").read_text() == "b"


def test_a_small_object_and_a_question_take_no_more_requests_than_they_need(service):
    """Names differ, since `exists` does not wait for its second request after a first yes."""
    for name, there, ask, requests in (
        ("few_none", False, lambda path: path.exists(), 2),  # at once: for an object, for a folder
        ("few_new", False, lambda path: path.write_text("a"), 1),
        ("few_there", True, lambda path: path.exists(), 2),
        ("few_folder", True, lambda path: path.parent.is_dir(), 2),
    ):
        path = user_path(f"gs://bucket/{name}") / "values.json"
        if there:
            path.write_text("a")
        before = sum(name in asked for asked in service.asked)
        ask(path)
        assert 0 < sum(name in asked for asked in service.asked) - before <= requests
    large = "b" * (6 * 2**20)  # more than a client's buffer
    path.write_text(large)
    assert path.read_text() == large


# --- The lock ---------------------------------------------------------------------------------


def test_a_second_run_is_refused_and_the_next_one_is_not(service):
    used = f"{RUN} is in use by process {os.getpid()} on"
    with RunLock(RUN), pytest.raises(BlockingIOError, match=used):
        RunLock(RUN)
    with RunLock(RUN):
        assert names(RUN) == ["run.lock"]
    assert names(RUN) == []


@pytest.mark.parametrize("change", [{"pid": 2**22 + 1}, {"started": "0"}, {"machine": "another"}])
def test_a_dead_owners_lock_is_taken_over(service, change):
    """Of this machine, of a number that another process has by now, or of another machine."""
    path = user_path(RUN) / "run.lock"
    with RunLock(RUN):
        record = json.loads(path.read_text())
    path.write_text(json.dumps(record | change))
    with RunLock(RUN, patience=1.0):
        assert json.loads(path.read_text())["owner"] != record["owner"]


def test_signs_of_life_elsewhere_keep_the_others_out(service, monkeypatch):
    monkeypatch.setattr(lease, "_BEAT", 0.1)
    with RunLock(RUN), monkeypatch.context() as patch:
        patch.setattr(lease, "_machine", lambda: "another")
        with pytest.raises(BlockingIOError, match="is in use by process"):
            RunLock(RUN, patience=20.0)


def test_who_was_taken_for_dead_gets_to_know(service, monkeypatch):
    monkeypatch.setattr(lease, "_BEAT", 0.1)
    path, said, ended = user_path(RUN) / "run.lock", [], threading.Event()
    held = lease.Lease(path, silence=1.0, lost=lambda text: (said.append(text), ended.set()))
    path.write_text("{}")
    assert ended.wait(20)
    assert f"{RUN} was taken over by another run" in said[0]
    held.close()
    assert path.read_text() == "{}"  # the other's stays


def test_of_many_at_once_one_gets_the_lock(service, monkeypatch):
    """Where an answer is lost the client repeats a write that has succeeded."""
    service.refuse_every = 4
    got, refused = [], []

    def run():
        try:
            got.append(RunLock(RUN))
        except BlockingIOError:
            refused.append(1)

    threads = [threading.Thread(target=run) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 4)
    got[0].__exit__(None, None, None)


# --- Checkpoints and metrics ------------------------------------------------------------------


@pytest.mark.parametrize("where", ["disk", "bucket"])
def test_what_has_to_be_done_first_is_done_before_a_step_counts(service, tmp_path, where):
    directory = user_path(tmp_path if where == "disk" else RUN) / "checkpoints"
    seen = []

    def first():
        seen.append(complete_steps(directory))

    def fail():
        raise OSError("the bucket is gone")

    state, meta = {"a": np.arange(4)}, {"data_state": {}, "config": {}, "spec": {}}
    with Checkpointer(directory, record=True) as checkpointer:
        checkpointer.save(1, state, **meta, first=first)
        assert checkpointer.latest_step() == 1
        checkpointer.save(2, state, **meta, first=fail)
        with pytest.raises(CheckpointError, match="the bucket is gone"):
            checkpointer.wait()
    assert seen == [[]]
    with Checkpointer(directory) as checkpointer:
        assert checkpointer.latest_step() == 1
        assert checkpointer.restore(state).state["a"].tolist() == [0, 1, 2, 3]


def test_a_folder_that_goes_with_its_last_object_has_no_steps(service, monkeypatch):
    """While one process removes what a killed run left, another one looks."""
    directory = user_path(RUN) / "checkpoints"
    (directory / "4" / "meta").write_text("half")
    kind, listed = type(directory), type(directory).iterdir

    def removed(path):
        (directory / "4" / "meta").unlink()
        return listed(path)

    monkeypatch.setattr(kind, "iterdir", removed)
    assert complete_steps(directory) == []


def test_no_caller_waits_for_what_follows_a_save(service):
    """A record is written when its step is complete, though nobody asks."""
    directory, done = user_path(RUN) / "checkpoints", threading.Event()
    meta = {"data_state": {}, "config": {}, "spec": {}}
    with Checkpointer(directory, record=True) as checkpointer:
        service.asked.clear()
        service.delay = 0.05
        checkpointer.save(1, {"a": np.arange(4)}, **meta, then=done.set)
        blocked, requests = checkpointer.waited, len(service.asked)
        assert done.wait(60)
        assert json.loads(directory.with_name("checkpoints.json").read_text()) == {"step": 1}
        assert 0 < blocked == checkpointer.waited
        assert 4 * requests < len(service.asked)  # it waited for a few of some 60


def steps_of(directory):
    lines = (user_path(directory) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def test_what_was_logged_before_a_save_is_in_the_bucket(service):
    with MetricWriter(RUN, "student", 10) as writer:
        writer.write(1, {"loss": 1.0})
        writer.saving()()
        writer.write(2, {"loss": 1.0})
        assert steps_of(f"{RUN}/student") == [1]
        (events,) = (name for name in names(f"{RUN}/student") if "tfevents" in name)
        size = (user_path(RUN) / "student" / events).stat().length
    assert steps_of(f"{RUN}/student") == [1, 2]
    assert (user_path(RUN) / "student" / events).stat().length > size
    with MetricWriter(RUN, "student", 10, first_step=1) as writer:
        writer.write(3, {"loss": 1.0})
    assert steps_of(f"{RUN}/student") == [1, 3]
    assert (user_path(RUN) / "student" / events).stat().length == size
    with MetricWriter(RUN, "student", 10):
        pass
    assert steps_of(f"{RUN}/student") == []
    # The old file is gone; the new one of the same second may have its name.
    (events,) = (name for name in names(f"{RUN}/student") if "tfevents" in name)
    assert (user_path(RUN) / "student" / events).stat().length < size


# --- Runs -------------------------------------------------------------------------------------


def test_a_run_is_loaded_from_a_bucket(service, tmp_path):
    config = parse(tiny.get_config())
    data = DataShape.of(config.data.name, load_source(config.data))
    for workdir in (tmp_path, user_path(RUN)):
        save_run(config, data, workdir)
    here, there = (piflow_jax.load(path) for path in (tmp_path, RUN))
    np.testing.assert_array_equal(*(s.sample(0, [3]) for s in (here, there)))
    (_, here), (_, there) = (piflow_jax.load_teacher(path) for path in (tmp_path, RUN))
    jax.tree.map(np.testing.assert_array_equal, here, there)


# --- Weights ----------------------------------------------------------------------------------


def written(folder, arrays, form):
    """A weight file of a form, or a folder of shards; its path."""
    if form == "shards":
        where = {name: f"m-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(arrays)}
        for shard in set(where.values()):
            part = {name: arrays[name] for name in where if where[name] == shard}
            write_safetensors(folder / shard, part)
        index = folder / "m.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": where}))
        return folder
    path = folder / f"x.{form}"
    if form == "safetensors":
        write_safetensors(path, arrays)
    else:
        with tempfile.TemporaryDirectory() as here:
            copy_file(save_torch(epath.Path(here) / "x.pth", arrays), path)
    return path


@pytest.mark.parametrize("form", ["safetensors", "shards", "pth"])
def test_weights_in_a_bucket_are_those_on_a_disk(service, tmp_path, form):
    arrays = {"b": np.array(2.5, np.float32), "c": np.zeros((0, 3), np.float16)}
    arrays["a"] = np.random.default_rng(0).normal(size=(30, 7)).astype(ml_dtypes.bfloat16)
    here, there = (
        open_weights(written(folder, arrays, form)) for folder in map(user_path, (tmp_path, RUN))
    )
    service.refuse_every = 3
    for _ in range(2):
        assert_bit_equal({name: there[name] for name in here}, arrays)
    parts = (weights["a"][slice(3, 9), slice(5)] for weights in (here, there))
    np.testing.assert_array_equal(*parts)


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_weights_cut_short_in_a_bucket_are_named(service, tmp_path, keep):
    path = written(tmp_path, {"a": np.ones((9, 9), np.float32)}, "safetensors")
    cut = user_path(RUN) / "x.safetensors"
    cut.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=f"{RUN}/x.safetensors is damaged or cut short"):
        open_weights(cut)
    cut.write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match="run git lfs pull"):
        open_weights(cut)
    with pytest.raises(FileNotFoundError, match=f"{RUN}/none: no such weight file"):
        open_weights(f"{RUN}/none")


@pytest.mark.parametrize(
    ("status", "words"),
    [(401, "there are no valid credentials; run `gcloud auth"), (403, "may not read objects in")],
)
def test_weights_that_may_not_be_read_are_one_sentence(service, status, words):
    path = written(user_path(RUN), {"a": np.ones(3, np.float32)}, "safetensors")
    weights = open_weights(path)
    service.deny_all = status
    for read in (lambda: open_weights(path), lambda: np.asarray(weights["a"])):
        with pytest.raises(OSError, match=f"cannot read {RUN}/x.safetensors: .*{words}") as caught:
            read()
        assert "\n" not in str(caught.value)


def test_settings_and_notebooks_name_weights_in_a_bucket(service, tmp_path):
    settings = tiny.get_config()
    data = DataShape.of(settings.data.name, load_source(parse(settings).data))
    module = teacher_network(parse(settings).model, data)
    params = jax.jit(module.init)(jax.random.key(0))
    path = written(user_path(RUN), to_torch_state(module.module, params), "safetensors")
    settings.teacher.weights = str(path)
    loaded = load_teacher(parse(settings), data, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, loaded, nn.unbox(params))
    settings.teacher.weights = f"{RUN}/none"
    with pytest.raises(ConfigError, match=f"config.teacher.weights = '{RUN}/none': .*no such"):
        load_teacher(parse(settings), data, tmp_path)
    assert not (Path.cwd() / "gs:").exists()


def test_what_stands_beside_weights_is_found_in_a_bucket(service, tmp_path):
    adapter, vae = state("gm_flux+lora"), recorded("autoencoder_kl.npz")
    for folder in map(user_path, (tmp_path, RUN)):
        for name, arrays, beside, settings in (
            ("adapter", adapter, "adapter_config.json", {"lora_alpha": 6}),
            ("vae", vae, "config.json", {"norm_num_groups": 4, "scaling_factor": 0.5}),
        ):
            (folder / name).mkdir(parents=True, exist_ok=True)
            written(folder / name, arrays, "safetensors")
            (folder / name / beside).write_text(json.dumps(settings))
    plain = load("gm_flux+lora", adapter)
    found = [load("gm_flux+lora", open_weights(f"{place}/adapter")) for place in (tmp_path, RUN)]
    jax.tree.map(np.testing.assert_array_equal, *found)
    with pytest.raises(AssertionError):
        jax.tree.map(np.testing.assert_array_equal, found[0], plain)
    (here, expected), (there, found) = (open_autoencoder(f"{p}/vae") for p in (tmp_path, RUN))
    assert here == there and here.latent_scale == 0.5
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    path = written(user_path(RUN), {"fc.bias": np.ones(3, np.float32)}, "pth")
    weights, digest = read_inception(path)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest() and list(weights) == ["fc.bias"]


@pytest.mark.slow
def test_each_of_two_processes_reads_its_rows_alone(service, tmp_path):
    ours = two_processes.network()
    drawn = jax.tree.map(
        lambda leaf: np.random.default_rng(leaf.size).normal(size=leaf.shape).astype(leaf.dtype),
        abstract_variables(ours),
    )
    arrays = to_torch_state(ours.module, drawn)
    paths = [written(folder, arrays, "shards") for folder in map(user_path, (tmp_path, RUN))]
    meshes = [(2, 2, 1), (1, 2, 2)]
    (tmp_path / "paths.json").write_text(json.dumps([str(path) for path in paths]))
    (tmp_path / "meshes.json").write_text(json.dumps(meshes))
    service.refuse_every = 100
    said = two("read", tmp_path)
    # Both read all of what none of their axes in rows is divided by the devices: the output's rows,
    # which have another order here, and heads of norms.
    total = sum(array.nbytes for array in arrays.values())
    whole = sum(a.nbytes for n, a in arrays.items() if n.startswith("proj_out."))
    counted = [list(map(int, re.findall(r"read (\d+) bytes", log))) for log in said]
    assert not any("rematerialization" in log for log in said)
    assert counted == [[(total + whole) // 2] * 2 * len(meshes)] * 2


# --- Commands ---------------------------------------------------------------------------------
