"""The comparison of methods: its budget, what it refuses, and a whole one at toy size."""

import ast
import dataclasses
import inspect
import json
import os
import subprocess
import sys
import time
import types

import numpy as np
import pytest
from etils import epath

from piflow_jax.config import ConfigError, parse
from piflow_jax.data import load_digits_source
from piflow_jax.evaluation import load_features
from piflow_jax.modes import rivals as mode
from piflow_jax.modes.export import export
from piflow_jax.modes.rivals import _comparable, compare_rivals, interleaved_seconds
from piflow_jax.parallel import config_mesh
from piflow_jax.rivals import METHODS, Rival, find_method
from piflow_jax.rivals.base import changed
from piflow_jax.runs.changes import changed_settings
from piflow_jax.runs.checkpoint import CheckpointError
from piflow_jax.runs.loop import NonFiniteLossError, run_stage
from piflow_jax.systems.shapes import DataShape
from tests import tiny
from tests.compiled import on_devices
from tests.parallel.launched import ROOT
from tests.runs.test_loop import OPTIONS, make_stage


def toy(*methods):
    config = tiny.get_config()
    config.model.dit.time_scale = 1.0
    config.teacher.optimizer.warmup_steps = config.train.optimizer.warmup_steps = 0
    config.rivals.methods = methods
    config.rivals.seeds = (0,)
    config.rivals.nfes = (1, 2)
    config.rivals.seconds = 0.2
    config.rivals.rounds = 1
    config.rivals.pairs = 12
    config.rivals.pair_steps = 2
    return config


@pytest.mark.parametrize("method", ["sdxl", "gm_", "gm_2", "arc_nfe", "dmd_2nfe", "gm+student"])
def test_unknown_methods_are_refused_with_the_known_ones(method, tmp_path):
    with pytest.raises(ConfigError, match=f"there is no '.*{method[-2:]}'.*meanflow, shortcut"):
        compare_rivals(parse(toy("gm", method)), tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("data.name", "latents", "compares on pixels"),
        ("train.microbatches", 2, "must be 1"),
        ("train.initial", "runs/a", "config.train.initial must be empty"),
        ("teacher.orthogonal_guidance", 0.5, "config.teacher.orthogonal_guidance must be 0"),
        ("evaluation.every", 2, "config.evaluation.every must be 0"),
        ("train.nfe_choices", (1, 2), "config.train.nfe_choices must be empty"),
        ("train.corrector.kind", "frechet", "is for --mode=train and piflow_jax.distill"),
    ],
)
def test_settings_for_other_runs_are_refused(key, value, message, tmp_path):
    config = toy("gm")
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ConfigError, match=message):
        compare_rivals(parse(config), tmp_path)
    assert not list(tmp_path.iterdir())  # before anything is trained


def test_results_of_other_settings_are_not_mixed(tmp_path):
    kept = _comparable(parse(toy("gm")))
    assert "rivals.seeds" not in kept and "log_every" not in kept
    (tmp_path / "settings.json").write_text(json.dumps(kept | {"train.batch_size": 7}))
    with pytest.raises(ConfigError, match=r"config\.train\.batch_size = .* with 7; take that back"):
        compare_rivals(parse(toy("gm")), tmp_path)


class Reached(Exception):
    """The comparison got to its first step."""


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("load_teacher", "teacher's parameters"),
        ("load_source", "data's examples"),
        ("config_judge", "evaluation's judge"),
    ],
)
def test_results_of_another_teacher_data_or_judge_are_not_mixed(name, what, tmp_path, monkeypatch):
    """The settings are the same: paths, where something else lies now."""
    config, digits = toy("gm"), load_digits_source()
    config.teacher.checkpoint = "runs/teacher"
    other = {
        "load_teacher": {"w": np.ones(2)},
        "load_source": dataclasses.replace(digits, x=-digits.x),
        "config_judge": types.SimpleNamespace(digest="other"),
    }
    found = other | {"load_teacher": {"w": np.zeros(2)}, "load_source": digits}
    found["config_judge"] = load_features("digits")
    for each in found:
        monkeypatch.setattr(mode, each, lambda *_, each=each: found[each])

    def reached(comparison):
        raise Reached

    monkeypatch.setattr(mode._Comparison, "_times", reached)
    for _ in range(2):
        with pytest.raises(Reached):
            compare_rivals(parse(config), tmp_path)
    found[name] = other[name]
    with pytest.raises(ConfigError, match=rf"config\.{what} = .* but what .* another --workdir"):
        compare_rivals(parse(config), tmp_path)


def test_a_rival_goes_on_in_a_comparison_with_other_methods():
    """Half-trained, and not with another budget."""

    def stage(config):
        config = parse(config)
        source = load_digits_source()
        data = DataShape.of("digits", source)
        given = {"teacher": {}}
        mesh = config_mesh(config)
        return mode.rival_stage(config, source, data, METHODS["dmd"], given, mesh)

    kept = stage(toy("gm", "dmd")).config
    other = toy("dmd")
    other.rivals.seeds, other.rivals.rounds = (3, 4), 7
    changed = changed_settings(kept, stage(other), "place", 0)
    assert [change["key"] for change in changed] == [
        f"rivals.{key}" for key in ("methods", "rounds", "seeds")
    ]
    other.rivals.seconds = 0.3
    with pytest.raises(CheckpointError, match=r"config\.rivals\.seconds: .* 0\.2, asked for 0\.3"):
        changed_settings(kept, stage(other), "place", 0)


def test_an_arc_student_has_no_official_names(tmp_path):
    config = toy("arc")
    config.policy.kind = "arc"
    with pytest.raises(ConfigError, match=r"config\.policy\.kind = 'arc' has no official names"):
        export(parse(config), tmp_path)


@pytest.mark.parametrize(
    ("name", "kind", "nfe", "weight", "timed_as", "title"),
    [
        ("gm", "gm", 1, {}, "gm", "**pi-Flow, GM**"),
        ("arc_2nfe", "arc", 2, {}, "arc_2nfe", "ArcFlow, by pi-ID"),
        ("gm_02nfe", "gm", 2, {}, "gm_02nfe", "**pi-Flow, GM**"),
        (
            *("gm_adaptive", "gm", 1, {"train.adaptive_power": 1.0}),
            *("gm", "**pi-Flow, GM**, adaptive"),
        ),
        (
            *("gm_4nfe_timed", "gm", 4, {"train.time_power": 1.0}),
            *("gm_4nfe", "**pi-Flow, GM**, timed"),
        ),
        (
            *("gm_timed2", "gm", 1, {"train.time_power": 2.0}),
            *("gm", "**pi-Flow, GM**, timed2"),
        ),
        (
            *("gm_corrected", "gm", 1),
            {"train.corrector.kind": "critic", "train.corrector.share": 0.5},
            # Its second network takes time.
            *("gm_corrected", "**pi-Flow, GM**, corrected"),
        ),
    ],
)
def test_methods_name_their_policy_evaluations_and_loss(name, kind, nfe, weight, timed_as, title):
    method = find_method(name)
    assert method.settings == {"policy.kind": kind, "train.nfe": nfe} | weight
    assert (method.name, method.timed_as, method.title) == (name, timed_as, title)
    assert not isinstance(method, Rival)


def test_every_method_is_found_by_its_name_with_and_without_credit():
    for name, row in METHODS.items():
        assert find_method(name) == row and find_method(f"{name}+teacher").credit
    # What the configuration has where nothing is said.
    assert all(find_method(name).name == name for name in tiny.get_config().rivals.methods)


@pytest.mark.parametrize(
    ("name", "rate"),
    [("meanflow@0.3", 0.3), ("gm_timed@3", 3.0), ("consistency+teacher@1e-1", 0.03)],
)
def test_a_method_takes_another_learning_rate(name, rate):
    """Relative to the student's: consistency's own row has 0.3."""
    config = parse(toy("gm", name))
    used = find_method(name).configured(config).train.optimizer.learning_rate
    assert used == pytest.approx(rate * config.train.optimizer.learning_rate)


@pytest.mark.parametrize("factor", ["", "0", "-1", "nan", "inf", "3x"])
def test_a_factor_of_the_learning_rate_is_a_positive_number(factor, tmp_path):
    with pytest.raises(ConfigError, match=r"config.rivals.methods: 'gm@.*a positive number"):
        compare_rivals(parse(toy(f"gm@{factor}")), tmp_path)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("meanfow", "meanflow"),
        ("gm_adaptve", "gm_adaptive"),
        ("dmd_2nfe", "gm_2nfe"),
        ("arc_0nfe", "arc_2nfe"),
        ("gm_timed_2nfe", "gm_timed"),
    ],
)
def test_an_unknown_method_is_answered_with_the_nearest(name, meant, tmp_path):
    with pytest.raises(ConfigError, match=f"config.rivals.methods: .*did you mean {meant}"):
        compare_rivals(parse(toy("gm", name)), tmp_path)


def test_the_mode_knows_no_method_by_name():
    tree = ast.parse(inspect.getsource(mode))
    words = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert not words & METHODS.keys() and "teacher" in words


def test_pi_flows_endings_are_their_settings():
    config = parse(toy("gm"))
    changed_config = changed(config, find_method("arc_2nfe_timed").settings)
    assert changed_config.policy.kind == "arc"
    train = dataclasses.replace(config.train, nfe=2, time_power=1.0)
    assert changed_config.train == train and changed_config.rivals == config.rivals


@pytest.mark.parametrize(("ending", "drawn"), [("plain", 0.0), ("drawn", 1.0)])
def test_pi_flows_endings_replace_the_weights_of_the_run(ending, drawn):
    config = toy("gm")
    config.train.update({"time_power": 1.0, "adaptive_power": 1.0})
    train = find_method(f"gm_{ending}").configured(parse(config)).train
    assert (train.time_power, train.adaptive_power, train.state_power) == (0.0, 0.0, drawn)


def test_times_are_medians_of_rounds_in_turn(monkeypatch):
    """On a clock that only the calls move: 1 s and 3 s, but for one slow round."""
    now, order, slow = [0.0], [], iter([10.0, 1, 1, 1, 1, 1])

    def call(name, seconds):
        def run():
            order.append(name)
            now[0] += seconds() if callable(seconds) else seconds

        return run

    monkeypatch.setattr(time, "process_time", lambda: now[0])
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    found = interleaved_seconds({"a": call("a", lambda: next(slow)), "b": call("b", 3.0)}, 5)
    assert found == {"a": 1.0, "b": 3.0}
    assert order == ["a", "b"] * 6


def test_a_batch_may_exceed_the_data(tmp_path, monkeypatch):
    """As in training, also in the step that is timed with images in place of pairs."""
    digits = load_digits_source()
    few = dataclasses.replace(digits, x=digits.x[:5], condition=digits.condition[:5])
    monkeypatch.setattr(mode, "load_source", lambda _: few)
    monkeypatch.setattr(mode._Comparison, "_stage", lambda self, method, config, pairs: pairs)
    monkeypatch.setattr(mode._Comparison, "_stepper", lambda self, stage: stage)
    comparison = mode._Comparison(parse(toy("regression")), epath.Path(tmp_path), {})
    pairs = comparison._timed_call("regression")
    assert pairs.labels.tolist() == [*range(5), 0, 1, 2]


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("teacher", r"Lower the learning rate .*, and run again in another --workdir\."),
        ("gm", "Put gm with a smaller factor .*, such as gm@0.3, into config.rivals.methods"),
        ("dmd@10", "such as dmd@3, .* leave it out; what is finished stays"),
        ("meanflow+teacher@0.3", r"Put meanflow\+teacher with .* such as meanflow\+teacher@0.09,"),
    ],
)
def test_the_advice_after_a_bad_loss_can_be_followed(name, remedy, tmp_path):
    """Other settings are refused in the directory, which has what else is finished."""
    comparison = mode._Comparison(parse(toy("gm", "dmd@10")), epath.Path(tmp_path), {})
    comparison._teacher = {}
    if name == "teacher":
        stage = comparison._teacher_stage()
    else:
        stage = comparison._stage(find_method(name), comparison._config, None)
    bad = make_stage(poison_at=1)
    bad = dataclasses.replace(bad, tunable=stage.tunable, remedy=stage.remedy)
    with pytest.raises(NonFiniteLossError, match=remedy):
        run_stage(bad, tmp_path / "toy", **OPTIONS)


def test_a_step_is_timed_with_split_parameters(tmp_path):
    """Where training has them: a second call must take what the first one made."""
    environment = os.environ | on_devices(2) | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "tests" / "rivals" / "split_times.py", tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr


def test_a_given_teacher_counts_with_the_steps_that_it_has(tmp_path, monkeypatch):
    config = toy("gm", "meanflow+teacher")
    config.teacher.checkpoint, config.teacher.steps = "runs/teacher", 6
    methods = {name: find_method(name) for name in config.rivals.methods}
    monkeypatch.setattr(mode, "find_checkpoint", lambda path, stage: (path, 100, {}, {}))
    monkeypatch.setattr(mode._Comparison, "_timed_call", lambda *_: None)
    monkeypatch.setattr(mode, "interleaved_seconds", lambda calls, _: dict.fromkeys(calls, 2**-7))
    comparison = mode._Comparison(parse(config), epath.Path(tmp_path), methods)
    found = comparison._times()["methods"]
    assert found["gm"]["teacher_seconds"] == 100 / 2**7
    assert found["meanflow+teacher"]["steps"] - found["gm"]["steps"] == 100


def test_times_of_two_machines_are_not_compared(tmp_path, monkeypatch):
    """Methods timed elsewhere keep their steps; a further one would have another clock."""

    def times(*methods):
        config = toy(*methods)
        found = {name: find_method(name) for name in methods}
        return mode._Comparison(parse(config), epath.Path(tmp_path), found)._times()

    monkeypatch.setattr(mode._Comparison, "_timed_call", lambda *_: None)
    monkeypatch.setattr(mode, "interleaved_seconds", lambda calls, _: dict.fromkeys(calls, 1e-3))
    first = times("gm")
    monkeypatch.setattr(mode.os, "cpu_count", lambda: 96)
    assert times("gm") == first  # it was measured where it says
    with pytest.raises(ConfigError, match=r"methods: .*times\.json .* dmd would .* 96"):
        times("gm", "dmd")


@pytest.mark.slow
def test_a_whole_comparison_is_kept_and_continued(tmp_path, capfd):
    """Two processes' worth of work: the second finds the first one's results."""
    methods = ("gm", "arc_2nfe", "meanflow+teacher", "consistency", "regression", "dmd")
    report = compare_rivals(parse(toy(*methods)), tmp_path)
    evaluations = {}
    for row in report["rows"]:
        evaluations.setdefault(row["method"], []).append(row["nfe"])
        assert row["steps"] >= 1 and row["figures"]["frechet"] > 0
    assert evaluations == {
        "gm": [1],
        "arc_2nfe": [2],
        "meanflow+teacher": [1, 2],
        "consistency": [1, 2],
        "regression": [1],
        "dmd": [1, 2],
    }
    times = report["times"]["methods"]
    # What a method spends is its budget to within a step; a credit is the teacher's training.
    credit = times["gm"]["teacher_seconds"]
    for method, spent in times.items():
        budget = 0.2 + (credit if method.endswith("+teacher") else 0)
        assert budget - spent["step_seconds"] <= spent["train_seconds"] <= budget + 1e-9
    assert times["meanflow+teacher"]["teacher_seconds"] == 0
    assert times["regression"]["pairs_seconds"] > 0 == times["gm"]["pairs_seconds"]
    by_key = {(row["method"], row["nfe"]): row for row in report["rows"]}
    assert by_key["dmd", 1]["endpoint_mse"] is None
    assert by_key["consistency", 2]["endpoint_mse"] is None
    assert by_key["consistency", 1]["endpoint_mse"] > 0

    result = tmp_path / "gm" / "seed0" / "result.json"
    rows = json.loads(result.read_text())
    rows[0]["figures"]["frechet"] = -1.0
    result.write_text(json.dumps(rows))
    again = compare_rivals(parse(toy(*methods)), tmp_path)
    assert again["rows"][0]["figures"]["frechet"] == -1.0
    assert again["rows"][1:] == report["rows"][1:]
    changed = toy(*methods)
    changed.rivals.seconds = 0.3
    with pytest.raises(ConfigError, match=r"config\.rivals\.seconds = 0\.3, but .* made with 0\.2"):
        compare_rivals(parse(changed), tmp_path)
    capfd.readouterr()
