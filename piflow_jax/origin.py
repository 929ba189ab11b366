"""Which code runs: the version of the package and, in a checkout, its commit."""

import functools
import subprocess
from pathlib import Path

from piflow_jax import __version__


@functools.cache
def commit() -> str:
    """The commit of the checkout that the package is imported from.

    Returns:
      Its short hash, with `+` behind it where tracked files have changed since; empty for an
      installed package, or without git.
    """
    root = Path(__file__).resolve().parents[1]
    if not ((root / ".git").exists() and (root / "setup.py").exists()):
        return ""
    git = ["git", "-C", str(root)]
    try:
        found, changes = (
            subprocess.run([*git, *words], capture_output=True, text=True, timeout=10, check=True)
            for words in (
                ("rev-parse", "--short", "HEAD"),
                ("status", "--porcelain", "--untracked-files=no"),
            )
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip() + "+" * bool(changes.stdout.strip())


def origin() -> str:
    """The package's name with its version and commit, such as `piflow_jax 0.1.0 (1a2b3c4)`."""
    known = commit()
    return f"piflow_jax {__version__}" + (f" ({known})" if known else "")
