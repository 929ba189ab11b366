"""What a run costs, against a clock that the tests turn."""

import types

import jax
import jax.numpy as jnp
import pytest
from absl import logging

from piflow_jax.parallel import peak_flops
from piflow_jax.runs import monitor as module
from piflow_jax.runs.monitor import Monitor, step_memory
from piflow_jax.runs.workdir import user_path


@pytest.fixture
def clock(monkeypatch):
    now = types.SimpleNamespace(time=100.0)
    monkeypatch.setattr(module.time, "perf_counter", lambda: now.time)
    return now


def make(directory=None, **options):
    return Monitor("toy", directory, **{"batch_size": 8} | options)


def test_times_are_those_of_the_steps(clock):
    monitor = make(peak=5.0)
    clock.time += 7  # compilation is no step's time
    monitor.start(10, 16)
    for step, flops in zip(range(11, 17), (10, 10, 100, 100, 80, 20), strict=True):
        monitor.before(step, None, flops)  # the last has begun and not ended
    with monitor.waiting():
        clock.time += 1
    clock.time += 9
    with monitor.aside():
        clock.time += 50
    found = monitor.figures(15)
    assert found["step_seconds"] == 2
    assert found["examples_per_second"] == 4
    assert found["flops_per_second"] == 30
    assert found["mfu"] == 30 / 5 / jax.device_count()
    assert found["data_wait"] == pytest.approx(0.1)
    clock.time += 4
    again = monitor.figures(16)
    assert again["step_seconds"] == 4 and again["data_wait"] == 0
    assert again["flops_per_second"] == 5
    assert monitor.figures(16) == {}


def test_no_utilisation_of_a_device_that_is_not_known(clock):
    monitor = make()
    monitor.start(0, 8)
    clock.time += 1
    assert "mfu" not in monitor.figures(1)


@pytest.mark.parametrize(
    ("kind", "rate"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU v4", 275e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("cpu", None),
    ],
)
def test_peaks_of_known_devices(kind, rate):
    """Makers' data sheets, dense bfloat16."""
    assert peak_flops(types.SimpleNamespace(device_kind=kind)) == rate


def test_memory_counters_where_the_backend_has_them(clock, monkeypatch):
    devices = [
        types.SimpleNamespace(memory_stats=lambda gib=gib: {"peak_bytes_in_use": gib * 2**30})
        for gib in (2, 3)
    ]
    monitor = make()
    monitor.start(0, 8)
    clock.time += 1
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert monitor.figures(1)["memory_gib"] == 3


def test_compiling_again_is_said(monkeypatch):
    said = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: said.append(text % values))
    function = jax.jit(lambda x: x * 3 + 1)
    with make() as monitor:
        monitor.start(0, 8)
        for step in range(1, 9):
            monitor.before(step, None, 0)
            function(jnp.zeros(3 if step < 6 else step))  # from the sixth on, another shape each
            with monitor.compiling():
                jax.jit(lambda x: x - 1)(jnp.zeros(20 + step))
    assert ["step 7" in line or "step 8" in line for line in said] == [True] * len(said)
    assert len(said) >= 2 and "toy: something was compiled again before step 7" in said[0]
    # Who has left hears nothing.
    heard = len(monitor._compilations)
    jax.jit(lambda x: x - 2)(jnp.zeros(3))
    assert len(monitor._compilations) == heard


def traces(place):
    times = place / "plugins" / "profile"
    folders = times.iterdir() if times.exists() else ()
    return [path for folder in folders for path in folder.iterdir() if path.suffix == ".pb"]


@pytest.mark.parametrize("last", [3, 100])
def test_a_profile_is_written(place, last):
    function = jax.jit(lambda x: x @ x)
    with make(place, profile=(2, last)) as monitor:
        monitor.start(0, 8)
        x = jnp.ones((8, 8))
        for step in range(1, 6):
            monitor.before(step, x, 0)
            x = function(x)
            if step > last:
                monitor._upload.join()  # in the background
            assert bool(traces(place)) == (step > last)
    (trace,) = traces(place)
    assert trace.name.endswith(".xplane.pb") and trace.stat().length > 1000


@pytest.mark.parametrize(
    ("profile", "said"), [((10, 20), True), ((151, 160), True), ((90, 101), False), ((), False)]
)
def test_a_profile_of_other_steps_is_said(tmp_path, monkeypatch, profile, said):
    lines = []
    monkeypatch.setattr(logging, "info", lambda text, *values: lines.append(text % values))
    make(tmp_path, profile=profile).start(100, 150)
    text = f"toy: config.profile = {profile} lies outside of steps 101 to 150: no profile"
    assert lines == [text] * said


def test_a_profile_that_cannot_be_uploaded_does_not_end_the_run(service, monkeypatch):
    said = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: said.append(text % values))
    with make(user_path("gs://bucket/run"), profile=(1, 1)) as monitor:
        monitor.before(1, jnp.ones(1), 0)
        service.deny = 403
    (line,) = said
    assert "toy: no profile in gs://bucket/run: cannot write to gs://bucket: these" in line


def test_memory_of_a_step_counts_donated_arguments_once():
    def step(state, batch):
        return state + batch.sum(), batch.mean()

    state, batch = jnp.zeros((256, 256)), jnp.zeros(16)
    compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
    memory = step_memory(compiled)
    assert memory["arguments"] == 4 * (256 * 256 + 16)
    assert memory["peak"] - memory["temporary"] == pytest.approx(memory["arguments"], abs=64)
