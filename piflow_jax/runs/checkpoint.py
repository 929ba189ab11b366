"""Checkpoints: the one module behind which Orbax sits, where nothing is silently "not found".

A step is a directory `<directory>/<step>/` with two Orbax items: `state`, the arrays, and `meta`,
one JSON document: data position, configuration, what sampling needs (the *spec*), and dtype, shape
and fingerprint of every leaf. Orbax renames a finished save into place: a killed process leaves a
temporary directory, never half a step. TensorStore notices missing and truncated files but returns
flipped bytes of array data as if they were right; the fingerprints catch those.
"""

import contextlib
import json
import os
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from piflow_jax.arguments import prefixed
from piflow_jax.buckets import is_remote
from piflow_jax.runs.fingerprints import leaf_table
from piflow_jax.runs.quiet import quiet
from piflow_jax.runs.steps import (
    CheckpointError,
    bad_step,
    cannot,
    complete_steps,
    is_step,
    latest_step,
    listed,
    missing_parts,
    recorded_step,
    unreadable,
    write_record,
)
from piflow_jax.runs.workdir import checkpoint_path

Path = str | os.PathLike

_FORMAT = 1


class Restored(NamedTuple):
    """What `Checkpointer.restore` returns."""

    step: int
    state: Any
    data_state: dict
    config: dict
    spec: dict


class Checkpointer(contextlib.AbstractContextManager):
    """Saves and restores training runs in one directory; use it as a context manager.

    Saving is asynchronous: `save` returns once the arrays are copied to the host, so the caller may
    donate them. An error in the background is raised by the next `save`, `wait` or `close`. With
    several processes every method is called by all of them.

    Args:
      directory: where the steps lie; made absolute, and created.
      keep: how many of the latest steps to keep.
      record: note the last complete step next to the directory, in `<directory>.json`. Every reader
        then notices that this step was removed or renamed.
      rewind: a save removes the steps from its own on, where they hold anything else, instead of
        being refused: what a continued run finds there is of the run before it was killed.

    Attributes:
      waited: seconds for which callers of `save` and `wait` have waited: for an earlier save, for
        the directory and for copies to the host. Fingerprints are not in them.

    Raises:
      CheckpointError: the directory cannot be created, read or written, or holds only other things.
      ConfigError: see `checkpoint_path`.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep: int = 2,
        record: bool = False,
        rewind: bool = False,
    ):
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        quiet()
        self.directory = checkpoint_path(directory)
        self._rewind = rewind
        self.waited = 0.0
        self._first: Callable[[], None] | None = None
        # What follows a save waits for it on a thread of its own, since Orbax has no such hook.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._ending: Future | None = None
        # A scan before Orbax tidies up: reports unfinished saves, refuses foreign directories.
        complete_steps(self.directory, report=True, writing=True)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._commit),
        )
        try:
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        except OSError as error:
            raise cannot("open", self.directory, error) from error
        local = not is_remote(self.directory)
        if local and not self.directory.exists():  # of several processes, the first one makes it
            raise _unshared(f"there is no {self.directory} here, where process 0 made one")
        if local and not os.access(self.directory, os.W_OK | os.X_OK):
            error = PermissionError("the directory is read-only for this user")
            raise cannot("write checkpoints to", self.directory, error)
        self._record = record and jax.process_index() == 0
        if self._record:  # a run without one, or one that was killed before it could write it
            latest = latest_step(self.directory)
            if latest != recorded_step(self.directory):
                self._note(latest)

    def __exit__(self, kind, value, traceback) -> None:
        """Closes; an exception already on its way out is not replaced by a failed save's."""
        try:
            self.close()
        except CheckpointError as error:
            if value is None:
                raise
            logging.error("while leaving after %s: %s", kind.__name__, error)

    def latest_step(self) -> int | None:
        """The last complete step, after any save in flight has ended.

        Returns:
          The step, or None when the directory is absent or truly holds no checkpoint. The step's
          contents are not read: `restore` does that, and raises rather than take another one.

        Raises:
          CheckpointError: the directory holds only foreign files, lacks the last step that was
            saved there, cannot be read, or a save failed; or processes find different steps.
        """
        self.wait()
        step = latest_step(self.directory)
        if jax.process_count() > 1:  # each would go on from its own, and wait for the others
            here = np.int32(-1 if step is None else step)
            found = multihost_utils.process_allgather(here).tolist()
            if len(set(found)) > 1:
                steps = listed([f"step {one}" if one >= 0 else "none" for one in found])
                raise _unshared(f"processes find different steps in {self.directory} ({steps})")
        return step

    def save(
        self,
        step: int,
        state: Any,
        *,
        data_state: Mapping,
        config: Mapping,
        spec: Mapping,
        first: Callable[[], None] | None = None,
        then: Callable[[], None] | None = None,
    ) -> bool:
        """Starts saving a step; returns when the arrays may be changed or donated.

        Args:
          step: the number of optimiser steps done.
          state: a pytree of `jax.Array` and `np.ndarray` leaves (no typed PRNG keys, no scalars).
          data_state: the input pipeline's position; like the next two, JSON (tuples become lists).
          config: the run's configuration.
          spec: what sampling needs to know.
          first: called in the background after all is written, before the step counts as complete;
            what it raises, the save does.
          then: called in the background when the step is complete; what it raises, the save does.

        Returns:
          True, or False when exactly this state is already saved as this step.

        Raises:
          CheckpointError: an earlier save failed, the directory has a later step or a different
            state for this step (unless it may `rewind`), or cannot be written.
          TypeError: a leaf is not an array, or a mapping is not JSON.
        """
        meta = {
            "format": _FORMAT,
            "step": step,
            "data_state": _as_json(data_state, "data_state"),
            "config": _as_json(config, "config"),
            "spec": _as_json(spec, "spec"),
            "leaves": leaf_table(state, fingerprints=True),
        }
        with self._waiting():
            return self._start(step, state, meta, first, then)

    def _start(self, step, state, meta, first, then) -> bool:
        self._end_save()
        last = self._manager.latest_step()
        if last is not None and step <= last:
            saved = _read_meta(self.directory / str(last))["leaves"] if step == last else None
            if saved == meta["leaves"]:
                # What comes after it may be missing: a run may be killed between the two.
                self._ending = self._worker.submit(self._follow, step, then)
                return False
            if not self._rewind:
                raise CheckpointError(
                    f"refusing to save step {step} to {self.directory}: it already holds step "
                    f"{last}{' with a different state' if step == last else ''}. Resume from that "
                    "step, or pass another --workdir."
                )
            self._remove_from(step)
        self._first = first
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            meta=ocp.args.JsonSave({"meta": meta, "crc32": _crc(meta)}),
        )
        try:
            self._manager.save(step, args=args, force=True)
        except Exception as error:
            raise cannot(f"save step {step} to", self.directory, error) from error
        self._ending = self._worker.submit(self._follow, step, then)
        return True

    def _commit(self) -> None:
        """Called by Orbax when a step is written, before it is marked or renamed as complete."""
        if self._first is not None:
            self._first()

    def _follow(self, step: int, then: Callable[[], None] | None) -> None:
        """Waits for a save, and does what comes after it."""
        try:
            self._manager.wait_until_finished()
        except Exception:  # whoever waits for the save is given it too
            return
        if self._record:  # before the step is complete, a killed run would seem to lack it
            self._note(step)
        if then is not None:
            then()

    def _note(self, step: int) -> None:
        try:
            write_record(self.directory, step)
        except OSError as error:
            raise cannot("write to", self.directory.parent, error) from error

    def _remove_from(self, step: int) -> None:
        multihost_utils.sync_global_devices("rewind")  # another process may be reading there
        try:
            for later in [saved for saved in self._manager.all_steps() if saved >= step]:
                self._manager.delete(later)
        except Exception as error:
            raise cannot(f"remove steps from {step} on from", self.directory, error) from error

    def restore(self, state_like: Any, step: int | None = None) -> Restored:
        """Restores a step exactly: same dtypes, shapes and bits.

        Args:
          state_like: a tree of the state's structure with `jax.ShapeDtypeStruct` or array leaves. A
            leaf's sharding says where the values go (the first local device when a ShapeDtypeStruct
            has none); an `np.ndarray` leaf is restored as one.
          step: which step, by default the latest.

        Returns:
          The step with its state and its JSON parts.

        Raises:
          CheckpointError: there is no such step, or it is corrupt, partial or unlike `state_like`.
        """
        self.wait()
        step, path, meta = _open(self.directory, step)
        abstract = jax.tree.map(_abstract, state_like)
        _check_leaves(meta["leaves"], leaf_table(abstract), path)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        try:
            state = self._manager.restore(step, args=args)["state"]
        except Exception as error:
            raise unreadable(path, error) from error
        _check_values(meta["leaves"], state, path)
        return Restored(step, state, meta["data_state"], meta["config"], meta["spec"])

    def wait(self) -> None:
        """Waits for the save in flight.

        Raises:
          CheckpointError: the save failed.
        """
        with self._waiting():
            self._end_save()

    def close(self) -> None:
        """Waits for the save in flight and lets the directory go.

        Raises:
          CheckpointError: the save failed.
        """
        with self._waiting():
            self._end_save(self._manager.close)

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.waited += time.perf_counter() - began

    def _end_save(self, *more: Callable[[], None]) -> None:
        try:
            for wait in (self._manager.wait_until_finished, self._manager.check_for_errors, *more):
                wait()
        except Exception as error:
            self._ending = None
            raise cannot("save to", self.directory, error) from error
        ending, self._ending = self._ending, None
        if ending is not None:
            ending.result()


def read_spec(directory: Path, step: int | None = None) -> tuple[int, dict, dict]:
    """Reads what a checkpoint is, without its arrays.

    Args:
      directory: a directory that a `Checkpointer` wrote, or the folder of one of its steps.
      step: which step, by default the latest.

    Returns:
      The step, its spec and its configuration.

    Raises:
      CheckpointError: there is no such step, or it is corrupt or partial.
    """
    step, _, meta = _open(checkpoint_path(directory), step)
    return step, meta["spec"], meta["config"]


def restore_subtree(directory: Path, key: str, like: Any, step: int | None = None) -> Any:
    """Restores one part of the saved state, reading nothing else: the EMA weights, say.

    A process that asks for it on its own devices needs no other process for it.

    Args:
      directory: a directory that a `Checkpointer` wrote, or the folder of one of its steps.
      key: the part's place in the state, such as `"ema_params"`, nested with `/`.
      like: a tree of that part's structure; see `Checkpointer.restore`.
      step: which step, by default the latest.

    Returns:
      The part, of the structure of `like`.

    Raises:
      CheckpointError: there is no such step or part, or it is corrupt, partial or unlike `like`.
    """
    step, path, meta = _open(checkpoint_path(directory), step)
    abstract = jax.tree.map(_abstract, like)
    prefix = f"{key}/"
    saved = {k: v for k, v in meta["leaves"].items() if k == key or k.startswith(prefix)}
    if not saved:
        parts = sorted({name.split("/")[0] for name in meta["leaves"]})
        raise CheckpointError(f"{path} has no {key!r}; its state has {', '.join(parts)}")
    for part in reversed(key.split("/")):
        abstract = {part: abstract}
    _check_leaves(saved, leaf_table(abstract), path)
    args = ocp.args.PyTreeRestore(
        item=abstract,
        restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
        partial_restore=True,
    )
    try:
        alone = ocp.options.MultiprocessingOptions(
            primary_host=None, active_processes={jax.process_index()}
        )
        handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
            restored = checkpointer.restore(path / "state", args=args)
    except Exception as error:
        raise unreadable(path, error) from error
    _check_values(saved, restored, path)
    for part in key.split("/"):
        restored = restored[part]
    return restored


def check_spec(
    saved: Mapping, wanted: Mapping, path: Path, names: Mapping[str, str] | None = None
) -> None:
    """Refuses settings that contradict what a checkpoint was trained with.

    Args:
      saved: the checkpoint's spec.
      wanted: the settings asked for; only its keys are compared, as JSON values.
      path: the checkpoint, for the message.
      names: what users call a key, where they call it something else.

    Raises:
      CheckpointError: some values differ; the message lists every key with both values.
    """
    different = []
    for key, value in sorted(_as_json(wanted, "wanted").items()):
        if key not in saved or saved[key] != value:
            there = f"has {saved[key]!r}" if key in saved else "does not have it"
            name = (names or {}).get(key, key)
            different.append(f"  {name}: the checkpoint {there}, asked for {value!r}")
    if different:
        remedy = "Drop these settings to use the checkpoint's own, or pass another checkpoint."
        head = f"the checkpoint {path} contradicts the settings:"
        raise CheckpointError("\n".join([head, *different, remedy]))


def _unshared(what: str) -> CheckpointError:
    """The error that processes see other files, which a checkpoint of all of them cannot have."""
    return CheckpointError(
        f"{what}: all processes need the same work directory, on storage that they share; pass "
        "such a --workdir, gs://bucket/run for one"
    )


def _abstract(leaf: Any) -> Any:
    """The leaf as asked of Orbax; a 64-bit dtype that JAX would silently halve is named as such."""
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return leaf
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
    return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)


def _check_leaves(saved: Mapping, wanted: Mapping, path: epath.Path) -> None:
    nothing, lines = {"type": "nothing"}, []
    for name in sorted(saved.keys() | wanted.keys()):
        there, here = (table.get(name, nothing)["type"] for table in (saved, wanted))
        if there != here:
            lines.append(f"  {name}: {there} in the checkpoint, {here} here")
    if lines:
        lines[20:] = [f"  and {len(lines) - 20} more"] if len(lines) > 20 else []
        remedy = "Use the configuration it was saved with, or pass another --workdir."
        head = f"the checkpoint {path} does not fit this configuration:"
        raise CheckpointError("\n".join([head, *lines, remedy]))


def _check_values(saved: Mapping, tree: Any, path: epath.Path) -> None:
    found = leaf_table(tree, fingerprints=True)
    wrong = [name for name, entry in found.items() if entry != saved[name]]
    if wrong:
        raise bad_step(
            path, f"corrupt: the values of {listed(wrong)} are not those that were saved"
        )


def _open(directory: epath.Path, step: int | None) -> tuple[int, epath.Path, dict]:
    """The step to read, its path and its JSON document."""
    quiet()
    if is_step(directory):  # and perhaps away from all others
        meta = _read_meta(directory)
        found = int(directory.name) if directory.name.isdigit() else meta.get("step", 0)
        if step not in (None, found):
            raise CheckpointError(f"{directory} is step {found}, not {step}")
        return found, directory, meta
    latest = latest_step(directory, report=True) if step is None else step
    steps = complete_steps(directory)
    if not steps:
        raise CheckpointError(
            f"there is no checkpoint in {directory}; train first, or name another directory"
        )
    if latest not in steps:
        raise CheckpointError(f"there is no step {step} in {directory}; it has {listed(steps)}")
    path = directory / str(latest)
    return latest, path, _read_meta(path)


def _read_meta(path: epath.Path) -> dict:
    """A step's JSON document, verified; raises for a step that lacks one of its parts."""
    try:
        if missing := " and ".join(missing_parts(path)):
            raise bad_step(path, f"partial: it lacks {missing}")
        sealed = ocp.JsonCheckpointHandler().restore(path / "meta")
    except (OSError, RecursionError, ValueError) as error:
        raise unreadable(path, error) from error
    if not isinstance(sealed, dict) or sealed.get("crc32") != _crc(sealed.get("meta")):
        raise bad_step(path, f"corrupt: {path / 'meta'} was changed after it was written")
    meta = sealed["meta"]
    if meta["format"] != _FORMAT:
        raise bad_step(path, f"of format {meta['format']}, and this version reads only {_FORMAT}")
    if path.name.isdigit() and meta.get("step", int(path.name)) != int(path.name):
        raise bad_step(path, f"that of step {meta['step']}; if it was only renamed, rename it back")
    return meta


def _crc(document: Any) -> int:
    return zlib.crc32(json.dumps(document, sort_keys=True).encode())


def _as_json(mapping: Mapping, what: str) -> dict:
    with prefixed(f"the checkpoint's {what} is not JSON", (TypeError, ValueError), TypeError):
        return json.loads(json.dumps(dict(mapping)))
