"""The training loop: one stage from its last checkpoint to its last step."""

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from piflow_jax.arguments import prefixed
from piflow_jax.data import BatchIterator
from piflow_jax.parallel import device_mesh, gathered, global_batch, replicated
from piflow_jax.parallel.flops import flops
from piflow_jax.parallel.processes import over_devices
from piflow_jax.runs.best import BestCheckpoint
from piflow_jax.runs.changes import CHANGES, changed_settings
from piflow_jax.runs.checkpoint import Checkpointer, CheckpointError, read_spec
from piflow_jax.runs.metrics import MetricWriter, OnMetrics
from piflow_jax.runs.monitor import Monitor, step_memory
from piflow_jax.runs.signals import GracefulExit
from piflow_jax.runs.steps import falling_back, latest_step
from piflow_jax.runs.workdir import user_path
from piflow_jax.training.state import TrainState

# The processes exchange signals under this name, as places in the list. The largest one decides.
_LEAVE = "leave"
_SIGNALS = (None, "SIGTERM", "SIGINT")
_LONG = 1.0  # seconds of waiting that are worth a line


class Interrupted(RuntimeError):
    """A signal ended the run after a checkpoint was saved.

    Attributes:
      signal: its name, such as `SIGTERM`.
    """

    def __init__(self, signal: str, stage: str, step: int):
        super().__init__(
            f"{signal}: saved {stage} at step {step}; the same command continues from there"
        )
        self.signal = signal


class NonFiniteLossError(RuntimeError):
    """The loss, or what is to be saved, became NaN or infinite."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Look:
    """What was seen of a network while it trains.

    Attributes:
      figures: by name; written as `eval_<name>`.
      images: pictures `uint8[H, W, 3]` by name.
      distance: what makes a checkpoint the best, smaller is better; None if there is no measure.
      space: the feature space of the figures, for the log.
    """

    figures: Mapping[str, float]
    images: Mapping[str, np.ndarray]
    distance: float | None
    space: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage of training and everything that it needs.

    Attributes:
      name: `teacher` or `student`; also its directory in the work directory.
      init: makes the first state of `init_arguments`; called under jit, its result is made where
        it belongs.
      step: pure step `(state, *constants, batch) -> (state, metrics)`; metrics have `loss`.
      constants: arguments of the step that it neither changes nor donates.
      data: endless batches with a position.
      steps: where the stage ends.
      batch_size: examples per step, for the throughput.
      config: settings that decide what the stage computes; a resumed run must have the same.
      extensible: keys of `config` that a resumed run may change.
      tunable: keys of `config` that may change while steps are left: what was done stays, and what
        follows is done with the new ones. The change is logged, and recorded in the checkpoints.
      identified: more such keys, by the key of `config` that has the identity of what they made. A
        checkpoint that does not have that key yet is bound to them instead.
      updated: brings settings that an older version recorded to today's keys.
      spec: what the checkpoint says of itself.
      init_arguments: see `init`.
      shardings: where a state lies, `state -> shardings`; by default all of it on every device.
      look: looks at averaged parameters and at what is carried besides them, with one copy of both
        on this process's devices.
      measured: settings that the distances of looks depend on, and that a resumed run may change.
      remedy: sentences about what to do after a loss that is not finite; by default to lower the
        learning rate.
    """

    name: str
    init: Callable[..., TrainState]
    step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    constants: tuple[Any, ...]
    data: BatchIterator
    steps: int
    batch_size: int
    config: Mapping[str, Any]
    extensible: tuple[str, ...] = ()
    tunable: tuple[str, ...] = ()
    identified: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    updated: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict
    spec: Mapping[str, Any]
    init_arguments: tuple[Any, ...] = ()
    shardings: Callable[[TrainState], Any] | None = None
    look: Callable[[Any, Any], Look] | None = None
    measured: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    remedy: str = ""


def checkpoint_dir(workdir: str | os.PathLike, stage: str) -> epath.Path:
    """Where a stage's checkpoints lie."""
    return user_path(workdir) / stage / "checkpoints"


def run_stage(
    stage: Stage,
    workdir: str | os.PathLike,
    *,
    log_every: int,
    checkpoint_every: int,
    keep_checkpoints: int,
    look_every: int = 0,
    mesh: Mesh | None = None,
    profile: tuple[int, ...] = (),
    peak_flops: float = 0.0,
    on_metrics: OnMetrics | None = None,
) -> TrainState:
    """Runs a stage to its end, from its latest checkpoint if it has one.

    The step is compiled ahead of the loop, and again for batches of another shape when the first
    of them comes: prompts come in several aspect ratios. Metrics are fetched one step late, so the
    host never waits for the device; a checkpoint is saved only after its step's loss and the state
    itself have been seen to be finite.

    Args:
      stage: what to run.
      workdir: the run's directory.
      log_every: steps between metrics.
      checkpoint_every: steps between checkpoints; the last step always has one.
      keep_checkpoints: checkpoints kept.
      look_every: steps between looks, which also keep the best checkpoint in `<stage>/best`.
      mesh: devices that share the batch; by default all of them.
      profile: first and last step to profile, into the stage's directory; empty for none.
      peak_flops: see `Monitor`.
      on_metrics: see `MetricWriter`.

    Returns:
      The state after the last step.

    Raises:
      CheckpointError: the checkpoint cannot be used or is beyond the stage's end, or one cannot be
        written.
      NonFiniteLossError: the loss or the state is not finite; names the step and the last good
        checkpoint.
      Interrupted: SIGTERM or SIGINT came; the state is saved.
    """
    mesh = mesh or device_mesh()
    directory = checkpoint_dir(workdir, stage.name)
    options = {"keep": keep_checkpoints, "record": True}
    # The signals' own effects come back last: what comes while the end is saved, or a finished
    # stage is read, counts too, or the program would go on with the next stage.
    with GracefulExit() as leaving, Checkpointer(directory, **options) as checkpointer:
        abstract = jax.eval_shape(stage.init, *stage.init_arguments)
        if stage.shardings is None:
            shardings = jax.tree.map(lambda _: replicated(mesh), abstract)
        else:
            shardings = stage.shardings(abstract)
        if (checkpointer.latest_step() or 0) < stage.steps:
            logging.info("%s: %s steps; compiling", stage.name, f"{stage.steps:,}")
        state, step, changes = _first_state(stage, checkpointer, abstract, shardings)
        if step < stage.steps:
            checkpointers = [checkpointer]
            monitor = Monitor(
                stage.name,
                directory.parent if jax.process_index() == 0 else None,
                batch_size=stage.batch_size,
                peak=peak_flops,
                profile=profile,
                saving=lambda: sum(one.waited for one in checkpointers),
            )
            looks = contextlib.nullcontext()
            if stage.look is not None and look_every:
                best = checkpoint_dir(workdir, f"{stage.name}/best")
                if (kept := latest_step(best)) is not None:  # perhaps of a run that is gone
                    changed_settings(read_spec(best, kept)[2], stage, best, step)
                looks = BestCheckpoint(best, stage.measured)
                checkpointers.append(looks.checkpointer)
            writer = MetricWriter(
                workdir,
                stage.name,
                stage.steps,
                first_step=step,
                print_every=10 * log_every,
                on_metrics=on_metrics,
            )
            with writer, monitor, looks as best:
                loop = _Loop(
                    stage,
                    mesh,
                    shardings,
                    checkpointer,
                    dict(stage.config) | ({CHANGES: changes} if changes else {}),
                    writer,
                    monitor,
                    leaving,
                    log_every,
                    checkpoint_every,
                )
                state, step = loop.run(state, step, look_every, best)
        else:
            logging.info("%s: already trained to step %d (%s)", stage.name, step, directory)
    leave = _agreed(leaving.requested)
    if leave is not None:
        raise Interrupted(leave, stage.name, step)
    return state


def _agreed(requested: str | None) -> str | None:
    """The signal by which to leave, of those that the processes got."""
    asked = np.int32(_SIGNALS.index(requested))
    return _SIGNALS[int(multihost_utils.process_allgather(asked).max())]


def _not_finite(batch: Any) -> str:
    """The names of a batch's arrays that are not finite on this process's devices."""
    return ", ".join(
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_leaves_with_path(batch)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
        and not all(np.isfinite(part.data).all() for part in leaf.addressable_shards)
    )


def _first_state(
    stage: Stage, checkpointer: Checkpointer, abstract: TrainState, shardings
) -> tuple[TrainState, int, list[dict[str, Any]]]:
    """The state to start with, its step, and the changes of settings on the way to it."""
    last = checkpointer.latest_step()
    if last is None:
        return jax.jit(stage.init, out_shardings=shardings)(*stage.init_arguments), 0, []
    abstract = jax.tree.map(lambda leaf, place: leaf.update(sharding=place), abstract, shardings)
    restored = checkpointer.restore(abstract)
    changed = changed_settings(restored.config, stage, checkpointer.directory, last)
    with prefixed(checkpointer.directory, to=CheckpointError):
        stage.data.set_state(restored.data_state)
    logging.info("%s: continuing from step %d (%s)", stage.name, last, checkpointer.directory)
    for change in changed:
        text = "%s: from step %d on, config.%s is %r instead of %r"
        logging.info(text, stage.name, last, change["key"], change["to"], change["was"])
    return restored.state, last, [*restored.config.get(CHANGES, ()), *changed]


@dataclasses.dataclass
class _Loop:
    """The loop proper; a class for the handful of things that every part of it needs."""

    stage: Stage
    mesh: Mesh
    shardings: Any
    checkpointer: Checkpointer
    config: Mapping[str, Any]
    writer: MetricWriter
    monitor: Monitor
    leaving: GracefulExit
    log_every: int
    checkpoint_every: int

    def __post_init__(self):
        self._last_saved: int | None = self.checkpointer.latest_step()
        self._several = jax.process_count() > 1
        self._programs: dict[Any, tuple[Callable, int]] = {}

    def run(
        self,
        state: TrainState,
        start: int,
        look_every: int = 0,
        best: BestCheckpoint | None = None,
    ) -> tuple[TrainState, int]:
        """Trains to the stage's end, or to the step after which a signal ends it; saves that."""
        stage = self.stage
        # Before the first batch is read: data in a bucket is on its way meanwhile.
        self._program(state, self._placed(stage.data.like()))
        self._all_finite = self._compile_check(state)
        batch = self._next_batch()
        metrics = pending = None
        self.monitor.start(start, stage.steps)
        for step in range(start + 1, stage.steps + 1):
            program, count = self._program(state, batch)
            self.monitor.before(step, metrics, count)
            seen = metrics
            state, metrics = program(state, *stage.constants, batch)
            if pending is not None:
                self._report(*pending)
            end = step == stage.steps
            last = end or self._asked_to_leave(seen)
            pending = (step, metrics, batch)
            if best is not None and step % look_every == 0:
                self._finite(*pending)
                self._report(*pending, looked=self._look(step, state, best))
                pending = None
            if last or step % self.checkpoint_every == 0:
                if pending is not None:
                    self._report(*pending)
                pending = None
                with self.monitor.compiling():
                    self._save(step, state)
            if last:
                break
            batch = self._next_batch()
        before = self.checkpointer.waited
        self.checkpointer.wait()
        if (seconds := self.checkpointer.waited - before) > _LONG:
            self.writer.say(f"{stage.name}  waited {seconds:.1f} s for its last checkpoint")
        return state, step

    def _next_batch(self):
        with self.monitor.waiting():
            batch = next(self.stage.data)
        return self._placed(batch)

    def _placed(self, batch):
        """This process's rows on its devices, as the step takes them."""
        batch = global_batch(batch, self.mesh)
        if self._several:
            # Whether this process was asked to leave travels with its share of the batch.
            asked = _SIGNALS.index(self.leaving.requested)
            here = np.full(len(self.mesh.local_devices), asked, np.int32)
            batch[_LEAVE] = over_devices(here, self.mesh)
        return batch

    def _asked_to_leave(self, seen: Mapping[str, jax.Array] | None) -> bool:
        """Whether a signal ends the run after this step.

        Several processes go by what all of them see in the metrics of the step before, which are
        on the host by now: whichever got the signal, all leave after the same step.
        """
        if not self._several:
            return self.leaving.requested is not None
        return seen is not None and int(np.asarray(seen[_LEAVE])) > 0

    def _program(self, state, batch) -> tuple[Callable, int]:
        """The step, compiled for batches of this shape, and the FLOPs of its networks."""
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(batch))
        if shapes not in self._programs:
            if self._programs:
                self.writer.say(f"{self.stage.name}  compiling for batches of another shape")
            with self.monitor.aside() if self._programs else contextlib.nullcontext():
                self._programs[shapes] = self._compile(state, batch)
        return self._programs[shapes]

    def _compile(self, state, batch):
        began = time.perf_counter()

        def with_leave(state, *arguments):
            *constants, batch = arguments
            asked = batch.pop(_LEAVE)
            state, metrics = self.stage.step(state, *constants, batch)
            return state, metrics | {_LEAVE: jnp.max(asked)}

        step = jax.jit(
            with_leave if self._several else self.stage.step,
            donate_argnums=0,
            out_shardings=(self.shardings, replicated(self.mesh)),
        )
        with jax.set_mesh(self.mesh):  # kernels split their batch over it
            lowered = step.lower(state, *self.stage.constants, batch)
            counted = flops(step, state, *self.stage.constants, batch, scopes=("optimizer",))
        compiled = lowered.compile()
        seconds = time.perf_counter() - began
        memory = step_memory(compiled)
        self.writer.say(
            f"{self.stage.name}  step compiled in {seconds:.1f} s, "
            f"{memory['peak'] / 2**20:,.0f} MiB per device"
        )
        return compiled, counted.needed - counted.by_scope["optimizer"]

    def _compile_check(self, state) -> Callable:
        """Whether a state has no NaN and no infinity, compiled ahead like the step."""

        def all_finite(state):
            leaves = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.inexact)]
            return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))

        return jax.jit(all_finite, out_shardings=replicated(self.mesh)).lower(state).compile()

    def _look(self, step: int, state: TrainState, best: BestCheckpoint) -> dict[str, float]:
        """Figures and pictures of the averaged parameters; keeps the state if it is the best."""
        began = time.perf_counter()
        with self.monitor.aside():
            look = self.stage.look(*gathered((state.ema_params, state.carried), self.mesh))
            self.writer.images(step, look.images)
            text = "  ".join(f"{name} {value:.4g}" for name, value in look.figures.items())
            if look.space:
                text += f"  (in {look.space})"
            if self._several:
                # Orbax's barriers of two saves that are in flight at once have the same names.
                self.checkpointer.wait()
            if look.distance is not None and best.offer(
                step, look.distance, lambda *where: self._save_to(step, state, *where)
            ):
                text += "  (best so far)"
                if self._several:
                    best.checkpointer.wait()
            seconds = time.perf_counter() - began
            self.writer.say(f"{self.stage.name}  look at step {step:,} in {seconds:.1f} s  {text}")
        return {f"eval_{name}": value for name, value in look.figures.items()}

    def _report(
        self,
        step: int,
        metrics: Mapping[str, jax.Array],
        batch: Any,
        looked: Mapping[str, float] | None = None,
    ) -> None:
        values = self._finite(step, metrics, batch)
        if step % self.log_every and step != self.stage.steps and not looked:
            return
        values |= looked or {}
        values |= self.monitor.figures(step)
        self.writer.write(step, values)

    def _finite(self, step: int, metrics: Mapping[str, jax.Array], batch: Any) -> dict[str, float]:
        """The metrics of a step with a batch, on the host, if its loss is finite."""
        values = {
            name: float(np.asarray(value)) for name, value in metrics.items() if name != _LEAVE
        }
        if not np.isfinite(values["loss"]):
            what = f"the loss of {self.stage.name} is {values['loss']} at step {step}"
            raise self._diverged(what, step - 1, _not_finite(batch))
        return values

    def _diverged(self, what: str, bad: int, data: str = "") -> NonFiniteLossError:
        """The error that says which checkpoint is good, and what to do.

        Args:
          what: what was seen.
          bad: the step whose parameters it was seen of.
          data: the arrays of its batch that are to blame.
        """
        directory, saved = self.checkpointer.directory, self._last_saved
        with contextlib.suppress(CheckpointError):  # what is being saved counts too
            self.checkpointer.wait()
        good = f"the last good checkpoint is step {saved} in {directory}."
        if saved is None:
            good = f"there is no checkpoint yet in {directory}."
        elif saved == bad and not data:
            path = directory / str(saved)
            good = f"the checkpoint {path} gives it. Delete {falling_back(path)}."
        if data:
            return NonFiniteLossError(
                f"{what}, because values of {data} in its batch are not finite; {good} Repair the "
                "data, and run again."
            )
        tunable = ", ".join(f"config.{key}" for key in self.stage.tunable)
        then = f"; a run may go on with other {tunable}." if tunable else " in another --workdir."
        lower = f"Lower the learning rate or raise its warm-up, and run again{then}"
        return NonFiniteLossError(f"{what}; {good} {self.stage.remedy or lower}")

    def _save(self, step: int, state: TrainState) -> None:
        self._save_to(step, state, self.checkpointer)
        self._last_saved = step
        self.writer.say(f"{self.stage.name}  checkpoint of step {step:,}")

    def _save_to(
        self,
        step: int,
        state: TrainState,
        checkpointer: Checkpointer,
        then: Callable[[], None] | None = None,
    ) -> None:
        stage = self.stage
        # The loss that was seen is that of the parameters before this step's update.
        if not np.asarray(self._all_finite(state)):
            raise self._diverged(f"the state of {stage.name} is not finite after step {step}", step)
        checkpointer.save(
            step,
            state,
            data_state=stage.data.get_state(),
            config=self.config,
            spec=stage.spec,
            first=self.writer.saving(),
            then=then,
        )
