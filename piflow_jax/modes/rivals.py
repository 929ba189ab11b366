"""`--mode=rivals`: few-step methods against each other, on equal network, data and compute."""

import dataclasses
import functools
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh

from piflow_jax.config import Config, ConfigError, naming, parse
from piflow_jax.data import stacked
from piflow_jax.data.source import source_digest
from piflow_jax.distillation.bench import Bench
from piflow_jax.distillation.sizes import Sizes
from piflow_jax.distillation.stages import (
    PAIRS,
    STUDENT_DATA,
    STUDENT_INIT,
    STUDENT_STEPS,
    flat_settings,
    run_here,
    stage_batches,
    stream_key,
    student_stage,
    teacher_stage,
)
from piflow_jax.evaluation.kept import read_kept, read_kept_json
from piflow_jax.loading.runs import load_average, load_student, load_teacher
from piflow_jax.loading.weights import find_checkpoint
from piflow_jax.parallel import (
    ActivationSharding,
    config_mesh,
    global_batch,
    replicated,
)
from piflow_jax.rivals import CREDIT, RATE, Method, Rival, find_method
from piflow_jax.rivals.base import (
    Pairs,
    changed,
    endpoint_pairs,
    rival_sampler,
    rival_setting,
    rival_spec,
)
from piflow_jax.runs.fingerprints import tree_fingerprint
from piflow_jax.runs.loop import Stage, checkpoint_dir
from piflow_jax.runs.run_lock import RunLock
from piflow_jax.runs.steps import latest_step
from piflow_jax.runs.workdir import user_path
from piflow_jax.systems.assembly import Systems
from piflow_jax.systems.correctors import corrector_kind
from piflow_jax.systems.datasets import dataset, load_source, shape_of
from piflow_jax.systems.judges import config_judge
from piflow_jax.systems.networks import network_kind, teacher_network
from piflow_jax.systems.settings import check_choices, check_ours
from piflow_jax.systems.shapes import DataShape
from piflow_jax.systems.shardings import student_shardings, teacher_shardings
from piflow_jax.systems.spec import model_settings, updated_settings
from piflow_jax.whole_files import replacing, write_json

__all__ = ["compare_rivals"]

# Settings of what is compared, and of where and how a run goes on: no method's results depend on
# either.
_OF_THE_COMPARISON = ("rivals.methods", "rivals.seeds", "rivals.rounds")
_OF_THE_RUN = (
    *("mesh", "processes", "profile", "peak_flops", "compilation_cache", "topology"),
    *("log_every", "checkpoint_every", "keep_checkpoints"),
)
# Methods are compared with the ends of the flow's own paths.
_TEACHER_SOLVER = "euler"
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
      KeptFileError: a file that an earlier start left is damaged.
    """
    if dataset(config).latents:
        raise ConfigError(
            f"--mode=rivals compares on pixels, not on config.data.name = {config.data.name!r}"
        )
    if network_kind(config.model).conditioning(config.model.own).reads_text:
        raise ConfigError(
            "--mode=rivals compares class-conditional networks, not config.model.network = "
            f"{config.model.network!r}"
        )
    check_ours(config, "--mode=rivals")
    if jax.process_count() > 1:
        raise ConfigError("--mode=rivals runs in one process, whose devices share the work")
    settings = config.evaluation
    if settings.nfe or settings.weights or settings.checkpoint != "latest":
        raise ConfigError(
            "config.evaluation.nfe, weights and checkpoint are for one student: leave them at 0, "
            "empty and 'latest' with --mode=rivals"
        )
    if config.teacher.guidance_range:
        raise ConfigError(
            "config.teacher.guidance_range must be empty with --mode=rivals, whose methods have "
            "one guidance scale"
        )
    if config.teacher.orthogonal_guidance:
        raise ConfigError(
            "config.teacher.orthogonal_guidance must be 0 with --mode=rivals: methods that learn "
            "from data are guided without it"
        )
    if settings.every:
        raise ConfigError(
            "config.evaluation.every must be 0 with --mode=rivals, which measures trained methods"
        )
    if config.train.nfe_choices:
        raise ConfigError(
            "config.train.nfe_choices must be empty with --mode=rivals, whose methods are students "
            "of one number of evaluations each, such as gm and gm_2nfe"
        )
    if config.train.microbatches != 1:
        raise ConfigError("config.train.microbatches must be 1 with --mode=rivals")
    if config.train.initial:
        raise ConfigError(
            "config.train.initial must be empty with --mode=rivals, whose methods start at the "
            "teacher or from scratch"
        )
    corrector = corrector_kind(config)
    if corrector is not None and corrector.of_data:
        raise ConfigError(
            f"config.train.corrector.kind = {config.train.corrector.kind!r} is for --mode=train "
            "and piflow_jax.distill, not for --mode=rivals"
        )
    with naming("config.rivals.methods"):
        methods = {name: find_method(name) for name in config.rivals.methods}
        for method in methods.values():
            check_choices(parse(dataclasses.asdict(method.configured(config)), None))
    workdir = user_path(workdir)
    with RunLock(workdir):
        return _Comparison(config, workdir, methods).run()


class _Comparison:
    """The comparison in one work directory."""

    def __init__(self, config: Config, workdir: epath.Path, methods: dict[str, Method]):
        self._config, self._workdir, self._methods = config, workdir, methods
        self._mesh: Mesh = config_mesh(config)
        self._source = load_source(config.data)
        self._data = shape_of(config, self._source)
        self._systems = Systems.of(config, self._data, getattr(self._source, "null", None))

    def run(self) -> dict[str, Any]:
        config, data = self._config, self._data
        sizes = Sizes(self._systems, self._source)
        sizes.check_run()
        sizes.check_pairs()
        self._check_kept("settings.json", "", _comparable(config))
        judge = config_judge(config, self._source, self._workdir)
        if not (config.teacher.checkpoint or config.teacher.weights):
            run_here(self._teacher_stage(), config, self._workdir, self._mesh)
        teacher = teacher_network(config.model, data)
        shardings = teacher_shardings(config, self._mesh, teacher)
        self._teacher = load_teacher(config, data, self._workdir, shardings)
        inputs = {
            "teacher's parameters": tree_fingerprint(self._teacher),
            "data's examples": source_digest(self._source),
            "evaluation's judge": judge.digest,
        }
        self._check_kept("inputs.json", "the fingerprint of ", inputs)
        times = self._times()
        bench = Bench(config, self._source, data, judge)
        teacher_rows, reference = self._teacher_rows(bench)
        of_data = bench.of_data()
        report = {"rows": [], "teacher": teacher_rows, "times": times}
        report |= of_data | {"floor": dataclasses.asdict(of_data["floor"])}
        for index, seed in enumerate(config.rivals.seeds):
            for name, spent in times["methods"].items():
                report["rows"] += self._result(name, seed, spent, bench, reference)
            report["protocol"] = bench.protocol() | {
                "seed": list(config.rivals.seeds[: index + 1]),
                "batch_size": config.train.batch_size,
                "optimizer": config.train.optimizer.kind,
                "teacher_steps": self._teacher_steps,
                "teacher_solver": _TEACHER_SOLVER,
            }
            write_json(self._workdir / "rivals.json", report)
            logging.info("wrote %s, seeds to %d", self._workdir / "rivals.json", seed)
        return report

    def _check_kept(self, name: str, of: str, found: dict[str, Any]) -> None:
        """Refuses to mix results of different settings or inputs in one work directory.

        Args:
          name: the file that keeps them.
          of: what comes before a key in the message.
          found: today's, by key.
        """
        path = self._workdir / name
        if path.exists():
            kept = read_kept_json(path, dict, "pass another --workdir")
            for key in sorted(kept.keys() | found.keys()):
                if kept.get(key) != found.get(key):
                    raise ConfigError(
                        f"{of}config.{key} = {found.get(key)!r}, but what {self._workdir} holds "
                        f"was made with {kept.get(key)!r}; take that back, or pass another "
                        "--workdir"
                    )
        write_json(path, found)

    # --- Times -----------------------------------------------------------------------------------

    def _times(self) -> dict[str, Any]:
        """Step times, steps and seconds of every method, from times measured once."""
        config, path = self._config, self._workdir / "times.json"
        measured = read_kept_json(path, dict) if path.exists() else {}
        here = _machine()
        machine = measured.pop("machine", here)  # older files do not say
        timed_as = {name: method.timed_as or method.name for name, method in self._methods.items()}
        names = dict.fromkeys((*timed_as.values(), "teacher", "pairs"))
        missing = [name for name in names if name not in measured]
        if missing and machine | {"jax": here["jax"]} != here:
            raise ConfigError(
                f"config.rivals.methods: {path} has times of {machine}, and {', '.join(missing)} "
                f"would be timed on {here}; continue on the former, or pass another --workdir"
            )
        if missing:
            calls = {name: self._timed_call(name) for name in missing}
            measured |= interleaved_seconds(calls, config.rivals.rounds)
            write_json(path, {"machine": machine} | measured)
        rivals = config.rivals
        pairs_seconds = -(-rivals.pairs // config.evaluation.batch_size) * measured["pairs"]
        teacher_seconds = self._teacher_steps * measured["teacher"]
        methods = {}
        for name, method in self._methods.items():
            total = rivals.seconds + (teacher_seconds if method.credit else 0)
            before = pairs_seconds if method.given == "pairs" else 0.0
            if before >= total:
                raise ConfigError(
                    f"config.rivals.seconds ({rivals.seconds}) must be above the {before:.0f} s "
                    "that config.rivals.pairs take on this machine"
                )
            step_seconds = measured[timed_as[name]]
            steps = int((total - before) / step_seconds)
            warmup = config.train.optimizer.warmup_steps
            if steps <= warmup:
                raise ConfigError(
                    f"config.rivals.seconds ({rivals.seconds}) buys {steps} steps of {name} "
                    f"here, which must be more than config.train.optimizer.warmup_steps ({warmup})"
                )
            methods[name] = {
                "step_seconds": step_seconds,
                "steps": steps,
                "pairs_seconds": before,
                "train_seconds": before + steps * step_seconds,
                "teacher_seconds": 0.0 if method.given == "data" else teacher_seconds,
            }
        settings = flat_settings(dataclasses.asdict(rivals))
        return {"methods": methods, "settings": settings} | machine

    @functools.cached_property
    def _teacher_steps(self) -> int:
        """Steps of the teacher's training; weights do not say, and have those of the settings."""
        given = self._config.teacher
        if not given.checkpoint:
            return given.steps
        return find_checkpoint(user_path(given.checkpoint), "teacher")[1]

    def _timed_call(self, name: str) -> Callable[[], None]:
        """One step of a method or of the teacher, or one call for pairs."""
        config = self._config
        if name == "pairs":
            return lambda: jax.block_until_ready(self._make_pairs(0))
        if name == "teacher":
            return self._stepper(self._teacher_stage())
        source, size = self._source, config.train.batch_size
        some = stacked([source[i % len(source)] for i in range(size)])
        pairs = Pairs(some["x"], some["x"], some["condition"])
        pairs = jax.device_put(pairs, replicated(self._mesh))
        return self._stepper(self._stage(find_method(name), config, pairs))

    def _stepper(self, stage: Stage) -> Callable[[], None]:
        # Where training has them.
        places = stage.shardings(jax.eval_shape(stage.init, *stage.init_arguments))
        state = jax.jit(stage.init, out_shardings=places)(*stage.init_arguments)
        batch = global_batch(next(stage.data), self._mesh)
        results = places, replicated(self._mesh)
        step = jax.jit(stage.step, donate_argnums=0, out_shardings=results)
        with jax.set_mesh(self._mesh):
            compiled = step.lower(state, *stage.constants, batch).compile()
        held = [state]

        def call():
            held[0], metrics = compiled(held[0], *stage.constants, batch)
            jax.block_until_ready(metrics)

        return call

    def _teacher_stage(self) -> Stage:
        """Training of the teacher, with settings that the directory holds fast."""
        stage = teacher_stage(self._systems, self._source, self._mesh)
        return dataclasses.replace(stage, tunable=())

    # --- Methods ---------------------------------------------------------------------------------

    def _stage(self, method: Method, config: Config, pairs: Pairs | None) -> Stage:
        """Training of a method at the length and with the seed that the settings have."""
        config, source, mesh = method.configured(config), self._source, self._mesh
        if isinstance(method, Rival):
            given = {"teacher": self._teacher}
            if method.given == "pairs":
                given["pairs"] = pairs
            stage = rival_stage(config, source, self._data, method, given, mesh)
        else:
            systems = Systems.of(config, self._data, self._systems.null)
            stage = student_stage(systems, source, self._teacher, mesh)
        name = method.name + (CREDIT if method.credit else "")
        factor = 0.3 * method.rate / find_method(method.name).rate
        remedy = (
            f"Put {name} with a smaller factor of its learning rate, such as "
            f"{name}{RATE}{factor:.2g}, into config.rivals.methods in its place, or leave it out; "
            "what is finished stays."
        )
        return dataclasses.replace(stage, remedy=remedy)

    @functools.cached_property
    def _make_pairs(self) -> Callable[[int], Pairs]:
        config = self._config
        key, size = stream_key(config, PAIRS), config.evaluation.batch_size
        make = functools.partial(endpoint_pairs, config, self._data, key, size)
        return functools.partial(jax.jit(make), self._teacher)

    @functools.cached_property
    def _pairs(self) -> Pairs:
        """Pairs for all methods and seeds: the same ones, made anew by every process that runs."""
        count, size = self._config.rivals.pairs, self._config.evaluation.batch_size
        parts = [self._make_pairs(i) for i in range(-(-count // size))]
        pairs = jax.tree.map(lambda *leaves: np.concatenate(leaves)[:count], *parts)
        # Where a step finds them without a copy from the host.
        return jax.device_put(pairs, replicated(self._mesh))

    def _result(
        self, name: str, seed: int, times: dict[str, float], bench: Bench, reference: np.ndarray
    ) -> list[dict[str, Any]]:
        """Rows of a method and a seed, trained and measured if they are not there yet."""
        place = self._workdir / name / f"seed{seed}"
        path = place / "result.json"
        if path.exists():
            return read_kept_json(path, list)
        logging.info("%s, seed %d: %d steps", name, seed, times["steps"])
        method = self._methods[name]
        config = changed(self._config, {"seed": seed, "train.steps": times["steps"]})
        pairs = self._pairs if method.given == "pairs" else None
        stage = self._stage(method, config, pairs)
        continued = latest_step(checkpoint_dir(place, stage.name)) is not None
        began = time.perf_counter()
        run_here(stage, config, place, self._mesh)
        wall = None if continued else time.perf_counter() - began
        rows = []
        for nfe, sampler, params in self._samplers(method, config, place):
            samples, seconds = bench.sample(sampler, params, f"{name}, {nfe} NFE")
            ends = reference if method.follows(nfe) else None
            row = dataclasses.asdict(bench.row(name, nfe, samples, seconds, ends))
            del row["system"]
            rows.append({"method": name, "seed": seed} | row | times | {"wall_seconds": wall})
        write_json(path, rows)
        return rows

    def _samplers(self, method: Method, config: Config, place: epath.Path):
        """`(nfe, sampler, parameters)` of a trained method."""
        config, data = method.configured(config), self._data
        if not isinstance(method, Rival):
            sampler = Systems.of(config, data).student_sampler()
            yield config.train.nfe, sampler, load_student(config, data, place)
            return
        network, spec = method.network(config.model, data), rival_spec(config, data, method.name)
        params = load_average(checkpoint_dir(place, "rival"), network, spec)
        for nfe in method.nfes(config):
            yield nfe, rival_sampler(config, data, method, nfe), params

    def _teacher_rows(self, bench: Bench) -> tuple[list[dict[str, Any]], np.ndarray]:
        """Rows of the teacher and its endpoints, kept for the next start."""
        path, endpoints = self._workdir / "teacher.json", self._workdir / "endpoints.npy"
        if path.exists() and endpoints.exists():
            return read_kept_json(path, list), read_kept(endpoints, np.load)
        config, data = self._config, self._data
        teacher, systems = load_teacher(config, data, self._workdir), Systems.of(config, data)
        rows, reference = [], None
        for steps in reversed(config.evaluation.teacher_steps):
            sampler = systems.teacher_sampler(steps, _TEACHER_SOLVER)
            samples, seconds = bench.sample(sampler, teacher, f"teacher, {steps} NFE")
            row = bench.row("teacher", steps, samples, seconds, reference)
            rows.append(dataclasses.asdict(row))
            reference = samples if reference is None else reference
        with replacing(endpoints) as under_way:
            np.save(under_way, reference)
        write_json(path, rows[::-1])
        return rows[::-1], reference


def rival_stage(
    config: Config, source, data: DataShape, rival: Rival, given: dict[str, Any], mesh: Mesh
) -> Stage:
    """Training of a rival, whose length and learning rate are those of `config.train`.

    Args:
      config: the run's settings.
      source: images or latents.
      data: what they look like.
      rival: the method.
      given: the teacher's parameters as `teacher`, and `pairs` for those that need them.
      mesh: the devices.

    Returns:
      The stage, called `rival`.
    """
    settings = config.train
    draw = getattr(source, "draw", None)
    setting = rival_setting(config, data, rival, ActivationSharding(mesh), draw)
    key = jax.random.split(stream_key(config, STUDENT_INIT))[0]
    groups = {"seed": config.seed, "data.name": config.data.name, "method": rival.name}
    groups["model"] = model_settings(config.model)
    groups |= {group: getattr(config, group) for group in ("teacher", "train", "rivals")}
    return Stage(
        name="rival",
        init=lambda teacher: rival.init(setting, key, teacher),
        step=rival.step(setting),
        constants=(given, stream_key(config, STUDENT_STEPS)),
        data=stage_batches(mesh, source, settings.batch_size, config.seed + STUDENT_DATA),
        steps=settings.steps,
        batch_size=settings.batch_size,
        config=flat_settings(groups),
        extensible=_OF_THE_COMPARISON,
        updated=updated_settings,
        spec=rival_spec(config, data, rival.name),
        init_arguments=(given["teacher"],),
        shardings=lambda state: student_shardings(config, mesh, state, setting.network),
    )


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


def _machine() -> dict[str, Any]:
    """What step times depend on in addition to the settings."""
    return {
        "clock": "cores" if jax.default_backend() == "cpu" else "wall",
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "jax": jax.__version__,
    }


def _comparable(config: Config) -> dict[str, Any]:
    """The settings that a kept result depends on, by key."""
    free = (*_OF_THE_COMPARISON, *_OF_THE_RUN)
    flat = flat_settings(dataclasses.asdict(config))
    return {key: value for key, value in flat.items() if not key.startswith(free)}
