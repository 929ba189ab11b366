"""The loop: one compilation, exact resumption, bad losses, signals, contradicting settings."""

import dataclasses
import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from piflow_jax.buckets import is_remote
from piflow_jax.data import batches, load_digits_source
from piflow_jax.runs import loop
from piflow_jax.runs.checkpoint import Checkpointer, CheckpointError, restore_subtree
from piflow_jax.runs.loop import (
    Interrupted,
    Look,
    NonFiniteLossError,
    Stage,
    checkpoint_dir,
    run_stage,
)
from piflow_jax.training.state import TrainState
from tests.buckets import names

OPTIMIZER = optax.sgd(0.1)
BUCKET = ("bucket_wait", "bucket_repeats")  # what only a run in a bucket logs
OPTIONS = {"log_every": 2, "checkpoint_every": 4, "keep_checkpoints": 2}


def init():
    return TrainState.create({"params": {"w": jnp.ones((3,))}}, OPTIMIZER)


def make_stage(steps=10, *, on_trace=None, poison_at=None, hook=None, **config):
    def step(state, root, batch):
        if on_trace is not None:
            on_trace()
        noise = jax.random.normal(jax.random.fold_in(root, state.step), (3,))
        pull = jnp.mean(batch["x"]) + noise

        def loss_fn(params):
            return jnp.sum(jnp.square(params["params"]["w"] - pull))

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        updates, opt_state = OPTIMIZER.update(grads, state.opt_state)
        params = optax.apply_updates(state.params, updates)
        if poison_at is not None:
            loss = jnp.where(state.step + 1 == poison_at, jnp.nan, loss)
        return TrainState(state.step + 1, params, params, opt_state), {"loss": loss}

    data = batches(load_digits_source(), batch_size=8, seed=3)
    if hook is not None:
        data = Hooked(data, hook)
    return Stage(
        name="toy",
        init=init,
        step=step,
        constants=(jax.random.key(0),),
        data=data,
        steps=steps,
        batch_size=8,
        config={"steps": steps, "rate": 0.1} | config,
        extensible=("steps",),
        spec={"kind": "toy"},
    )


class Hooked:
    """A data iterator that calls something at every batch."""

    def __init__(self, data, hook):
        self._data, self._hook, self._count = data, hook, 0

    def __next__(self):
        self._count += 1
        self._hook(self._count)
        return next(self._data)

    def like(self):
        return self._data.like()

    def get_state(self):
        return self._data.get_state()

    def set_state(self, state):
        self._data.set_state(state)


def weights(state):
    return np.asarray(state.params["params"]["w"])


def lines(workdir):
    return map(json.loads, (workdir / "toy" / "metrics.jsonl").read_text().splitlines())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return weights(run_stage(make_stage(), tmp_path_factory.mktemp("whole"), **OPTIONS))


def test_step_is_traced_once(tmp_path, whole):
    traces = []
    state = run_stage(make_stage(on_trace=lambda: traces.append(1)), tmp_path, **OPTIONS)
    assert len(traces) == 1
    np.testing.assert_array_equal(weights(state), whole)


def test_nothing_compiles_inside_the_loop(tmp_path):
    compilations = []

    def listener(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compilations.append(duration)

    seen_at = {}

    def hook(count):
        seen_at[count] = len(compilations)

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        run_stage(make_stage(12, hook=hook), tmp_path, **OPTIONS)
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert compilations, "the listener heard nothing"
    # From the third batch on: the first is for compiling, the second may place its data.
    assert seen_at[12] == seen_at[3]


class Watched:
    """A metric that tells when it is fetched."""

    def __init__(self, value, on_fetch):
        self._value, self._on_fetch = value, on_fetch

    def __array__(self, *args, **kwargs):
        self._on_fetch()
        return np.asarray(self._value)


def test_metrics_are_fetched_when_the_next_step_has_been_started(tmp_path, monkeypatch):
    started, fetched = [], []
    compile_step = loop._Loop._compile

    def compile_watched(self, state, batch):
        compiled, flops = compile_step(self, state, batch)

        def call(*arguments):
            started.append(step := len(started) + 1)
            state, metrics = compiled(*arguments)
            saw = lambda: fetched.append((step, len(started)))  # noqa: E731
            return state, {"loss": Watched(metrics["loss"], saw)}

        return call, flops

    monkeypatch.setattr(loop._Loop, "_compile", compile_watched)
    run_stage(make_stage(), tmp_path, **(OPTIONS | {"checkpoint_every": 100}))
    assert fetched == [(step, min(step + 1, 10)) for step in range(1, 11)]


def test_interrupted_run_continues_exactly(place, whole):
    def hook(count):
        if count == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="SIGTERM: saved toy at step"):
        run_stage(make_stage(hook=hook), place, **OPTIONS)
    state = run_stage(make_stage(), place, **OPTIONS)
    np.testing.assert_array_equal(weights(state), whole)
    found = {name: {name in line for line in lines(place)} for name in BUCKET}
    assert found == {name: {is_remote(place)} for name in BUCKET}


def test_signal_in_the_last_step_ends_the_run_too(tmp_path):
    def hook(count):
        if count == 10:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="step 10"):
        run_stage(make_stage(hook=hook), tmp_path, **OPTIONS)


def during(monkeypatch, method, number):
    """Sends a signal when a method of the checkpointer is called."""
    original = getattr(Checkpointer, method)

    def signalled(self, *args, **kwargs):
        os.kill(os.getpid(), number)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Checkpointer, method, signalled)


@pytest.mark.parametrize("method", ["save", "close"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_while_the_end_is_saved_ends_the_run_too(place, monkeypatch, method, number):
    during(monkeypatch, method, number)
    with pytest.raises(Interrupted, match=f"{number.name}: saved toy at step 3") as stop:
        run_stage(make_stage(3), place, **OPTIONS)
    assert stop.value.signal == number.name
    assert names(checkpoint_dir(place, "toy")) == ["3"]


def test_signal_while_a_finished_stage_is_read_ends_the_run(tmp_path, monkeypatch):
    run_stage(make_stage(3), tmp_path, **OPTIONS)
    during(monkeypatch, "restore", signal.SIGTERM)
    with pytest.raises(Interrupted, match="SIGTERM: saved toy at step 3"):
        run_stage(make_stage(3), tmp_path, **OPTIONS)


@pytest.mark.parametrize("finished", [False, True])
def test_processes_leave_together_at_the_end(tmp_path, monkeypatch, finished):
    """Another one got the signal; this one hears of it when it asks."""
    if finished:
        run_stage(make_stage(3), tmp_path, **OPTIONS)
    gather = lambda asked: np.stack([asked, np.int32(1)])  # noqa: E731
    monkeypatch.setattr(loop.multihost_utils, "process_allgather", gather)
    asked = loop._agreed

    def of_two(requested):
        with monkeypatch.context() as two:
            two.setattr(jax, "process_count", lambda: 2)
            return asked(requested)

    monkeypatch.setattr(loop, "_agreed", of_two)
    with pytest.raises(Interrupted, match="SIGTERM: saved toy at step 3"):
        run_stage(make_stage(3), tmp_path, **OPTIONS)


def test_longer_run_extends_a_finished_one(tmp_path, whole):
    run_stage(make_stage(7), tmp_path, **OPTIONS)
    state = run_stage(make_stage(10), tmp_path, **OPTIONS)
    np.testing.assert_array_equal(weights(state), whole)


def test_finished_stage_is_not_run_again(place, whole):
    run_stage(make_stage(), place, **OPTIONS)

    def fail(count):
        raise AssertionError("took a batch")

    state = run_stage(make_stage(hook=fail), place, **OPTIONS)
    np.testing.assert_array_equal(weights(state), whole)


def test_other_settings_are_refused_by_name(place):
    run_stage(make_stage(4), place, **OPTIONS)
    with pytest.raises(
        CheckpointError, match=r"config.rate: the checkpoint has 0.1, asked for 0.2"
    ):
        run_stage(make_stage(8, rate=0.2), place, **OPTIONS)


@pytest.mark.parametrize(("poison", "good"), [(7, "step 4 in"), (3, "no checkpoint yet")])
def test_non_finite_loss_names_step_and_checkpoint(tmp_path, poison, good):
    with pytest.raises(NonFiniteLossError, match=f"nan at step {poison}; .*{good}"):
        run_stage(make_stage(poison_at=poison), tmp_path, **OPTIONS)


def test_data_that_are_not_finite_are_named(tmp_path):
    class Damaged(Hooked):
        def __next__(self):
            batch = super().__next__()
            return batch | {"x": np.where(self._count == 7, np.nan, batch["x"])}

    stage = make_stage()
    stage = dataclasses.replace(stage, data=Damaged(stage.data, lambda count: None))
    says = r"nan at step 7, because values of x in .*; .* is step 4 in .*Repair the data"
    with pytest.raises(NonFiniteLossError, match=says):
        run_stage(stage, tmp_path, **OPTIONS)


def test_non_finite_state_is_never_saved(place):
    with pytest.raises(NonFiniteLossError):
        run_stage(make_stage(poison_at=8), place, **OPTIONS)
    saved = sorted(p.name for p in (place / "toy" / "checkpoints").iterdir() if p.is_dir())
    assert saved == ["4"]


def test_loss_is_watched_between_log_lines(tmp_path):
    with pytest.raises(NonFiniteLossError, match="at step 5"):
        run_stage(make_stage(poison_at=5), tmp_path, **(OPTIONS | {"log_every": 100}))


def look_with(distances):
    """Looks whose distances are given by the number of the look."""

    def look(params, carried):
        distance = distances[look.count]
        look.count += 1
        look.seen.append(np.asarray(params["params"]["w"]))
        picture = np.zeros((4, 4, 3), np.uint8)
        return Look(figures={"frechet": distance}, images={"grid": picture}, distance=distance)

    look.count, look.seen = 0, []
    return look


def test_the_best_checkpoint_stays_beside_the_latest(place):
    look = look_with([3.0, 1.0, 2.0])
    stage = dataclasses.replace(make_stage(steps=12), look=look)
    run_stage(stage, place, look_every=4, **OPTIONS)
    assert names(checkpoint_dir(place, "toy/best")) == ["8"]
    best = restore_subtree(checkpoint_dir(place, "toy/best"), "ema_params", like())
    np.testing.assert_array_equal(best["params"]["w"], look.seen[1])
    last = restore_subtree(checkpoint_dir(place, "toy"), "ema_params", like())
    np.testing.assert_array_equal(last["params"]["w"], look.seen[2])
    seen = {line["step"]: line.get("eval_frechet") for line in lines(place)}
    assert {step: seen[step] for step in (4, 8, 12)} == {4: 3.0, 8: 1.0, 12: 2.0}


def test_a_continued_run_remembers_its_best(place):
    first = dataclasses.replace(make_stage(steps=8), look=look_with([1.0, 2.0]))
    run_stage(first, place, look_every=4, **OPTIONS)
    then = dataclasses.replace(make_stage(steps=16), look=look_with([1.5, 0.5]))
    run_stage(then, place, look_every=4, **OPTIONS)
    assert names(checkpoint_dir(place, "toy/best")) == ["16"]
    other = dataclasses.replace(make_stage(steps=20), look=look_with([0.7]))
    run_stage(other, place, look_every=4, **OPTIONS)
    assert names(checkpoint_dir(place, "toy/best")) == ["16"]
    (place / "toy" / "best" / "best.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"best\.json is damaged"):
        run_stage(make_look_again(), place, look_every=4, **OPTIONS)


def test_distances_of_other_settings_are_not_compared(place):
    """By fewer samples, for one, the distance of the same student is larger."""
    few, many = ({"config.evaluation.every_samples": count} for count in (20, 1000))

    def look_at(steps, distance, measured):
        stage = make_stage(steps=steps)
        stage = dataclasses.replace(stage, look=look_with([distance]), measured=measured)
        return run_stage(stage, place, look_every=4, **OPTIONS)

    look_at(4, 3.0, few)
    words = (
        r"best\.json has a distance .* with config\.evaluation\.every_samples = 20, which is 1000"
    )
    with pytest.raises(CheckpointError, match=words):
        look_at(8, 2.0, many)
    assert names(checkpoint_dir(place, "toy/best")) == ["4"]
    look_at(8, 2.5, few)
    assert names(checkpoint_dir(place, "toy/best")) == ["8"]
    # Older records do not say with what they were measured.
    record = place / "toy" / "best" / "best.json"
    record.write_text(json.dumps({"step": 8, "distance": 2.5}))
    look_at(12, 2.0, many)
    assert json.loads(record.read_text()) == {"step": 12, "distance": 2.0, "measured": many}


def test_a_best_checkpoint_of_another_run_is_not_taken_for_one_of_this(place):
    """What is left if only the latest checkpoints are removed, to begin anew otherwise."""

    def look_at(steps, distance, **config):
        stage = dataclasses.replace(make_stage(steps, **config), look=look_with([distance]))
        return run_stage(stage, place, look_every=4, **OPTIONS)

    look_at(4, 1.0)
    for path in (checkpoint_dir(place, "toy"), place / "toy" / "checkpoints.json"):
        path.rmtree() if path.is_dir() else path.unlink()
    with pytest.raises(CheckpointError, match=r"toy/best/checkpoints .* other settings:\n.*rate"):
        look_at(4, 2.0, rate=0.2)
    look_at(4, 2.0)  # of the same run, which was killed before its first checkpoint
    assert names(checkpoint_dir(place, "toy/best")) == ["4"]


def killed_after_the_look_at_step_6(workdir):
    """A run whose last checkpoint is of step 4, and whose best one of step 6."""

    def hook(count):
        if count == 7:
            raise ConnectionError("killed")

    stage = dataclasses.replace(
        make_stage(hook=hook), look=look_with([9.0, 8.0, 7.0, 6.0, 5.0, 3.0])
    )
    with pytest.raises(ConnectionError, match="killed"):
        run_stage(stage, workdir, look_every=1, **OPTIONS)
    assert names(checkpoint_dir(workdir, "toy")) == ["4"]
    assert names(checkpoint_dir(workdir, "toy/best")) == ["6"]


@pytest.mark.parametrize(
    ("distances", "step", "seed"),
    [
        ([2.0, 2.5, 2.5, 2.5], 5, 0),
        ([4.0, 2.0, 2.5, 2.5], 6, 1),  # the same step, another state
        ([4.0, 3.5, 3.5, 3.5], 6, 0),  # nothing better: what was the best stays
    ],
)
def test_a_better_one_at_a_step_that_is_passed_again_is_kept(tmp_path, distances, step, seed):
    killed_after_the_look_at_step_6(tmp_path)
    old = restore_subtree(checkpoint_dir(tmp_path, "toy/best"), "ema_params", like())
    look = look_with(distances)
    stage = dataclasses.replace(make_stage(8), look=look, constants=(jax.random.key(seed),))
    run_stage(stage, tmp_path, look_every=1, **OPTIONS)
    folder = checkpoint_dir(tmp_path, "toy/best")
    assert names(folder) == [str(step)]
    best = restore_subtree(folder, "ema_params", like())["params"]["w"]
    kept = min(distances) > 3
    expected = old["params"]["w"] if kept else look.seen[step - 5]
    np.testing.assert_array_equal(best, expected)
    record = json.loads((folder.parent / "best.json").read_text())
    assert record == {"step": step, "distance": 3.0 if kept else 2.0, "measured": {}}
    # The latest ones are untouched.
    assert names(checkpoint_dir(tmp_path, "toy")) == ["4", "8"]


def test_a_record_without_its_checkpoint_is_no_best(tmp_path):
    """What a run leaves that was killed when it had removed the old best and not saved the new."""
    killed_after_the_look_at_step_6(tmp_path)
    shutil.rmtree(checkpoint_dir(tmp_path, "toy/best") / "6")
    stage = dataclasses.replace(make_stage(8), look=look_with([4.0, 3.5, 3.6, 3.6]))
    run_stage(stage, tmp_path, look_every=1, **OPTIONS)
    assert names(checkpoint_dir(tmp_path, "toy/best")) == ["6"]


def test_a_best_checkpoint_whose_record_is_missing_gets_it(tmp_path):
    """What a run leaves that was killed when it had saved the new best and not its distance."""
    killed_after_the_look_at_step_6(tmp_path)
    record = tmp_path / "toy" / "best" / "best.json"
    record.write_text(json.dumps({"step": 5, "distance": 5.0, "measured": {}}))
    stage = dataclasses.replace(make_stage(8), look=look_with([5.0, 3.0, 4.0, 4.0]))
    run_stage(stage, tmp_path, look_every=1, **OPTIONS)
    assert json.loads(record.read_text()) == {"step": 6, "distance": 3.0, "measured": {}}
    assert names(checkpoint_dir(tmp_path, "toy/best")) == ["6"]


def make_look_again():
    return dataclasses.replace(make_stage(steps=24), look=look_with([0.6]))


def test_a_bad_loss_stops_before_anyone_looks(tmp_path):
    look = look_with([1.0])
    stage = dataclasses.replace(make_stage(poison_at=4), look=look)
    with pytest.raises(NonFiniteLossError):
        run_stage(stage, tmp_path, look_every=4, **OPTIONS)
    assert look.count == 0


def like():
    return {"params": {"w": jax.ShapeDtypeStruct((3,), jnp.float32)}}
