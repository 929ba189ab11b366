"""The metric writer: its event files, and the rest with a stand-in for them."""

import contextlib
import io
import json
import logging
import math
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

from piflow_jax.progress import clock
from piflow_jax.runs import metrics
from piflow_jax.runs.events import EventWriter
from piflow_jax.runs.metrics import MetricWriter


class FakeEvents:
    def __init__(self, directory):
        self.directory, self.calls, self.closed = directory, [], False

    def write_scalars(self, step, scalars):
        if "broken" in scalars:
            raise OSError(28, "No space left on device")
        self.calls.append((step, dict(scalars)))

    def write_images(self, step, images):
        self.calls.append((step, {name: image.shape for name, image in images.items()}))

    def close(self):
        self.closed = True


@pytest.fixture
def events(monkeypatch):
    made = []

    def open_events(directory):
        made.append(FakeEvents(directory))
        return made[-1]

    monkeypatch.setattr(metrics, "_open_events", open_events)
    return made


def read(workdir, stage="teacher"):
    lines = (workdir / stage / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]


def test_events_and_lines_through_clu(tmp_path):
    tmp_path = tmp_path / "a run [1]"  # which would be a pattern
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    with MetricWriter(tmp_path, "teacher", 20) as writer:
        for step in (10, 20):
            writer.write(step, {"loss": 1 / step, "grad_norm": np.float32(0.5)})
        writer.images(20, {"samples": np.zeros((8, 8, 1), np.uint8)})
    recorded = EventAccumulator(str(tmp_path / "teacher"), size_guidance={"tensors": 0}).Reload()
    loss = recorded.Tensors("loss")
    assert [event.step for event in loss] == [10, 20]
    np.testing.assert_allclose([make_ndarray(e.tensor_proto) for e in loss], [0.1, 0.05], 1e-6)
    assert "samples" in recorded.Tags()["tensors"]
    ((step, picture),) = metrics.logged_images(epath.Path(tmp_path / "teacher"))
    assert step == 20 and Image.open(io.BytesIO(picture)).size == (8, 8)
    assert [(line["step"], line["loss"], line["stage"]) for line in read(tmp_path)] == [
        (10, 0.1, "teacher"),
        (20, 0.05, "teacher"),
    ]


@pytest.mark.filterwarnings("error")
def test_every_kind_of_event_is_as_tensorboard_reads_it(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG as START
    from tensorboard.plugins.hparams.metadata import parse_session_start_info_plugin_data
    from tensorboard.plugins.text.metadata import create_summary_metadata
    from tensorboard.util.tensor_util import make_ndarray

    picture = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), np.uint8)
    with contextlib.closing(EventWriter(tmp_path)) as writer:
        writer.write_scalars(1, {"loss": 0.25, "nan": math.nan})
        writer.write_scalars(2, {"loss": np.float64(1e300)})  # infinite, in float32
        grey = picture[0, ..., :1] / 255
        beyond = np.where(grey < 0.1, np.nan, grey * 4 - 1)
        writer.write_images(2, {"bytes": picture, "floats": grey, "beyond": beyond})
        writer.write_texts(3, {"prompt": "a *cat*"})
        writer.write_histograms(4, {"weights": np.arange(10.0)}, {"weights": 5})
        writer.write_hparams({"lr": 0.1, "name": "x"})
        described = create_summary_metadata(display_name=None, description=None)
        writer.write_summaries(5, {"raw": np.array([b"a", b"b"])}, {"raw": described})
        writer.write_summaries(6, {"raw": [b"c"]}, {"raw": described.SerializeToString()})
        writer.write_videos(7, {"video": picture[None]})
        writer.write_audios(7, {"audio": np.zeros((1, 9, 1))}, sample_rate=3)
        writer.flush()
        recorded = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0}).Reload()

    def read(tag):
        return [(e.step, make_ndarray(e.tensor_proto).tolist()) for e in recorded.Tensors(tag)]

    def pixels(tag):
        ((step, (width, height, *pngs)),) = read(tag)
        assert (step, width, height) == (2, b"7", b"5")
        return np.stack([np.asarray(Image.open(io.BytesIO(png))) for png in pngs])

    assert read("loss") == [(1, 0.25), (2, math.inf)] and math.isnan(read("nan")[0][1])
    np.testing.assert_array_equal(pixels("bytes"), picture)
    np.testing.assert_array_equal(pixels("floats"), picture[:1, ..., 0])
    beyond = np.clip(picture[:1, ..., 0] * 4.0 - 255, 0, 255)
    np.testing.assert_allclose(pixels("beyond"), beyond, atol=1)
    assert read("prompt") == [(3, b"a *cat*")]
    ((step, buckets),) = read("weights")
    assert step == 4 and [count for *_, count in buckets] == [2] * 5
    started = recorded.SummaryMetadata(START).plugin_data.content
    start = parse_session_start_info_plugin_data(started)
    assert start.hparams["lr"].number_value == 0.1 and start.hparams["name"].string_value == "x"
    assert read("raw") == [(5, [b"a", b"b"]), (6, [b"c"])]
    assert {"video", "audio"}.isdisjoint(recorded.Tags()["tensors"])


def test_writing_an_event_file_does_not_import_tensorflow(tmp_path):
    code = """
import sys, types, piflow_jax, piflow_jax.runs.metrics as metrics
assert not {"tensorboard", "clu"} & set(sys.modules)
with metrics.MetricWriter(sys.argv[1], "teacher", 1) as writer:
    writer.write(1, {"loss": 1.0})
    writer.images(1, {"x": metrics.np.zeros((8, 8, 1))})
assert metrics.logged_images(metrics.user_path(sys.argv[1]) / "teacher")
assert not {"tensorflow", "clu.metric_writers"} & set(sys.modules)
sys.modules["clu.metric_writers.summary_writer"] = types.SimpleNamespace(SummaryWriter=None)
import clu.metric_writers, piflow_jax.runs.events
assert issubclass(piflow_jax.runs.events.EventWriter, clu.metric_writers.MetricWriter)
"""
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True, timeout=60)


def test_order_of_events_and_close(tmp_path, events):
    with MetricWriter(tmp_path, "teacher", 100) as writer:
        for step in range(50):
            writer.write(step, {"loss": step})
        writer.images(50, {"samples": np.zeros((2, 8, 8, 1))})
    assert [step for step, _ in events[0].calls] == list(range(51))
    assert events[0].closed and events[0].directory == str(tmp_path / "teacher")
    writer.close()  # again


def test_non_finite_values_are_valid_json(tmp_path, events):
    values = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.5}
    with MetricWriter(tmp_path, "teacher", 100) as writer:
        writer.write(1, values)
    (line,) = read(tmp_path)
    assert (line["a"], line["b"], line["c"], line["d"]) == ("NaN", "Infinity", "-Infinity", 1.5)
    assert all(repr(float(line[name])) == repr(value) for name, value in values.items())


def test_lines_are_on_disk_at_once(tmp_path, events):
    with MetricWriter(tmp_path, "teacher", 100) as writer:
        writer.write(1, {"loss": 1.0})
        assert len(read(tmp_path)) == 1


def test_resuming_repeats_no_line(tmp_path, events):
    with MetricWriter(tmp_path, "teacher", 100) as writer:
        for step in (0, 10, 20, 30, 40):
            writer.write(step, {"loss": 1.0})
    path = tmp_path / "teacher" / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 15, "lo')  # killed while writing
    with MetricWriter(tmp_path, "teacher", 100, first_step=20) as writer:
        for step in (30, 40):
            writer.write(step, {"loss": 2.0})
    assert [(line["step"], line["loss"]) for line in read(tmp_path)] == [
        (0, 1.0),
        (10, 1.0),
        (20, 1.0),
        (30, 2.0),
        (40, 2.0),
    ]
    with MetricWriter(tmp_path, "teacher", 100) as writer:  # a new run
        writer.write(10, {"loss": 3.0})
    assert [line["loss"] for line in read(tmp_path)] == [3.0]


def test_reserved_names(tmp_path, events):
    with (
        MetricWriter(tmp_path, "teacher", 100) as writer,
        pytest.raises(ValueError, match="cannot be called step"),
    ):
        writer.write(1, {"step": 1.0})


def test_a_failed_event_surfaces(tmp_path, events):
    writer = MetricWriter(tmp_path, "teacher", 100)
    writer.write(1, {"broken": 1.0})
    with pytest.raises(OSError, match=r"metrics to .*/teacher \(.*No space left on device.* free"):
        writer.close()
    with pytest.raises(ZeroDivisionError), MetricWriter(tmp_path, "teacher", 100) as writer:
        writer.write(1, {"broken": 1.0})
        raise ZeroDivisionError


def test_writing_does_not_wait_for_the_event_file(tmp_path, monkeypatch):
    ready = threading.Event()
    made = []

    def slow(directory):
        assert ready.wait(20)
        made.append(FakeEvents(directory))
        return made[-1]

    monkeypatch.setattr(metrics, "_open_events", slow)
    with MetricWriter(tmp_path, "teacher", 100) as writer:
        writer.write(1, {"loss": 1.0})
        writer.write(2, {"loss": 1.0})
        assert not made
        ready.set()
    assert [step for step, _ in made[0].calls] == [1, 2]


@pytest.mark.parametrize("package", ["clu", "tensorboard"])
def test_a_missing_package_names_the_remedy(tmp_path, monkeypatch, package):
    find = metrics.importlib.util.find_spec
    monkeypatch.setattr(
        metrics.importlib.util, "find_spec", lambda n: None if n == package else find(n)
    )
    with pytest.raises(ImportError, match=rf"need {package}, not installed.*pip install"):
        MetricWriter(tmp_path, "teacher", 100)


@pytest.mark.parametrize("module", ["clu", "tensorboard.summary.writer.record_writer"])
def test_a_broken_package_names_the_remedy(tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)  # its import raises
    monkeypatch.delitem(sys.modules, "piflow_jax.runs.events", raising=False)
    monkeypatch.setattr(metrics, "_require", lambda *packages: None)
    writer = MetricWriter(tmp_path, "teacher", 100)
    with pytest.raises(ImportError, match="pip install"):
        writer.close()


def test_other_processes_write_nothing(tmp_path, events, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with MetricWriter(tmp_path, "teacher", 100) as writer:
        writer.write(1, {"loss": 1.0})
        writer.images(1, {"x": np.zeros((8, 8, 1))})
        writer.say("hello")
    assert not events and not list(tmp_path.iterdir())


def advance(monkeypatch, seconds):
    """A clock on which every write comes `seconds` after the one before."""
    now = [0.0]

    def monotonic():
        now[0] += seconds
        return now[0]

    monkeypatch.setattr(metrics.time, "monotonic", monotonic)


def test_log_lines_elsewhere_than_on_a_terminal(tmp_path, events, monkeypatch, caplog):
    advance(monkeypatch, 0.213)
    caplog.set_level(logging.INFO)
    absl = logging.getLogger("absl")
    level = absl.level
    absl.setLevel(logging.INFO)
    absl.addHandler(caplog.handler)
    scalars = {"loss": 0.0123, "grad_norm": 0.41, "examples_per_second": 5980.4, "other": 3.0}
    try:
        with MetricWriter(tmp_path, "distil", 3000, print_every=100) as writer:
            for step in range(10, 310, 10):
                writer.write(step, scalars)
            writer.write(300, {"frechet": 1.0})  # nothing to show: no line
            writer.write(3000, scalars)
            writer.say("saved")
    finally:
        absl.removeHandler(caplog.handler)
        absl.setLevel(level)
    lines = list(dict.fromkeys(record.message for record in caplog.records))
    assert lines[:3] == [
        "distil   100/3000  loss 0.0123  grad 0.41  21.3 ms/step  5,980 ex/s  ETA 1:02",
        "distil   200/3000  loss 0.0123  grad 0.41  21.3 ms/step  5,980 ex/s  ETA 1:00",
        "distil   300/3000  loss 0.0123  grad 0.41  21.3 ms/step  5,980 ex/s  ETA 0:58",
    ]
    assert lines[3].startswith("distil  3000/3000  loss 0.0123") and "ETA" not in lines[3]
    assert lines[4:] == ["saved"]


def test_one_live_line_on_a_terminal(tmp_path, events, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    advance(monkeypatch, 0.1)
    with MetricWriter(tmp_path, "distil", 100, first_step=40) as writer:
        for step in (50, 60, 100):
            writer.write(step, {"loss": 0.5})
        writer.say("saved")
    shown = terminal.getvalue()
    assert "40/100" in shown and "saved\n" in shown
    last = [part for part in shown.split("\r") if "100/100" in part][-1]
    assert "distil" in last and "loss 0.5" in last


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (37.6, "0:38"), (725, "12:05"), (3723, "1:02:03")]
)
def test_clock(seconds, text):
    assert clock(seconds) == text
