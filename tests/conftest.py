"""Shared test settings: strict rank promotion, and float64 on demand."""

import atexit
import gc
import importlib.metadata
import logging
import os
import shutil
import sys
import tempfile
import types
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Programs are compiled once for all workers and for the commands that they start. Kept for this
# session only: a program of another day may be one of another compiler.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="piflow_jax_tests_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Most of the suite's time is the compiler's; programs that run for milliseconds gain nothing by it.
if os.environ["JAX_PLATFORMS"] == "cpu":
    flags = ["--xla_backend_optimization_level=0"]
    if importlib.metadata.version("jax").startswith("0.10."):  # XLA ends at a flag it does not know
        flags.append("--xla_cpu_use_fusion_emitters=false")
        flags.append("--xla_cpu_parallel_codegen_split_count=1")
    os.environ.setdefault("XLA_FLAGS", " ".join(flags))

import jax
import pytest

from piflow_jax.runs.workdir import user_path
from tests import buckets

jax.config.update("jax_numpy_rank_promotion", "raise")
# By this name TensorBoard takes its own reader of event files, not TensorFlow's.
sys.modules["tensorboard.compat.notf"] = types.ModuleType("notf")
# Tracing makes many objects and few cycles; by default the collector takes a tenth of the time.
gc.set_threshold(50_000, 20, 50)

GOLDEN = Path(__file__).parent / "golden"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks cases of recorded files that lie only beside the repository as slow: there are many."""
    for item in items:
        values = item.callspec.params.values() if hasattr(item, "callspec") else ()
        files = [v for v in values if isinstance(v, str) and v.endswith(".npz")]
        if any(not (GOLDEN / name).exists() for name in files):
            item.add_marker("slow")


def pytest_collection_finish():
    """Takes what was imported out of the garbage collector's rounds."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def x64():
    """Runs one test under 64-bit types and restores the previous setting."""
    previous = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", previous)


@pytest.fixture
def service():
    """An empty bucket, `gs://bucket`, and what is to go wrong with it."""
    service = buckets.service()
    service.reset()
    yield service
    service.reset()


@pytest.fixture(params=["disk", "bucket"])
def place(request, tmp_path):
    """A work directory, which need not be on this machine."""
    if request.param == "disk":
        return user_path(tmp_path)
    request.getfixturevalue("service")
    return user_path("gs://bucket/run")


@pytest.fixture
def command(capsys, monkeypatch):
    """Runs a command line in this process: `(exit status, what it says)`."""
    from absl import flags

    from piflow_jax import main

    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    monkeypatch.setattr(logging.getLogger("absl"), "handlers", [handler])

    def run(*arguments):
        said.clear()
        flags.FLAGS.unparse_flags()
        try:
            status = main.main(main.parse_flags(["piflow_jax.main", *map(str, arguments)]))
        except SystemExit as end:
            status = end.code
        return status, capsys.readouterr().err + "\n".join(said)

    yield run
    flags.FLAGS.unparse_flags()
