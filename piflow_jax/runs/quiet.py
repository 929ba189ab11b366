"""What Orbax and TensorStore would say in the middle of a run's own lines."""

import functools
import logging as std_logging
import sys
import warnings
from collections.abc import Callable
from typing import Any

from absl import logging


@functools.cache
def quiet() -> None:
    """Keeps the noise of Orbax and TensorStore from burying a run's own lines."""
    logging.get_absl_logger().addFilter(_no_orbax_noise)
    std_logging.getLogger("asyncio").addFilter(_no_lost_errors)
    warnings.filterwarnings("ignore", "coroutine 'async_serialize", RuntimeWarning)
    sys.unraisablehook = functools.partial(_no_late_reads, sys.unraisablehook)


def _no_orbax_noise(record: std_logging.LogRecord) -> bool:
    """Drops what Orbax logs below the level of an error, and the tracebacks of what it raises."""
    error = record.levelno >= std_logging.ERROR and not record.exc_info
    return error or "/orbax/" not in record.pathname


def _no_lost_errors(record: std_logging.LogRecord) -> bool:
    """Drops what asyncio says of reads and writes that failed after the first, which is raised."""
    text = std_logging.Formatter().format(record)  # with the traceback
    return "never retrieved" not in text or not ("orbax" in text or "tensorstore" in text)


def _no_late_reads(otherwise: Callable[[Any], object], unraisable: Any) -> None:
    """Drops what reads of Orbax say that end when another one has failed: their loop is closed."""
    code = getattr(unraisable.object, "cr_code", None)
    of_orbax = code is not None and "orbax" in code.co_filename
    if not of_orbax and str(unraisable.exc_value) != "Event loop is closed":
        otherwise(unraisable)
