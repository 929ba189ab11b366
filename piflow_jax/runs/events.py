"""TensorBoard's event files without TensorFlow, whose import takes 5 s of a processor and 600 MB.

`clu.metric_writers` has the interface, and imports TensorFlow for the writer behind it. TensorBoard
has the messages and the format of the files, and needs no TensorFlow. Import this module where a
file is opened: it takes a tenth of a second.
"""

import importlib.util
import io
import os
import socket
import sys
import time
from collections.abc import Mapping
from typing import Any

import clu
import numpy as np
from absl import logging
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SourceMetadata
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.plugins.histogram.summary_v2 import histogram_pb
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.plugins.image.metadata import create_summary_metadata
from tensorboard.plugins.scalar.summary_v2 import scalar_pb
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorboard.util.tensor_util import make_tensor_proto


def _interface():
    """`clu.metric_writers.interface` without its package, which imports TensorFlow.

    Under its own name: a later `import clu.metric_writers` finds the same classes.
    """
    name = "clu.metric_writers.interface"
    if name not in sys.modules:
        path = os.path.join(clu.__path__[0], "metric_writers", "interface.py")
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name]


class EventWriter(_interface().MetricWriter):
    """A `clu.metric_writers.MetricWriter` of one event file; what it writes is on disk at once.

    Args:
      directory: a local directory that exists; the file is a new one.

    Raises:
      OSError: the file cannot be written; of every method.
    """

    def __init__(self, directory: str | os.PathLike):
        before = sum(name.startswith("events.out.tfevents.") for name in os.listdir(directory))
        # TensorBoard reads them in the order of their names.
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self._file = open(os.path.join(directory, f"{name}.{before}"), "xb")  # noqa: SIM115
        self._records = RecordWriter(self._file)
        self._add(file_version="brain.Event:2", source_metadata=SourceMetadata(writer="piflow_jax"))

    def _add(self, **fields) -> None:
        self._records.write(Event(wall_time=time.time(), **fields).SerializeToString())
        self._records.flush()

    def _summaries(self, step: int, summaries: list[Summary]) -> None:
        values = [value for summary in summaries for value in summary.value]
        self._add(step=step, summary=Summary(value=values))

    def write_summaries(
        self, step: int, values: Mapping[str, Any], metadata: Mapping[str, Any] | None = None
    ) -> None:
        """Writes arrays for a plugin, each with its `SummaryMetadata` or the bytes of one."""
        summary = Summary()
        for tag, value in values.items():
            kind = (metadata or {}).get(tag)
            kind = SummaryMetadata.FromString(kind) if isinstance(kind, bytes) else kind
            summary.value.add(tag=tag, tensor=make_tensor_proto(np.asarray(value)), metadata=kind)
        self._summaries(step, [summary])

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Writes scalars of a step, as float32."""
        with np.errstate(over="ignore"):  # infinite in float32
            self._summaries(step, [scalar_pb(tag, value) for tag, value in scalars.items()])

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        """Writes images `[H, W, C]` or `[N, H, W, C]` of a step: uint8, or floats in [0, 1]."""
        summary = Summary()
        for tag, image in images.items():
            batch = np.asarray(image)
            batch = batch if batch.ndim == 4 else batch[None]
            if batch.dtype != np.uint8:
                batch = (np.clip(np.nan_to_num(batch), 0.0, 1.0) * 255.5).astype(np.uint8)
            height, width = batch.shape[1:3]
            parts = [b"%d" % width, b"%d" % height, *map(_png, batch)]
            metadata = create_summary_metadata(display_name=None, description=None)
            summary.value.add(tag=tag, tensor=make_tensor_proto(parts), metadata=metadata)
        self._summaries(step, [summary])

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Writes texts of a step, which TensorBoard shows as Markdown."""
        self._summaries(step, [text_pb(tag, text) for tag, text in texts.items()])

    def write_histograms(
        self,
        step: int,
        arrays: Mapping[str, Any],
        num_buckets: Mapping[str, int] | None = None,
    ) -> None:
        """Writes histograms of arrays of a step."""
        buckets = num_buckets or {}
        self._summaries(step, [histogram_pb(t, a, buckets.get(t)) for t, a in arrays.items()])

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Writes hyperparameters of the run by their names."""
        self._summaries(0, [hparams_pb(dict(hparams))])

    def write_videos(self, step: int, videos: Mapping[str, Any]) -> None:
        """Nothing, as with `clu.metric_writers.SummaryWriter`."""
        logging.log_first_n(logging.WARNING, "event files do not take videos", 1)

    def write_audios(self, step: int, audios: Mapping[str, Any], *, sample_rate: int) -> None:
        """Nothing: nothing here makes a sound."""
        logging.log_first_n(logging.WARNING, "event files do not take audio", 1)

    def flush(self) -> None:
        """Nothing: what was written is on disk."""

    def close(self) -> None:
        """Closes the file."""
        self._records.close()


def _png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, "PNG")
    return file.getvalue()
