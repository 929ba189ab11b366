"""What lies in a directory of checkpoints: its steps, and the record of the last one."""

import json
import re
import reprlib
from collections.abc import Sequence

import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from piflow_jax.parallel import processes
from piflow_jax.whole_files import write_json

_TMP = ".orbax-checkpoint-tmp"
_STEPS = ocp.path.step.standard_name_format()
# What is said of files that are missing, cut or altered: by TensorStore, with or without a code in
# front, and by Python of JSON. Anything else that fails in reading tells nothing about the files.
_DAMAGE = re.compile(
    "(?:(?:DATA_LOSS|FAILED_PRECONDITION|INVALID_ARGUMENT|NOT_FOUND|OUT_OF_RANGE): )?"
    "(?:Error (?:decoding|opening|reading) |Metadata at )"
)
_NO_FILE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
_NO_JSON = (json.JSONDecodeError, RecursionError, UnicodeDecodeError)


class CheckpointError(RuntimeError):
    """A checkpoint is corrupt, partial, incompatible or cannot be written."""


def latest_step(
    directory: epath.Path, *, report: bool = False, writing: bool = False
) -> int | None:
    """The last complete step, or None; raises if a later one was saved and is gone.

    Args:
      directory: the directory of steps.
      report: see `complete_steps`.
      writing: likewise.

    Returns:
      The step.

    Raises:
      CheckpointError: the last step that was saved is not there; or see `complete_steps`.
    """
    saved = recorded_step(directory)  # before the steps, to which a run may be adding
    steps = complete_steps(directory, report=report, writing=writing)
    if saved is not None and (not steps or steps[-1] < saved):
        rest = f"go on from step {steps[-1]}" if steps else "start from the beginning"
        record = _record(directory)
        raise CheckpointError(
            f"{directory} lacks step {saved}, the last one that was saved there ({record}). Put it "
            f"back, or delete {record} to {rest}."
        )
    return steps[-1] if steps else None


def recorded_step(directory: epath.Path) -> int | None:
    """The last step that was saved in a directory, if that was recorded next to it."""
    record = _record(directory)
    try:
        if not record.exists():
            return None
        step = json.loads(record.read_text())["step"]
        if type(step) is not int or step < 0:
            raise ValueError(f"its step is {reprlib.repr(step)}")
        return step
    except OSError as error:
        raise cannot("read", record, error) from error
    except (ValueError, KeyError, RecursionError, TypeError) as error:
        raise CheckpointError(
            f"{record} is damaged ({error!r}); delete it to go on from the last step in {directory}"
        ) from error


def write_record(directory: epath.Path, step: int) -> None:
    """Records next to a directory the last step that was saved there."""
    write_json(_record(directory), {"step": step})


def _record(directory: epath.Path) -> epath.Path:
    return directory.parent / f"{directory.name}.json"


def complete_steps(
    directory: epath.Path, *, report: bool = False, writing: bool = False
) -> list[int]:
    """The complete steps, ascending.

    Args:
      directory: the directory of steps; there are none where it does not exist.
      report: warn of unfinished ones.
      writing: steps are to be saved there, which decides the advice.

    Returns:
      Their numbers.

    Raises:
      CheckpointError: the directory is a file, holds only foreign things, or cannot be read.
    """
    try:
        # Between the two questions another process may make the folder, and one of a bucket go.
        if not directory.is_dir():
            if directory.is_file():
                raise CheckpointError(f"{directory} is a file; checkpoints need a directory")
            return []
        names = sorted(p.name for p in directory.iterdir())
        steps = sorted(found.step for found in _STEPS.find_all(directory))
    except FileNotFoundError:  # in a bucket a folder goes with its last object, while it is tidied
        return []
    except OSError as error:
        raise cannot("read", directory, error) from error
    # On object stores, which cannot rename, an unfinished step is a step without its commit file.
    unfinished = [n for n in names if _TMP in n or (n.isdigit() and int(n) not in steps)]
    unfinished = [n for n in unfinished if not (directory / n).is_file()]  # it may just be gone
    known = {*map(str, steps), *unfinished, "metadata"}
    foreign = [n for n in names if n not in known and not n.startswith(".")]
    if foreign and not steps:
        advice = "Name a run's work directory, its checkpoints or one of their steps."
        if writing:
            advice = "Move them away or pass another --workdir."
        raise CheckpointError(
            f"{directory} holds no checkpoint but other things: {listed(foreign)}. {advice}"
        )
    if unfinished and report:
        last = f"the last complete step is {steps[-1]}" if steps else "no step is complete"
        text = "%s: ignoring %s (unfinished, by a killed run or one still at it); %s"
        logging.warning(text, directory, listed(unfinished), last)
    return steps


def missing_parts(path: epath.Path) -> list[str]:
    """What of a step's parts is not in a folder."""
    return [name for name in ("state", "meta") if not (path / name).is_dir()]


def is_step(path: epath.Path) -> bool:
    """Whether a folder is that of one step, whatever it is called if it is whole."""
    return len(missing_parts(path)) < (2 if path.name.isdigit() else 1)


def falling_back(path: epath.Path) -> str:
    """How to do without a step.

    Args:
      path: the step's folder.

    Returns:
      Words that may follow "Delete": what, and to which step the run then falls back.
    """
    earlier = [step for step in complete_steps(path.parent) if step < int(path.name)]
    record = _record(path.parent)
    recorded = f" and {record}" if record.exists() else ""
    rest = f"fall back to step {earlier[-1]}" if earlier else "start from the beginning"
    return f"this directory{recorded} to {rest}"


def bad_step(path: epath.Path, what: str) -> CheckpointError:
    """The error that a step is something that cannot be used."""
    if not path.name.isdigit():  # a copy, away from the other steps
        return CheckpointError(f"the checkpoint {path} is {what}. Name another one.")
    return CheckpointError(
        f"the checkpoint {path} is {what}. Delete {falling_back(path)}, or pass another --workdir."
    )


def listed(names: Sequence) -> str:
    """The first few of many, for messages."""
    return ", ".join(map(str, names[:8])) + (
        f" and {len(names) - 8} more" if len(names) > 8 else ""
    )


def first_cause(error: BaseException) -> BaseException:
    """What an error goes back to: Orbax wraps what TensorStore says."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def cause(error: BaseException) -> str:
    """What an error goes back to, on one line."""
    error = first_cause(error)
    text = " ".join(str(error).split()).split(" [tensorstore_spec")[0]
    if len(text) > 300:  # the cause of a cause is said last
        text = f"{text[:150]} ... {text[-150:]}"
    return f"{type(error).__name__}: {text}"


def cannot(action: str, directory: epath.Path, error: Exception) -> CheckpointError:
    """The error that the disk, or whatever holds the directory, refused; or a lost process."""
    if lost := processes.lost(error):
        return CheckpointError(f"cannot {action} {directory}: {lost}")
    if why := getattr(first_cause(error), "why", None):  # see `piflow_jax.gcs.BucketError`
        return CheckpointError(f"cannot {action} {directory}: {why}")
    return CheckpointError(
        f"cannot {action} {directory} ({cause(error)}). Check that the path exists, is writable"
        " and has free space, or pass another --workdir."
    )


def unreadable(path: epath.Path, error: Exception) -> Exception:
    """The error that a step cannot be read: it is damaged only if what failed says so."""
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return MemoryError(f"not enough memory to restore {path}: {cause(error)}")
    first = first_cause(error)
    damaged = isinstance(first, (*_NO_FILE, *_NO_JSON))
    if damaged or _DAMAGE.match(str(first)):
        return bad_step(path, f"corrupt or incomplete and cannot be read ({cause(error)})")
    if lost := processes.lost(error):
        return CheckpointError(f"cannot restore the checkpoint {path}: {lost}")
    return CheckpointError(
        f"cannot restore the checkpoint {path} ({cause(error)}). That need not be damage: keep the"
        " files until the cause is known."
    )
