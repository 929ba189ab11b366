"""Data sets and the pipeline that they share: `batches(load_source("digits"), ...)`."""

from collections.abc import Callable

from piflow_jax.data.captions import CaptionedDigits, load_captioned_digits_source
from piflow_jax.data.digits import load_digits_source
from piflow_jax.data.latents import LatentsSource, load_latents_source
from piflow_jax.data.mnist import load_mnist_source
from piflow_jax.data.pipeline import BatchIterator, batches
from piflow_jax.data.prompts import PromptsSource, load_prompts_source
from piflow_jax.data.source import ArraySource, Source

__all__ = ["SOURCES", "ArraySource", "BatchIterator", "Source", "batches", "load_source"]

AnySource = ArraySource | LatentsSource | PromptsSource | CaptionedDigits

SOURCES: dict[str, Callable[[str | None], AnySource]] = {
    "digits": lambda data_dir: load_digits_source(),
    "mnist": load_mnist_source,
    "captioned_digits": lambda data_dir: load_captioned_digits_source(),
    # Comparing all checksums reads the whole set; a damaged record raises when it is read.
    "imagenet": lambda data_dir: load_latents_source(data_dir or "", verify=False),
    "prompts": lambda data_dir: load_prompts_source(data_dir or "", verify=False),
}


def load_source(name: str, data_dir: str | None = None) -> AnySource:
    """Loads a data set by name.

    Args:
      name: A key of `SOURCES`.
      data_dir: Where to look for data that does not ship with a package; digits ignore it.

    Returns:
      The source, with a `name`. Images and latents have `num_classes` and `shape`, those in memory
      `images` and `labels`; of prompts see `PromptsSource`.

    Raises:
      ValueError: If there is no data set of that name.
      FileNotFoundError: If its data is not on this machine; the message says how to get it.
    """
    if name not in SOURCES:
        raise ValueError(f"unknown data set {name!r}; choose one of {sorted(SOURCES)}")
    return SOURCES[name](data_dir)
