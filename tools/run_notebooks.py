"""Runs every notebook from a clean kernel, as on a fresh machine.

    python tools/run_notebooks.py            # fails if a cell fails or outputs are missing
    python tools/run_notebooks.py --write    # also writes the outputs into the files

Notebooks run in a temporary copy, one after the other, and share the runs that the first one
trains. Needs `pip install -e ".[notebooks]"`.
"""

import argparse
import importlib.metadata
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NAMES = ("digits", "bring_your_own_teacher", "sharded_sampling")


def pictures(notebook) -> int:
    """Number of pictures among a notebook's outputs."""
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    return sum("image/png" in out.get("data", {}) for out in outputs)


def faults(path: Path) -> list[str]:
    """Faults of the outputs in a committed notebook."""
    notebook = nbformat.read(path, as_version=4)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    found = []
    if counts != list(range(1, len(counts) + 1)):
        found.append(
            f"{path.name} was not run from top to bottom: run tools/run_notebooks.py --write"
        )
    if not pictures(notebook):
        found.append(f"{path.name} has no picture among its outputs")
    return found


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0 if all is well."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the outputs into the files")
    write = parser.parse_args(arguments).write
    # As in the tests: with libtpu installed and no TPU, JAX would look for one and fail.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Compiles in half the time, for programs that run for seconds; not for times that are kept. An
    # XLA of another version may not know the flag, and ends at it.
    if not write and importlib.metadata.version("jax").startswith("0.10."):
        os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    found = []
    with tempfile.TemporaryDirectory() as place:
        for folder in ("notebooks", "examples"):
            ignore = shutil.ignore_patterns("runs", "__pycache__")
            shutil.copytree(ROOT / folder, Path(place) / folder, ignore=ignore)
        for name in NAMES:
            path, start = ROOT / "notebooks" / f"{name}.ipynb", time.monotonic()
            notebook = nbformat.read(path, as_version=4)
            resources = {"metadata": {"path": str(Path(place) / "notebooks")}}
            NotebookClient(
                notebook, timeout=600, kernel_name="python3", resources=resources
            ).execute()
            print(
                f"{name}: {time.monotonic() - start:.0f} s, {pictures(notebook)} pictures",
                flush=True,
            )
            if write:
                for cell in notebook.cells:
                    cell.metadata.pop("execution", None)  # times of day
                nbformat.write(notebook, path)
            found += faults(path)
    print(*found, sep="\n")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
