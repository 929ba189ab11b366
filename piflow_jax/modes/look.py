"""Evaluation of a student during training, for runs of the command line."""

import dataclasses
from collections.abc import Callable

from piflow_jax.config import Config
from piflow_jax.data import Source
from piflow_jax.distillation.bench import judged
from piflow_jax.distillation.looks import Measure, look_by
from piflow_jax.evaluation.adm import measure_adm, to_uint8
from piflow_jax.modes.adm import load_reference, protocol
from piflow_jax.modes.autoencoder import load_autoencoder, pixel_sampler
from piflow_jax.runs.loop import Look
from piflow_jax.systems.assembly import Systems
from piflow_jax.systems.datasets import dataset
from piflow_jax.systems.judges import InceptionJudge, Judge, described, load_inception
from piflow_jax.systems.shapes import DataShape


def student_look(
    config: Config, source: Source, data: DataShape, judge: Judge | None
) -> Callable[..., Look]:
    """Makes the evaluation of a student during training.

    It has the figures of the report: in the data set's feature space, or ADM's if
    `config.evaluation` names feature weights and a reference. For latents without these, and for
    samples without a feature space, it draws a grid only.

    Args:
      config: the run's settings.
      source: the data.
      data: shape and conditions of the data.
      judge: the feature space for samples that are not latents; None if there is none.

    Returns:
      `params -> Look`, compiled at its first call.

    Raises:
      ConfigError: an autoencoder, feature weights or a reference do not fit.
      FileNotFoundError: one of them is not there.
    """
    settings, sampler = config.evaluation, Systems.of(config, data).student_sampler()
    if not dataset(config).latents:
        return look_by(config, source, data, sampler, judged(source, judge))
    autoencoder = load_autoencoder(config, data)
    sampler, measure = pixel_sampler(sampler, autoencoder.module, data), None
    if settings.features or settings.reference:
        network = load_inception(settings)
        reference = load_reference(config, network)
        made = protocol(config, data, autoencoder, network, reference, settings.every_samples)

        def figures(sampler, params, labels):
            batches = sampler.batches(params, range(len(labels)))
            measured = measure_adm(map(to_uint8, batches), network, reference, made)
            values = dataclasses.asdict(measured)
            return {name: value for name, value in values.items() if isinstance(value, float)}

        measure = Measure(figures, described(InceptionJudge(network)))
    return look_by(config, source, data, sampler, measure, (autoencoder.params,))
