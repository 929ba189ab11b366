"""Sets of records that are made once, by several processes, and read for days.

A set is a directory of ArrayRecord shards and a manifest: what the set is, and each shard's length
and SHA-256. The manifest is written last, so a directory that has one was finished.

While a set is written, `preparation/` holds the plan, one small record for each shard, and shards
under construction. A shard is moved to its place when it is complete, with its record before it; so
one that is in its place is whole, and a preparation that was killed goes on with the others. Each
writer has files of its own under construction: two preparations at once (a job started again while
the old one still runs) share or repeat work, and do not harm each other. A shard for a bucket is
made in a temporary directory, and is there when it is uploaded.

An example whose picture cannot be read stands as a `PictureError` among the examples of its shard.
Such a shard is not written, or, if that is wanted, is written without it and says so.
"""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import hashlib
import os
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

import jax
from absl import logging
from etils import epath

from piflow_jax.arguments import prefixed
from piflow_jax.buckets import is_remote, located
from piflow_jax.data.manifests import check_digest, check_entries, read_json, read_record
from piflow_jax.data.pictures import PictureError
from piflow_jax.data.plans import Plan
from piflow_jax.data.records import num_records
from piflow_jax.whole_files import copy_file, reading, replacing, visible, write_json

__all__ = [
    "RefusedError",
    "ShardedSet",
    "ShardsError",
]

_WORK = "preparation"
_PLAN = "plan.json"
# One record for each read. Half-precision noise hardly compresses: 6%, and reads take twice as long
_WRITER_OPTIONS = "group_size:1,uncompressed"
_THREADS = 8
# Entries of a shard, and of what it refused.
_ENTRY = {"examples": int, "bytes": int, "sha256": str}
_REFUSED = {"index": int, "picture": str, "reason": str}
# Refused pictures that are named; of more there is likely one reason.
_LISTED = 200


class ShardsError(ValueError):
    """A cached set is unfinished, damaged, or not the one that was asked for."""


class RefusedError(ShardsError):
    """Pictures cannot be read, and the shards that need them were not written.

    Args:
      refused: What is wrong with each; an attribute too.
    """

    def __init__(self, refused: Sequence[PictureError]):
        super().__init__(refused)
        self.refused = refused

    def __str__(self) -> str:  # noqa: D105
        # Without them, the next preparation would be of another plan.
        advice = "replace them under the same names, or leave them out by config.data.skip_refused"
        count = "1 picture was" if len(self.refused) == 1 else f"{len(self.refused)} pictures were"
        return f"{_listed(self.refused)}\n{count} refused: {advice}"


@contextlib.contextmanager
def _closing(writer: Any, path: epath.Path) -> Iterator[None]:
    """Closes a writer of a shard, which notices a full disk only then."""
    try:
        yield
    finally:
        with prefixed(f"cannot write {path}; make room and start again", RuntimeError, OSError):
            writer.close()


def _say(done: int, todo: int) -> None:
    logging.info("prepare: %d/%d shards", done, todo)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardedSet:
    """One kind of set, and all that is done to its directories.

    Attributes:
      manifest: Name of the manifest's file.
      format: Version of the format, which the manifest states.
      plan: Class of its plans.
      error: What to raise, a `ShardsError`.
      contents: What the set holds, for messages.
      notes: Numbers that each shard's entry of the manifest has besides its length and checksum.
      added: Fields of plans that sets of earlier versions lack; these have the defaults.
      serialize: `(plan, index, example, notes) -> record`, by default the example itself. It may
        raise the shard's `notes`, which begin at 0.
      describe: Called before a set is finished with a folder, its plan and its shards' entries of
        the manifest, to write there what else belongs to it.
    """

    manifest: str
    format: int
    plan: type[Plan]
    error: type[ShardsError]
    contents: str
    notes: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    serialize: Callable[..., bytes] = lambda plan, index, example, notes: example
    describe: Callable[[epath.Path, Plan, list[dict[str, Any]]], None] | None = None

    def start(self, directory: str | os.PathLike, plan: Plan) -> None:
        """Records what a directory is going to hold, or checks that it is what it was.

        Args:
          directory: The set's directory; made if need be.
          plan: What it is going to hold.

        Raises:
          ShardsError: If a preparation with another plan was begun there.
        """
        directory = self._located(directory)
        work = directory / _WORK
        try:
            work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self.error(
                f"{work} cannot be made ({error.strerror}); take another directory for the set"
            ) from error
        if not (work / _PLAN).exists():
            write_json(work / _PLAN, dataclasses.asdict(plan))
        known = self._read_plan(directory)  # perhaps another process's, which came first
        recorded = read_json(work / _PLAN, self.error)
        differences = [
            f"{field.name} was {getattr(known, field.name)!r}, is {getattr(plan, field.name)!r}"
            for field in dataclasses.fields(plan)
            if getattr(known, field.name) != getattr(plan, field.name)
            and (field.name in recorded or field.name not in self.added)
        ]
        if differences:
            raise self.error(
                f"{directory} was begun differently: {'; '.join(differences)}; remove it, or name "
                "another config.data.data_dir"
            )

    def missing(self, directory: str | os.PathLike, plan: Plan) -> list[int]:
        """Shards that are not there, or shorter or longer than they were when they were written.

        Args:
          directory: The set's directory, after `start`.
          plan: What it is going to hold.

        Returns:
          Their indices, rising; empty if all are there.

        Raises:
          ShardsError: If a shard's small record is damaged; the message names its file.
        """
        directory = self._located(directory)
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            there = pool.map(lambda s: self._is_there(directory, plan, s), range(plan.num_shards))
            return [shard for shard, whole in enumerate(there) if not whole]

    def _is_there(self, directory: epath.Path, plan: Plan, shard: int) -> bool:
        record = _record_path(directory, shard)
        length = _length(directory / plan.shard_name(shard))
        whole = length is not None and record.exists()
        return whole and length == self._entry(record)["bytes"]

    def write(
        self,
        directory: str | os.PathLike,
        plan: Plan,
        shard: int,
        examples: Iterable[Any],
        *,
        skip_refused: bool = False,
    ) -> None:
        """Writes one shard, which appears under its name only when it is complete.

        One that is there already, or is there before this one is complete, by another preparation,
        stays.

        Args:
          directory: The set's directory, after `start`.
          plan: What it holds.
          shard: Index of the shard.
          examples: What `serialize` takes, in order, or why one's picture cannot be read.
          skip_refused: Leave out examples whose picture cannot be read.

        Raises:
          OSError: If the shard cannot be written, as to a full disk.
          RefusedError: If there are such examples and they are not left out; after all examples.
          ShardsError: If there are not as many as the shard has, or one is not as the plan says.
        """
        from array_record.python.array_record_module import ArrayRecordWriter

        directory = self._located(directory)
        if self._is_there(directory, plan, shard):
            return
        name, work = f"{shard:05d}.array_record", directory / _WORK
        mine = work / f"{name}.{uuid.uuid4().hex}"
        path = directory / plan.shard_name(shard)
        # The lock is let go when the shard is in its place, to which its record must belong.
        with contextlib.ExitStack() as lock, replacing(path, mine) as under_way:
            writer = ArrayRecordWriter(os.fspath(under_way), _WRITER_OPTIONS)
            indices, count, refused = plan.shard_range(shard), 0, {}
            notes = dict.fromkeys(self.notes, 0)
            with prefixed(directory, self.error, self.error), _closing(writer, path):
                for index, example in enumerate(examples, start=indices.start):
                    if isinstance(example, PictureError):
                        refused[index] = example
                    else:
                        writer.write(self.serialize(plan, index, example, notes))
                        count += 1
            if count + len(refused) != len(indices):
                raise self.error(
                    f"{directory}: shard {shard} has {len(indices)} {self.contents}, got {count}"
                )
            if refused and not skip_refused:
                raise RefusedError(list(refused.values()))
            lock.enter_context(_alone(work / _PLAN))
            if self._is_there(directory, plan, shard):
                under_way.unlink(missing_ok=True)  # the other one may have
                return
            entry = {"examples": count, "bytes": under_way.stat().length}
            entry |= {"sha256": _digest(under_way)} | notes
            if refused:
                entry["refused"] = [
                    {"index": index, "picture": error.name, "reason": error.reason}
                    for index, error in refused.items()
                ]
            write_json(_record_path(directory, shard), entry)
        # What killed preparations left of this shard; one that still runs does without.
        for left in visible(work):
            if left.name.startswith(name):
                left.unlink(missing_ok=True)

    def prepare(
        self,
        directory: str | os.PathLike,
        plan: Plan,
        examples: Callable[[int], Iterable[Any]],
        *,
        process_index: int = 0,
        process_count: int | None = None,
        on_progress: Callable[[int, int], None] = _say,
        skip_refused: bool = False,
    ) -> dict[str, Any] | None:
        """Writes this process's share of the missing shards, and the manifest if all are there.

        Goes on with the first shard that is missing, so a preparation that was killed is just
        started again. Process `p` of `P` writes the shards `i` with `i % P == p`; processes need
        not know of each other but share the directory. Whichever finds all shards in place
        finalises the set. A shard with refused pictures does not hold up the others.

        Args:
          directory: The set's directory.
          plan: What it is going to hold.
          examples: The examples of a shard, see `write`.
          process_index: Index of this process.
          process_count: Number of processes; None takes JAX's, and the index of this one.
          on_progress: Called after each shard with the number of shards that this call has written
            and has to write; by default it goes to the log.
          skip_refused: Leave out examples whose picture cannot be read; the manifest names them.

        Returns:
          The manifest; None if other processes still have shards to write.

        Raises:
          RefusedError: If pictures were refused; at the end, with those of all shards.
          ShardsError: If another preparation was begun there, or a shard is damaged.
          ValueError: If the process is none of the processes.
        """
        if process_count is None:
            process_index, process_count = jax.process_index(), jax.process_count()
        if not 0 <= process_index < process_count:
            raise ValueError(f"process_index must lie in [0, {process_count}), got {process_index}")
        self.start(directory, plan)
        todo = [s for s in self.missing(directory, plan) if s % process_count == process_index]
        text = "prepare: %d of %d shards to write in %s"
        logging.info(text, len(todo), plan.num_shards, directory)
        refused = []
        for done, shard in enumerate(todo, start=1):
            try:
                self.write(directory, plan, shard, examples(shard), skip_refused=skip_refused)
            except RefusedError as error:
                refused += error.refused
            on_progress(done, len(todo))
        if refused:
            raise RefusedError(refused)
        if self.missing(directory, plan):
            return None
        manifest = self.finalize(directory)
        if entries := _refused(manifest["shards"]):
            # A name that is not UTF-8 cannot be written to every log.
            left_out = _listed([PictureError(one["picture"], one["reason"]) for one in entries])
            shown = left_out.encode(errors="backslashreplace").decode()
            logging.warning("prepare: left out\n%s", shown)
        return manifest

    def finalize(self, directory: str | os.PathLike) -> dict[str, Any]:
        """Verifies all shards and writes the manifest.

        It may be called again, and by several processes at once.

        Args:
          directory: The set's directory.

        Returns:
          The manifest.

        Raises:
          ShardsError: If a shard is missing or not as it was written; the message names its file.
        """
        directory = self._located(directory)
        plan = self._read_plan(directory)
        shards = []
        for shard in range(plan.num_shards):
            record = _record_path(directory, shard)
            if not record.exists():
                raise self.error(f"{directory / plan.shard_name(shard)} was not written")
            shards.append({"file": plan.shard_name(shard), **self._entry(record)})
        self.verify(directory, shards, checksums=True, counts=True)
        try:
            plan = plan.without([entry["index"] for entry in _refused(shards)])
        except ValueError as error:
            raise self.error(f"{directory} would be empty: all pictures were refused") from error
        if self.describe is not None:
            with tempfile.TemporaryDirectory(prefix="piflow_jax_") as here:
                self.describe(epath.Path(here), plan, shards)
                for path in epath.Path(here).iterdir():
                    with replacing(directory / path.name) as under_way:
                        copy_file(path, under_way)
        manifest = {"format": self.format, **dataclasses.asdict(plan), "shards": shards}
        write_json(directory / self.manifest, manifest)
        return read_json(directory / self.manifest, self.error)

    def open(self, directory: str | os.PathLike) -> dict[str, Any]:
        """The manifest of a finished set.

        Args:
          directory: The set's directory.

        Returns:
          The manifest.

        Raises:
          ShardsError: If the set is unfinished or its manifest is not one.
        """
        path = self._located(directory) / self.manifest
        if not path.exists():
            raise self.error(
                f"{path} is missing: there are no {self.contents}, or their preparation has not "
                "finished; run it (again), or correct config.data.data_dir"
            )
        manifest = read_json(path, self.error)
        if manifest.get("format") != self.format:
            raise self.error(
                f"{path} has format {manifest.get('format')!r}, expected {self.format}"
            )
        defaults = {field.name: field.default for field in dataclasses.fields(self.plan)}
        manifest = {name: defaults[name] for name in self.added} | manifest
        fields = set(defaults) | {"format", "shards"}
        if set(manifest) != fields:
            raise self.error(f"{path} lacks or adds {sorted(fields ^ set(manifest))}")
        read_record(self.plan, manifest, path, self.error)
        check_entries(manifest, {"shards": list}, path, self.error)
        for shard in manifest["shards"]:
            check_entries(shard, {"file": str}, path, self.error)
            if set(shard) - {"refused"} != {"file", *_ENTRY, *self.notes}:
                raise self.error(f"{path} does not have all of {shard['file']}")
            self._check_entry(shard, path)
            if PurePosixPath(shard["file"]).name != shard["file"]:
                raise self.error(
                    f"{path} names a shard outside of its directory, {shard['file']!r}"
                )
        total = sum(shard["examples"] for shard in manifest["shards"])
        if total != (wanted := manifest["num_examples"]):
            raise self.error(f"{path} lists shards of {total} of {wanted} examples")
        return manifest

    def verify(
        self,
        directory: str | os.PathLike,
        shards: list[dict[str, Any]],
        *,
        checksums: bool,
        counts: bool = False,
    ) -> None:
        """Compares lengths of all shards first, then their contents.

        Args:
          directory: The set's directory.
          shards: Their entries of the manifest.
          checksums: Compare contents too, which reads the whole set.
          counts: And with them the numbers of examples.

        Raises:
          ShardsError: If a shard is missing or differs; the message names its file.
        """
        directory = self._located(directory)
        paths = [directory / shard["file"] for shard in shards]
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            for shard, path, length in zip(shards, paths, pool.map(_length, paths), strict=True):
                if length is None:
                    raise self.error(f"{path} is missing")
                if length != shard["bytes"]:
                    raise self.error(
                        f"{path} has {length} bytes, expected {shard['bytes']}; remove it and "
                        "prepare again"
                    )
            if checksums:
                list(pool.map(lambda *one: self._check_contents(*one, counts), paths, shards))

    def _check_contents(self, path: epath.Path, entry: dict[str, Any], counts: bool) -> None:
        with reading(path) as here:
            check_digest(path, _digest(here), entry["sha256"], self.error)
            if counts and (count := num_records(here)) != entry["examples"]:
                raise self.error(f"{path} has {count} examples, expected {entry['examples']}")

    def _located(self, directory: str | os.PathLike) -> epath.Path:
        try:
            return located(directory)
        except ValueError as error:
            raise self.error(f"{error}") from None

    def _read_plan(self, directory: epath.Path) -> Plan:
        path = directory / _WORK / _PLAN
        if not path.exists():
            raise self.error(f"no preparation was begun in {directory}: {path} is missing")
        values = read_json(path, self.error)
        fields = {field.name for field in dataclasses.fields(self.plan)}
        if values.keys() - fields and fields - values.keys() - set(self.added):
            raise self.error(
                f"{directory} was begun as another kind of set than {self.contents}; remove it, or "
                "name another config.data.data_dir"
            )
        return read_record(self.plan, values, path, self.error)

    def _entry(self, record: epath.Path) -> dict[str, Any]:
        """What the small record of a shard says of it."""
        entry = read_json(record, self.error)
        self._check_entry(entry, record)
        return entry

    def _check_entry(self, entry: dict[str, Any], path: epath.Path) -> None:
        check_entries(entry, _ENTRY | dict.fromkeys(self.notes, int), path, self.error)
        check_entries({"refused": [], **entry}, {"refused": list}, path, self.error)
        for refused in entry.get("refused", ()):
            check_entries(refused, _REFUSED, path, self.error)


def _refused(shards: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [entry for shard in shards for entry in shard.get("refused", ())]


def _listed(refused: Sequence[PictureError]) -> str:
    lines = [f"{error}" for error in refused[:_LISTED]]
    return "\n".join(lines + [f"and {len(refused) - _LISTED} more"] * (len(refused) > _LISTED))


@contextlib.contextmanager
def _alone(path: epath.Path) -> Iterator[None]:
    """Keeps others out who ask for the same file; in a bucket, or on a disk without locks, none."""
    if is_remote(path):
        yield
        return
    with path.open("ab") as file:  # NFS locks no file that is opened for reading alone
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _digest(path: epath.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _length(path: epath.Path) -> int | None:
    """Bytes of a file; None if it is not there."""
    try:
        return path.stat().length
    except (FileNotFoundError, NotADirectoryError):
        return None


def _record_path(directory: epath.Path, shard: int) -> epath.Path:
    return directory / _WORK / f"{shard:05d}.json"
