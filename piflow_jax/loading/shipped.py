"""Students of pi-Flow (arXiv 2510.14974), with their teachers, that come with the package.

`piflow_jax/shipped/<data set>/` holds `student.safetensors`, `teacher.safetensors` and `README.md`,
their model card. A further student of the same teacher is `student_<recipe>.safetensors`, and its
name is `<data set>_<recipe>`. `tools/ship.py` makes these files of runs.
"""

import os

from etils import epath

from piflow_jax import hub
from piflow_jax.buckets import is_remote
from piflow_jax.runs.workdir import user_path
from piflow_jax.whole_files import visible

_FOLDER = epath.Path(__file__).parents[1] / "shipped"


def _students() -> dict[str, epath.Path]:
    files = [path for folder in visible(_FOLDER) for path in visible(folder)]
    return {
        path.parent.name + path.stem.removeprefix("student"): path
        for path in files
        if path.name.startswith("student") and path.suffix == ".safetensors"
    }


def shipped_names() -> tuple[str, ...]:
    """The names of shipped students, `piflow_jax.load(name)`; each has its teacher with it."""
    return tuple(sorted(_students()))


def weights_path(path: str | os.PathLike, kind: str) -> epath.Path:
    """What a user's path, or the name of a shipped student, stands for.

    Args:
      path: a path that exists, or a name.
      kind: whether a name stands for its `student` or for its `teacher`.

    Returns:
      A path that exists. A file or folder in the current directory has priority over a name.

    Raises:
      FileNotFoundError: it is neither.
      ConfigError: see `user_path`.
    """
    found = user_path(path, of_weights=True)
    if found.exists():
        return found
    if is_remote(found):  # the service gives one answer for both
        raise FileNotFoundError(f"{found}: no such checkpoint or weight file, or no such bucket")
    students = _students()
    if student := students.get(os.fsdecode(path)):
        return student if kind == "student" else student.parent / "teacher.safetensors"
    raise FileNotFoundError(
        f"{found}: no such checkpoint or weight file, and no shipped {kind} has this name "
        f"({', '.join(sorted(students))})"
    )


def located_weights(path: str | os.PathLike, kind: str) -> tuple[epath.Path, bool]:
    """What a user's path or name stands for, see `weights_path`, and whether it is weights.

    Args:
      path: see `weights_path`; names on the hub are always weights.
      kind: see `weights_path`.

    Returns:
      `(path, is_weights)`: True for a weight file or a folder of weights, False for a run or its
      checkpoints.

    Raises:
      FileNotFoundError: see `weights_path`.
      ConfigError: see `weights_path`.
    """
    from piflow_jax.convert import holds_weights

    of_hub, path = hub.is_name(path), weights_path(path, kind)
    run = any((path / folder).is_dir() for folder in ("teacher", "student", "checkpoints"))
    return path, of_hub or (not run and holds_weights(path))
