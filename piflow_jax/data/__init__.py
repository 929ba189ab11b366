"""Data sets and the pipeline that they share: `batches(source, ...)`."""

from piflow_jax.data.captions import CaptionedDigits, load_captioned_digits_source
from piflow_jax.data.digits import load_digits_source
from piflow_jax.data.edits import EditedDigits, load_edited_digits_source
from piflow_jax.data.emoji import load_emoji_source
from piflow_jax.data.images import ImagesSource, load_images_source
from piflow_jax.data.latents import LatentsSource, load_latents_source
from piflow_jax.data.mnist import load_fashion_mnist_source, load_mnist_source
from piflow_jax.data.pipeline import BatchIterator, batches
from piflow_jax.data.prompts import PromptsSource, load_prompts_source
from piflow_jax.data.source import ArraySource, Source, as_source, has_states, stacked

__all__ = [
    "ArraySource",
    "BatchIterator",
    "CaptionedDigits",
    "EditedDigits",
    "ImagesSource",
    "LatentsSource",
    "PromptsSource",
    "Source",
    "as_source",
    "batches",
    "has_states",
    "load_captioned_digits_source",
    "load_digits_source",
    "load_edited_digits_source",
    "load_emoji_source",
    "load_fashion_mnist_source",
    "load_images_source",
    "load_latents_source",
    "load_mnist_source",
    "load_prompts_source",
    "stacked",
]
