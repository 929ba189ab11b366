"""What a run compiles, it compiles once."""

import collections

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from piflow_jax.modes import command
from tests import tiny

SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_remove_custom_partitioning_ptr_from_cache_key",
)


@pytest.fixture
def fresh():
    """Nothing is compiled yet, neither in memory nor on the disk."""
    before = {name: getattr(jax.config, name) for name in SETTINGS if hasattr(jax.config, name)}
    jax.clear_caches()
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.mark.slow
def test_nothing_is_compiled_twice(fresh, tmp_path):
    """Steps, looks at the student, and the evaluation: teacher and student."""
    found = collections.Counter()

    def listen(event, **_):
        found[event.removeprefix("/jax/compilation_cache/cache_")] += 1

    # Every program is kept on the disk, so that one that is compiled again is found there.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    config = tiny.get_config()
    config.compilation_cache = str(tmp_path / "compiled")
    config.evaluation.every, config.evaluation.every_samples = 3, 20
    jax.monitoring.register_event_listener(listen)
    try:
        assert command.run("train", config, tmp_path / "run") == 0
    finally:
        jax.monitoring.unregister_event_listener(listen)
    assert found["hits"] == 0 and found["misses"] > 10, found
