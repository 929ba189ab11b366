"""`--mode=prepare` of images: their pixels, decoded once; also in `--mode=train`."""

import dataclasses
import os

from absl import logging
from jax.experimental import multihost_utils

from piflow_jax.config import Config, ConfigError
from piflow_jax.data.images import (
    ImagesError,
    ImagesPlan,
    plan_images,
    prepare_images,
    prepared_images,
)
from piflow_jax.data.picture_sets import open_pictures
from piflow_jax.data.pictures import NoPicturesError

_FOLDER = "data"  # of a work directory


def in_workdir(config: Config, workdir: str | os.PathLike) -> Config:
    """The settings, with the place of the run's pixels.

    Args:
      config: the run's settings, of a data set of images.
      workdir: the run's directory.

    Returns:
      The settings with `config.data.data_dir`, which is by default `data` in the work directory.
    """
    place = config.data.data_dir or os.path.join(workdir, _FOLDER)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, data_dir=place))


def prepare_pixels(config: Config, workdir: str | os.PathLike) -> None:
    """`--mode=prepare` of images: `config.data.images` into `config.data.data_dir`.

    Args:
      config: the run's settings; `config.data` names images, their size and the directory.
      workdir: not used; see `in_workdir`.

    Raises:
      ConfigError: the images are not named.
      FileNotFoundError: they are not there.
      ImagesError: another preparation was begun in the directory, or shards are damaged.
      PicturesError: `config.data.images` is not what it should be.
      RefusedError: images cannot be read, and `config.data.skip_refused` is not set.
    """
    settings = config.data
    if not settings.images:
        raise ConfigError("--mode=prepare of images needs config.data.images")
    pictures = open_pictures(settings.images)
    plan = plan_images(pictures, settings.image_size, settings.channels)
    logging.info(
        "prepare: %d %s images of %dx%d, %d classes, from %s into %s",
        plan.num_examples,
        "grey" if plan.channels == 1 else "colour",
        *(plan.image_size, plan.image_size, len(plan.class_names)),
        *(settings.images, settings.data_dir),
    )
    prepare_images(
        settings.data_dir,
        plan,
        pictures,
        skip_refused=settings.skip_refused,
    )


def prepare_missing(config: Config, workdir: str | os.PathLike) -> None:
    """Prepares the pixels that a run is about to train on, where they are not yet.

    A preparation that has not finished is continued. A finished set is compared with
    `config.data.images`, if these are named and still there. Of several processes, all return when
    the set is complete.

    Args:
      config: see `prepare_pixels`.
      workdir: not used.

    Raises:
      ConfigError: there is no set, and the images are not named.
      ImagesError: a finished set is of other images; see `prepare_pixels` too.
    """
    found = prepared_images(config.data.data_dir)
    if found is not None:
        _compare(found, config)
    elif config.data.images:
        prepare_pixels(config, workdir)
    else:
        raise ConfigError(
            f"there are no prepared images in config.data.data_dir = {config.data.data_dir!r}: "
            "name what to prepare by config.data.images"
        )
    multihost_utils.sync_global_devices("images")  # waits for the others' shards


def _compare(found: ImagesPlan, config: Config) -> None:
    """Refuses a finished set that is not what the settings would make."""
    settings = config.data
    if not settings.images:
        return
    try:
        pictures = open_pictures(settings.images)
    except (FileNotFoundError, NoPicturesError):
        logging.info("data: %s is gone, its prepared pixels are used", settings.images)
        return
    wanted = plan_images(pictures, settings.image_size, settings.channels or found.channels)
    different = [
        f"{name} is {getattr(found, name)!r}, not {getattr(wanted, name)!r}"
        for name in ("source", "class_names", "image_size", "channels")
        if getattr(found, name) != getattr(wanted, name)
    ]
    if different:
        raise ImagesError(
            f"{settings.data_dir} was prepared of other images or settings ({'; '.join(different)})"
            "; remove it, or name another config.data.data_dir"
        )
