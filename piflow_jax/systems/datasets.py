"""The table of data sets: everything that depends on the choice of a data set."""

import dataclasses
from collections.abc import Callable
from typing import Any

from piflow_jax.config import Config, ConfigError, DataConfig
from piflow_jax.data import (
    Source,
    load_captioned_digits_source,
    load_digits_source,
    load_edited_digits_source,
    load_emoji_source,
    load_fashion_mnist_source,
    load_images_source,
    load_latents_source,
    load_mnist_source,
    load_prompts_source,
)
from piflow_jax.data.emoji import EMOJI_CLASSES
from piflow_jax.data.mnist import DIGIT_CLASSES, FASHION_CLASSES
from piflow_jax.data.shards import ShardsError
from piflow_jax.systems.networks import official_data
from piflow_jax.systems.shapes import DataShape


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """A row of `DATASETS`.

    Attributes:
      load: opens the source of `config.data`.
      captions: conditions are embedded captions instead of labels.
      latents: states are an autoencoder's latents.
      pictures: states are the pixels of pictures that the user names, prepared once.
      by_class: every class can be sampled. For a set without classes, pictures are drawn and
        measured by a list of prompts, and no teacher is trained on it.
      bundled: the source is available wherever the package is, or is small enough to be opened just
        for its shape.
      features: the feature space that ships with the package for its images; empty if there is
        none.
      class_names: names of its classes, if they are fixed.
      uses: keys of `config` that only this data uses.
    """

    load: Callable[[DataConfig], Source]
    captions: bool = False
    latents: bool = False
    pictures: bool = False
    by_class: bool = True
    bundled: bool = True
    features: str = ""
    class_names: tuple[str, ...] = ()
    uses: frozenset[str] = frozenset()


def _open(load: Callable[..., Source], data: DataConfig, **options: Any) -> Source:
    # Comparing all checksums reads the whole set; a damaged record raises when it is read.
    return load(data.data_dir, verify=False, cache_gib=data.local_cache_gib, **options)


DATASETS: dict[str, Dataset] = {
    "digits": Dataset(
        load=lambda data: load_digits_source(), features="digits", class_names=DIGIT_CLASSES
    ),
    "mnist": Dataset(
        load=lambda data: load_mnist_source(data.data_dir or None),
        features="mnist",
        class_names=DIGIT_CLASSES,
        uses=frozenset({"data.data_dir"}),
    ),
    "fashion_mnist": Dataset(
        load=lambda data: load_fashion_mnist_source(data.data_dir or None),
        features="fashion_mnist",
        class_names=FASHION_CLASSES,
        uses=frozenset({"data.data_dir"}),
    ),
    "emoji": Dataset(
        load=lambda data: load_emoji_source(data.data_dir or None),
        class_names=EMOJI_CLASSES,
        uses=frozenset({"data.data_dir"}),
    ),
    "captioned_digits": Dataset(
        load=lambda data: load_captioned_digits_source(), captions=True, features="digits"
    ),
    "edited_digits": Dataset(
        load=lambda data: load_edited_digits_source(), captions=True, features="digits"
    ),
    "images": Dataset(
        load=lambda data: _open(load_images_source, data, mirror=data.mirror),
        pictures=True,
        bundled=False,
        uses=frozenset({"data.data_dir", "data.images", "data.channels", "data.mirror"}),
    ),
    "latents": Dataset(
        load=lambda data: _open(load_latents_source, data),
        latents=True,
        bundled=False,
        uses=frozenset(
            {
                *("data.data_dir", "data.images", "data.latents", "data.vae"),
                "evaluation.reference",
            }
        ),
    ),
    "prompts": Dataset(
        load=lambda data: _open(load_prompts_source, data),
        captions=True,
        latents=True,
        by_class=False,
        bundled=False,
        uses=frozenset(
            {
                *("data.data_dir", "data.vae", "data.prompts", "data.text_encoder"),
                *("evaluation.images", "evaluation.teacher_images"),
                *("evaluation.clip", "evaluation.diversity_features"),
            }
        ),
    ),
}


def dataset(config: Config) -> Dataset:
    """The row of `DATASETS` for a run's data."""
    return DATASETS[config.data.name]


def class_names(data: DataShape) -> list[str]:
    """Names of the classes in the order of their labels; their numbers where none are known."""
    known = DATASETS[data.name].class_names if data.name in DATASETS else ()
    return list(known or map("class {}".format, range(data.num_classes)))


def load_source(data: DataConfig) -> Source:
    """Opens a run's data.

    Args:
      data: the settings of the data.

    Returns:
      The source.

    Raises:
      ConfigError: a file is damaged, or a package is missing that reads it.
      FileNotFoundError: the data is not on this machine; the message says how to get it.
      ShardsError: a prepared set is incomplete or damaged.
    """
    try:
        return DATASETS[data.name].load(data)
    except (ConfigError, ShardsError):
        raise
    except ImportError as error:
        raise ConfigError(str(error)) from error
    except ValueError as error:
        raise ConfigError(f"config.data.data_dir: {error}") from error


def shape_of(config: Config, source: Source) -> DataShape:
    """The shape and conditions of a run's data, as networks need them.

    A set of prompts without latents does not know their channels, which are then the network's.
    """
    data, official = DataShape.of(config.data.name, source), official_data(config)
    if official is None or getattr(source, "has_latents", True):
        return data
    return dataclasses.replace(data, channels=official.channels)
