"""`--mode=rivals`: few-step methods against each other, on equal network, data and compute."""

import dataclasses
import functools
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from piflow_jax.config import Config, ConfigError
from piflow_jax.data import load_source
from piflow_jax.evaluation import FEATURE_SPACES
from piflow_jax.parallel import config_mesh, global_batch, local_mesh, replicated
from piflow_jax.stages.measuring import Bench
from piflow_jax.stages.systems import (
    load_student,
    load_teacher,
    student_sampler,
    teacher_sampler,
    teacher_shardings,
)
from piflow_jax.stages.train import (
    pairs_key,
    rival_stage,
    run_here,
    student_stage,
    teacher_stage,
)
from piflow_jax.training.checkpoint import restore_subtree
from piflow_jax.training.loop import Stage, checkpoint_dir
from piflow_jax.training.networks import DataShape, abstract_params, teacher_network
from piflow_jax.training.rivals import (
    RIVALS,
    Pairs,
    endpoint_pairs,
    rival_sampler,
    rival_setting,
)
from piflow_jax.training.run_lock import RunLock

__all__ = ["compare_rivals"]

POLICY_METHOD = re.compile(r"(?P<kind>gm|arc)(_(?P<nfe>\d+)nfe)?(_(?P<loss>adaptive|timed))?")
# Weights of pi-ID that are no part of its paper, by the end of a method's name.
LOSSES = {"adaptive": {"adaptive_power": 1.0}, "timed": {"time_power": 1.0}}
CREDIT = "+teacher"
# Settings of where and how a run goes on, which its results do not depend on.
_OF_THE_RUN = (
    *("mesh", "processes", "profile", "peak_flops", "compilation_cache", "topology"),
    *("log_every", "checkpoint_every", "keep_checkpoints"),
)
# Of one method in one round of the timing, at least.
ROUND_SECONDS = 0.5


def compare_rivals(config: Config, workdir: str | os.PathLike) -> dict[str, Any]:
    """Trains every method with every seed for the same time, measures and tabulates them.

    The time of a step is measured first, all methods in turn, and kept in `times.json`: a method's
    number of steps is `config.rivals.seconds` over it, less what its teacher's endpoints cost. What
    is finished is kept, in `<method>/seed<k>/result.json`, so that the same command goes on where
    it was interrupted.

    Args:
      config: the run's settings.
      workdir: the run's directory; `rivals.json` is the report.

    Returns:
      The report, which is written after each seed.

    Raises:
      ConfigError: there is no such method, or settings that are for other data.
      CheckpointError: a checkpoint is unusable or contradicts the settings.
    """
    if config.data.name not in FEATURE_SPACES:
        raise ConfigError(f"--mode=rivals compares on {', '.join(FEATURE_SPACES)}")
    if config.model.network != "dit":
        raise ConfigError("--mode=rivals compares objectives of config.model.network = 'dit'")
    if jax.process_count() > 1:
        raise ConfigError("--mode=rivals runs in one process, whose devices share the work")
    settings = config.evaluation
    if settings.nfe or settings.weights or settings.checkpoint != "latest":
        raise ConfigError(
            "config.evaluation.nfe, weights and checkpoint are for one student: leave them at 0, "
            "empty and 'latest' with --mode=rivals"
        )
    if config.train.microbatches != 1:
        raise ConfigError("config.train.microbatches must be 1 with --mode=rivals")
    for method in config.rivals.methods:
        _check_method(method)
    workdir = Path(workdir).absolute()
    with RunLock(workdir):
        return _Comparison(config, workdir).run()


def _check_method(method: str) -> None:
    name = method.removesuffix(CREDIT)
    if name not in RIVALS and not POLICY_METHOD.fullmatch(name):
        raise ConfigError(
            f"config.rivals.methods: there is no {method!r}; there are gm and arc, with _2nfe and "
            f"the like behind them, and {', '.join(RIVALS)}, each with {CREDIT!r} behind it or not"
        )


def _timed_as(method: str) -> str:
    """Whose step time a method has: a weight of the loss costs nothing that a clock would show."""
    name = method.removesuffix(CREDIT)
    match = POLICY_METHOD.fullmatch(name)
    return name.removesuffix(f"_{match['loss']}") if match and match["loss"] else name


class _Comparison:
    """The comparison in one work directory."""

    def __init__(self, config: Config, workdir: Path):
        self._config, self._workdir = config, workdir
        self._mesh: Mesh = config_mesh(config)
        self._source = load_source(config.data.name, config.data.data_dir or None)
        self._data = DataShape.of(config.data.name, self._source)

    def run(self) -> dict[str, Any]:
        config, data = self._config, self._data
        self._check_settings()
        if not (config.teacher.checkpoint or config.teacher.weights):
            stage = teacher_stage(config, self._source, data, self._mesh)
            run_here(stage, config, self._workdir, self._mesh)
        abstract = abstract_params(teacher_network(config.model, data))
        shardings = teacher_shardings(config, self._mesh, abstract)
        self._teacher = load_teacher(config, data, self._workdir, shardings)
        times = self._times()
        bench = Bench(config)
        teacher_rows, reference = self._teacher_rows(bench)
        of_data = bench.of_data()
        report = {"rows": [], "teacher": teacher_rows, "times": times}
        report |= of_data | {"floor": dataclasses.asdict(of_data["floor"])}
        for index, seed in enumerate(config.rivals.seeds):
            for method in config.rivals.methods:
                spent = times["methods"][method]
                report["rows"] += self._result(method, seed, spent, bench, reference)
            report["protocol"] = bench.protocol() | {
                "seed": list(config.rivals.seeds[: index + 1]),
                "batch_size": config.train.batch_size,
                "optimizer": config.train.optimizer.kind,
                "teacher_steps": config.teacher.steps,
            }
            _write(self._workdir / "rivals.json", report)
            logging.info("wrote %s, seeds to %d", self._workdir / "rivals.json", seed)
        return report

    def _check_settings(self) -> None:
        """Refuses to mix results of different settings in one work directory."""
        path = self._workdir / "settings.json"
        settings = _comparable(self._config)
        if path.exists():
            kept = json.loads(path.read_text(encoding="utf-8"))
            for key in sorted(kept.keys() | settings.keys()):
                if kept.get(key) != settings.get(key):
                    raise ConfigError(
                        f"config.{key} = {settings.get(key)!r}, but what {self._workdir} holds was "
                        f"made with {kept.get(key)!r}; take that back, or pass another --workdir"
                    )
        _write(path, settings)

    # --- Times -----------------------------------------------------------------------------------

    def _times(self) -> dict[str, Any]:
        """Step times, steps and seconds of every method, from times measured once."""
        config, path = self._config, self._workdir / "times.json"
        measured = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        names = dict.fromkeys(_timed_as(method) for method in config.rivals.methods)
        names = [name for name in (*names, "teacher", "pairs") if name not in measured]
        if names:
            calls = {name: self._timed_call(name) for name in names}
            measured |= interleaved_seconds(calls, config.rivals.rounds)
            _write(path, measured)
        rivals = config.rivals
        calls = -(-rivals.pairs // config.evaluation.batch_size)
        pairs_seconds = calls * measured["pairs"]
        teacher_seconds = config.teacher.steps * measured["teacher"]
        methods = {}
        for method in rivals.methods:
            name = method.removesuffix(CREDIT)
            total = rivals.seconds + (teacher_seconds if method.endswith(CREDIT) else 0)
            given = RIVALS[name].given if name in RIVALS else "teacher"
            before = pairs_seconds if given == "pairs" else 0.0
            if before >= total:
                raise ConfigError(
                    f"config.rivals.seconds ({rivals.seconds}) must be above the {before:.0f} s "
                    "that config.rivals.pairs take on this machine"
                )
            step_seconds = measured[_timed_as(method)]
            steps = int((total - before) / step_seconds)
            warmup = config.train.optimizer.warmup_steps
            if steps <= warmup:
                raise ConfigError(
                    f"config.rivals.seconds ({rivals.seconds}) buys {steps} steps of {method} "
                    f"here, which must be more than config.train.optimizer.warmup_steps ({warmup})"
                )
            methods[method] = {
                "step_seconds": step_seconds,
                "steps": steps,
                "pairs_seconds": before,
                "train_seconds": before + steps * step_seconds,
                "teacher_seconds": 0.0 if given == "data" else teacher_seconds,
            }
        return {
            "methods": methods,
            "settings": _jsonable(dataclasses.asdict(rivals)),
            "clock": "cores" if jax.default_backend() == "cpu" else "wall",
            "device": jax.devices()[0].device_kind,
            "cores": os.cpu_count(),
            "jax": jax.__version__,
        }

    def _timed_call(self, name: str) -> Callable[[], None]:
        """One step of a method or of the teacher, or one call for pairs."""
        config = self._config
        if name == "pairs":
            make = self._pairs_maker()
            return lambda: jax.block_until_ready(make(0))
        if name == "teacher":
            return self._stepper(teacher_stage(config, self._source, self._data, self._mesh))
        settings = self._settings(name, config.train.steps, config.seed)
        pairs = Pairs(*(self._example()[key] for key in ("image", "image", "label")))
        return self._stepper(self._stage(name, settings, self._on_devices(pairs)))

    def _example(self) -> dict[str, jax.Array]:
        size = self._config.train.batch_size
        return {
            "image": np.asarray(self._source.images[:size]),
            "label": np.asarray(self._source.labels[:size], np.int32),
        }

    def _stepper(self, stage: Stage) -> Callable[[], None]:
        state = jax.jit(stage.init)(*stage.init_arguments)
        batch = global_batch(next(stage.data), self._mesh)
        step = jax.jit(stage.step, donate_argnums=0)
        with jax.set_mesh(self._mesh):
            compiled = step.lower(state, *stage.constants, batch).compile()
        held = [state]

        def call():
            held[0], metrics = compiled(held[0], *stage.constants, batch)
            jax.block_until_ready(metrics)

        return call

    # --- Methods ---------------------------------------------------------------------------------

    def _settings(self, name: str, steps: int, seed: int) -> Config:
        """The run's settings as one method has them."""
        config = self._config
        train = dataclasses.replace(config.train, steps=steps)
        policy = config.policy
        match = POLICY_METHOD.fullmatch(name)
        if match:
            weights = LOSSES.get(match["loss"], {})
            train = dataclasses.replace(train, nfe=int(match["nfe"] or 1), **weights)
            policy = dataclasses.replace(policy, kind=match["kind"])
        return dataclasses.replace(config, seed=seed, train=train, policy=policy)

    def _stage(self, name: str, config: Config, pairs: Pairs | None) -> Stage:
        if name not in RIVALS:
            return student_stage(config, self._source, self._data, self._teacher, self._mesh)
        given = {"teacher": self._teacher}
        if RIVALS[name].given == "pairs":
            given["pairs"] = pairs
        return rival_stage(config, self._source, self._data, name, given, self._mesh)

    def _pairs_maker(self) -> Callable[[int], Pairs]:
        config = self._config
        setting = rival_setting(config, self._data, RIVALS["reflow"])
        size, steps = config.evaluation.batch_size, config.rivals.pair_steps
        make = jax.jit(
            lambda params, index: endpoint_pairs(setting, params, pairs_key(config), size, steps)(
                index
            )
        )
        return lambda index: make(self._teacher, index)

    @functools.cached_property
    def _pairs(self) -> Pairs:
        """Pairs for all methods and seeds: the same ones, made anew by every process that runs."""
        count = self._config.rivals.pairs
        make = self._pairs_maker()
        parts = [make(i) for i in range(-(-count // self._config.evaluation.batch_size))]
        pairs = jax.tree.map(lambda *leaves: np.concatenate(leaves)[:count], *parts)
        return self._on_devices(pairs)

    def _on_devices(self, pairs: Pairs) -> Pairs:
        """Pairs where a step finds them without a copy from the host."""
        return jax.device_put(pairs, replicated(self._mesh))

    def _result(
        self,
        method: str,
        seed: int,
        times: dict[str, float],
        bench: Bench,
        reference: np.ndarray,
    ) -> list[dict[str, Any]]:
        """Rows of a method and a seed, trained and measured if they are not there yet."""
        place = self._workdir / method / f"seed{seed}"
        path = place / "result.json"
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
        logging.info("%s, seed %d: %d steps", method, seed, times["steps"])
        name = method.removesuffix(CREDIT)
        config = self._settings(name, times["steps"], seed)
        needs_pairs = name in RIVALS and RIVALS[name].given == "pairs"
        stage = self._stage(name, config, self._pairs if needs_pairs else None)
        began = time.perf_counter()
        run_here(stage, config, place, self._mesh)
        wall = time.perf_counter() - began
        rows = []
        for nfe, sampler, params, comparable in self._samplers(name, config, place):
            samples, seconds = bench.sample(sampler, params)
            row = bench.row(method, nfe, samples, seconds, reference if comparable else None)
            row = {"method": method, "seed": seed} | dataclasses.asdict(row)
            del row["system"]
            rows.append(row | times | {"wall_seconds": wall})
        _write(path, rows)
        return rows

    def _samplers(self, name: str, config: Config, place: Path):
        """`(nfe, sampler, parameters, whether endpoints are comparable)` of a trained method."""
        data = self._data
        if name not in RIVALS:
            params = load_student(config, data, place)
            yield config.train.nfe, student_sampler(config, data), params, True
            return
        rival = RIVALS[name]
        module = rival_setting(config, data, rival).module
        where = replicated(local_mesh())
        like = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
            abstract_params(module),
        )
        params = restore_subtree(checkpoint_dir(place, "rival"), "ema_params", like)
        for nfe in (1,) if rival.one_step else config.rivals.nfes:
            # Fresh noise, or no tie to the teacher's paths, leaves nothing to compare.
            follows = not rival.fake and (rival.sampler == "jump" or nfe == 1)
            yield nfe, rival_sampler(config, data, name, nfe), params, follows

    def _teacher_rows(self, bench: Bench) -> tuple[list[dict[str, Any]], np.ndarray]:
        """Rows of the teacher and its endpoints, kept for the next start."""
        path, endpoints = self._workdir / "teacher.json", self._workdir / "endpoints.npy"
        if path.exists() and endpoints.exists():
            return json.loads(path.read_text(encoding="utf-8")), np.load(endpoints)
        config, data = self._config, self._data
        teacher = load_teacher(config, data, self._workdir)
        rows, reference = [], None
        for steps in reversed(config.evaluation.teacher_steps):
            samples, seconds = bench.sample(teacher_sampler(config, data, steps), teacher)
            rows.append(
                dataclasses.asdict(bench.row("teacher", steps, samples, seconds, reference))
            )
            reference = samples if reference is None else reference
        np.save(endpoints, reference)
        _write(path, rows[::-1])
        return rows[::-1], reference


def interleaved_seconds(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Seconds of each call: the median of several rounds in which all take turns.

    On a CPU these are seconds of its cores together, which other work on the machine hardly
    changes; elsewhere of the clock. Taking turns lets what does change hit all alike.

    Args:
      calls: what to time, by name; each waits for its result.
      rounds: rounds.

    Returns:
      Seconds by name.
    """
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    for call in calls.values():
        call()
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            count, began, until = 0, clock(), time.perf_counter() + ROUND_SECONDS
            while not count or time.perf_counter() < until:
                call()
                count += 1
            found[name].append((clock() - began) / count)
    return {name: float(np.median(values)) for name, values in found.items()}


def _comparable(config: Config) -> dict[str, Any]:
    """The settings that a kept result depends on, by key."""
    flat = flatten_dict(dataclasses.asdict(config), sep=".")
    free = ("rivals.methods", "rivals.seeds", "rivals.rounds", *_OF_THE_RUN)
    return _jsonable({key: v for key, v in flat.items() if not key.startswith(free)})


def _jsonable(values: dict[str, Any]) -> dict[str, Any]:
    return {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}


def _write(path: Path, values: Any) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
