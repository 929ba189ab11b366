"""What a run compiles, it compiles once."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Every program is kept on the disk, so that one that is compiled again is found there.
RUN = """
import sys
import jax
from piflow_jax.modes import command
from tests import tiny

found = {"hits": 0, "misses": 0}

def listen(event, **_):
    for kind in found:
        found[kind] += event == f"/jax/compilation_cache/cache_{kind}"

jax.monitoring.register_event_listener(listen)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
config = tiny.get_config()
config.compilation_cache = sys.argv[1] + "/compiled"
config.evaluation.every, config.evaluation.every_samples = 3, 20
status = command.run("train", config, sys.argv[1] + "/run")
print(status, found["hits"], found["misses"])
"""


def test_nothing_is_compiled_twice(tmp_path):
    """Steps, looks at the student, and the evaluation: teacher and student."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path)],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    status, hits, misses = map(int, done.stdout.split()[-3:])
    assert status == 0, done.stderr
    assert hits == 0 and misses > 10
