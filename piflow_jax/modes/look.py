"""Looks at a student in training: a grid of samples, and figures where there is a measure."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from piflow_jax.config import Config
from piflow_jax.data import Source
from piflow_jax.evaluation import IndexSampler, as_pictures, draw_grid, measure
from piflow_jax.evaluation.adm import measure_adm, to_uint8
from piflow_jax.modes.adm import load_inception, load_reference, protocol
from piflow_jax.modes.autoencoder import check_autoencoder, load_autoencoder, pixel_sampler
from piflow_jax.modes.sample import grid_rows
from piflow_jax.parallel import batch_sharding, local_mesh, replicated
from piflow_jax.runs.loop import Look
from piflow_jax.systems.assembly import Systems
from piflow_jax.systems.datasets import dataset
from piflow_jax.systems.judges import Judge, real_samples
from piflow_jax.systems.sampling import conditions_in_turn
from piflow_jax.systems.shapes import DataShape

# Columns of a grid; more would be too small to see in TensorBoard.
_COLUMNS = 8


def student_look(
    config: Config, source: Source, data: DataShape, judge: Judge | None
) -> Callable[..., Look]:
    """How to look at a student of these settings.

    Figures are those of the report: of the data set's feature space, or ADM's where
    `config.evaluation` names feature weights and a reference. A look at latents without these has a
    grid and no figures.

    Args:
      config: the run's settings.
      source: the data.
      data: what they look like.
      judge: the feature space of samples that are no latents.

    Returns:
      `params -> Look`, compiled at its first call.

    Raises:
      ConfigError: an autoencoder, feature weights or a reference do not fit.
      FileNotFoundError: one of them is not there.
    """
    settings, (names, shown) = config.evaluation, grid_rows(config, source, data)
    sampler, decoder = Systems.of(config, data).student_sampler(), ()
    latents = dataset(config).latents
    if latents:
        autoencoder = load_autoencoder(config)
        check_autoencoder(autoencoder, data)
        sampler = pixel_sampler(sampler, autoencoder.module, data)
        decoder = (jax.device_put(autoencoder.params, replicated(local_mesh())),)

    def index_sampler(conditions, number):
        return IndexSampler(
            sampler,
            shape=data.shape,
            conditions=conditions,
            batch_size=settings.batch_size,
            num_samples=number,
            seed=settings.seed,
            sharding=batch_sharding(local_mesh()),
        )

    conditions, labels = conditions_in_turn(source, data)
    grid_sampler = index_sampler(shown, _COLUMNS * len(names))
    all_sampler = index_sampler(conditions, settings.every_samples)
    labels = labels[np.arange(settings.every_samples) % len(labels)]
    if not latents:
        network = judge
        real = network.extract(real_samples(source)[0])
    elif settings.features or settings.reference:
        network = load_inception(config)
        reference = load_reference(config, network)
        made = protocol(config, data, autoencoder, network, reference, settings.every_samples)
    else:
        network = None

    def figures(params) -> dict[str, float]:
        if network is None:
            return {}
        if not latents:
            samples = all_sampler(params, settings.every_samples)
            return dataclasses.asdict(measure(samples, labels, real, network))
        batches = all_sampler.batches(params, range(settings.every_samples))
        measured = measure_adm(map(to_uint8, batches), network, reference, made)
        values = dataclasses.asdict(measured)
        return {name: value for name, value in values.items() if isinstance(value, float)}

    def look(params) -> Look:
        params = jax.device_put(params, replicated(local_mesh()))
        params = (params, *decoder) if latents else params
        images = as_pictures(grid_sampler(params, _COLUMNS * len(names)))
        rows = [(name, images[i :: len(names)]) for i, name in enumerate(names)]
        found = figures(params)
        return Look(
            figures=found,
            images={"student": np.asarray(draw_grid(rows))},
            distance=found.get("frechet"),
        )

    return look
