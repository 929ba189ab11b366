"""What is compiled in a block of a test, and how in a process that a test starts."""

import contextlib
import os

import jax


def on_devices(count):
    """The environment of a process of so many CPU devices, with the suite's quick compiler."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    return {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


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
