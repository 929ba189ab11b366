"""`--mode=evaluate`: teacher, student and data side by side."""

import os
from pathlib import Path

import jax
import numpy as np
from absl import logging

from piflow_jax.config import Config, ConfigError
from piflow_jax.data import load_source
from piflow_jax.evaluation import (
    FEATURE_SPACES,
    IndexSampler,
    Report,
    Row,
    class_diversity,
    half_split_floor,
    index_labels,
    load_features,
    measure,
    save_grid,
)
from piflow_jax.evaluation.adm import AdmFigures
from piflow_jax.parallel import batch_sharding, local_mesh
from piflow_jax.stages.adm import evaluate_latents
from piflow_jax.stages.systems import (
    load_student,
    load_teacher,
    student_sampler,
    teacher_sampler,
    told_by_class,
)
from piflow_jax.training.networks import DataShape


def evaluate(config: Config, workdir: str | os.PathLike) -> Report | AdmFigures | None:
    """Measures the averaged weights of teacher and student on the same noise and labels.

    Of latents, it measures the student alone as ADM does; see `evaluate_latents`.

    Args:
      config: the run's settings.
      workdir: the run's directory; `report.json` and `samples.png` are written there.

    Returns:
      The report, which is also printed as a table.

    Raises:
      CheckpointError: a checkpoint is missing, unusable or contradicts the settings.
      ConfigError: settings that are for other data.
    """
    if config.data.name not in FEATURE_SPACES:
        return evaluate_latents(config, workdir)
    if config.evaluation.weights:
        raise ConfigError("config.evaluation.weights are for config.data.name = 'imagenet'")
    settings, workdir = config.evaluation, Path(workdir)
    source = load_source(config.data.name, config.data.data_dir or None)
    data = DataShape.of(config.data.name, source)
    network = load_features(config.data.name)
    real = network.extract(source.images)
    labels = index_labels(settings.num_samples, data.num_classes)
    logging.info("evaluation: %d samples per system", settings.num_samples)

    def run(sampler, params):
        by_index = IndexSampler(
            told_by_class(config, source, sampler),
            shape=source.shape,
            classes=range(data.num_classes),
            batch_size=settings.batch_size,
            seed=settings.seed,
            sharding=batch_sharding(local_mesh()),
        )
        return by_index(params, settings.num_samples), by_index.seconds

    def row(system, nfe, samples, seconds, reference):
        mse = None if reference is None else float(np.mean(np.square(samples - reference)))
        return Row(
            system=system,
            nfe=nfe,
            figures=measure(samples, labels, real, network),
            endpoint_mse=mse,
            seconds=seconds,
        )

    teacher = load_teacher(config, data, workdir)
    most = settings.teacher_steps[-1]
    null = getattr(source, "null", None)
    reference, reference_seconds = run(teacher_sampler(config, data, most, null), teacher)
    rows, pictures = [], {most: reference}
    for steps in settings.teacher_steps[:-1]:
        samples, seconds = run(teacher_sampler(config, data, steps, null), teacher)
        pictures[steps] = samples
        rows.append(row("teacher", steps, samples, seconds, reference))
    rows.append(row("teacher", most, reference, reference_seconds, None))
    nfe = settings.nfe or config.train.nfe
    student = load_student(config, data, workdir)
    samples, seconds = run(student_sampler(config, data), student)
    rows.append(row("student", nfe, samples, seconds, reference))

    report = Report(
        rows=rows,
        data_diversity=class_diversity(real, source.labels),
        floor=half_split_floor(real),
        protocol={
            "data": source.name,
            "network": config.model.network,
            "real_images": len(source),
            "samples": settings.num_samples,
            "noise_seed": settings.seed,
            "labels": "index modulo classes",
            "features": network.name,
            "features_sha256": network.digest,
            "clipping": "samples clipped to [-1, 1] for features, not for endpoints",
            "weights": "EMA",
            "teacher_solver": "euler",
            "guidance": [config.teacher.guidance_scale, *config.teacher.guidance_interval],
            "substeps": settings.substeps,
            "dtype": config.model.dtype,
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "seed": config.seed,
        },
    )
    if jax.process_index() == 0:
        report.write(workdir / "report.json")
        shown = [(f"teacher, {most} NFE", most), (f"teacher, {nfe} NFE", nfe)]
        grid = [(name, pictures[key]) for name, key in shown if key in pictures]
        grid.append((f"student, {nfe} NFE", samples))
        count = settings.grid_samples
        save_grid(workdir / "samples.png", [(name, images[:count]) for name, images in grid])
        logging.info("\n%s\n", report.table())
        logging.info("wrote %s and %s", workdir / "report.json", workdir / "samples.png")
    return report
