"""What is compiled in a block of a test."""

import contextlib

import jax


@contextlib.contextmanager
def compilations():
    """Names of what XLA compiles meanwhile, or takes from its cache on disk."""
    found = []

    def listen(name, seconds, **kwargs):
        if name == "/jax/core/compile/backend_compile_duration":
            found.append(kwargs.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
