"""`--mode=evaluate` of latents: ADM's figures of 50,000 decoded samples; `--mode=statistics`."""

import dataclasses
import os
from collections.abc import Iterator

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from piflow_jax.arguments import differing
from piflow_jax.buckets import is_remote, located
from piflow_jax.config import Config, ConfigError, DataConfig, naming
from piflow_jax.data.picture_sets import PictureSet, center_crop, open_pictures
from piflow_jax.data.pictures import PictureError
from piflow_jax.data.shards import RefusedError
from piflow_jax.distillation.grids import index_sampler
from piflow_jax.distillation.sizes import Sizes
from piflow_jax.evaluation import index_labels, least_samples
from piflow_jax.evaluation.adm import (
    AdmFigures,
    InceptionNetwork,
    Moments,
    Protocol,
    Reference,
    image_batches,
    measure_adm,
    read_reference,
    to_uint8,
    write_samples,
    write_statistics,
)
from piflow_jax.evaluation.adm_files import REFERENCE_URL, SPATIAL_FEATURES
from piflow_jax.evaluation.kept import read_kept, read_kept_json
from piflow_jax.loading.runs import data_shape, load_system
from piflow_jax.models.inception import POOL_FEATURES
from piflow_jax.modes.autoencoder import (
    Autoencoder,
    load_autoencoder,
    pixel_sampler,
    tree_digest,
)
from piflow_jax.parallel import local_mesh, replicated
from piflow_jax.progress import tracked
from piflow_jax.runs.workdir import check_writable, user_path
from piflow_jax.systems.assembly import Systems
from piflow_jax.systems.judges import load_inception
from piflow_jax.systems.sampling import (
    ROUNDING,
    TEACHER_SOLVERS,
    sampling_guidance,
    sampling_record,
    student_substeps,
    teacher_record,
)
from piflow_jax.systems.shapes import DataShape
from piflow_jax.whole_files import reading, replacing, write_json

# Samples of a file under way: what a kill loses at most, and what processes share.
_SHARD = 512


def load_reference(config: Config, network: InceptionNetwork) -> Reference:
    """The reference of `config.evaluation.reference`, if it is of the network's features.

    Raises:
      ConfigError: none is given, it is malformed or of another network, or there are too few
        samples to compare with its images.
      FileNotFoundError: it is not there; says what to put there.
    """
    path = config.evaluation.reference
    if not path:
        raise ConfigError(
            "config.evaluation.reference must name ADM's reference statistics, from "
            f"{REFERENCE_URL}, or a file of --mode=statistics"
        )
    with naming(f"config.evaluation.reference = {path!r}"):
        reference = read_reference(path)
        reference.check(network.digest)
    settings, least = config.evaluation, least_samples(0)
    numbers = {"num_samples": settings.num_samples}
    if settings.every:
        numbers["every_samples"] = settings.every_samples
    for key, number in numbers.items() if reference.images else ():
        if number < least:
            raise ConfigError(
                f"config.evaluation.{key} must be at least {least} for precision and recall, got "
                f"{number}"
            )
    return reference


def protocol(
    config: Config,
    data: DataShape,
    autoencoder: Autoencoder,
    network: InceptionNetwork,
    reference: Reference,
    samples: int,
    system: str = "student",
) -> Protocol:
    """What figures of a system depend on, `student` or `teacher`."""
    record, settings = sampling_record(config), config.evaluation
    how = {key: record[key] for key in ("nfe", "substeps", "solver", "temperature")}
    # Without a range, the teacher's guidance is distilled into the student, which takes none.
    how["guidance"] = sampling_guidance(config) if config.teacher.guidance_range else 1.0
    if system == "teacher":
        steps, solver = settings.teacher_steps[-1], settings.teacher_solver
        how |= {"nfe": steps * TEACHER_SOLVERS[solver].evaluations, "substeps": steps}
        how |= {"solver": solver, "temperature": 1.0, "guidance": sampling_guidance(config)}
    return Protocol(
        samples=samples,
        label_rule=f"index modulo {data.num_classes}",
        seed=record["seed"],
        **how,
        decoder=autoencoder.identity,
        dtype=f"{record['dtype']} network, float32 decoder",
        feature_network=network.digest,
        reference=reference.path.name,
        reference_digest=reference.digest,
    )


def evaluate_latents(config: Config, workdir: str | os.PathLike) -> AdmFigures | None:
    """Samples, decodes and measures as ADM does, and writes what its own evaluator reads.

    All processes share the samples, which go to `<workdir>/samples/` shard by shard. An evaluation
    that was killed continues at the first missing shard. `samples/samples.npz` has all samples with
    their labels, and `adm.json` has the figures with their protocol.

    Args:
      config: the run's settings.
      workdir: the run's directory; for official student weights it may be empty.

    Returns:
      The figures, which are also printed; None on processes other than the first.

    Raises:
      CheckpointError: the system is missing, unusable or contradicts the settings.
      ConfigError: a file is not given or is of another kind, or the directory has samples of other
        settings.
      FileNotFoundError: a file is missing; the message says what to put there.
    """
    # What is missing is said before hours are spent on samples.
    network = load_inception(config.evaluation)
    reference = load_reference(config, network)
    data = data_shape(config, workdir)
    autoencoder = load_autoencoder(config, data)
    Sizes(Systems.of(config, data)).check_evaluation()
    samples = _samples(config, data, autoencoder, user_path(workdir))
    if samples is None:
        return None
    number = config.evaluation.num_samples
    logging.info("evaluation: features of %d samples", number)
    made = protocol(config, data, autoencoder, network, reference, number, config.evaluation.system)
    with reading(samples) as here:
        batches = tracked(image_batches(here), "features", number)
        figures = measure_adm(batches, network, reference, made)
    path = user_path(workdir) / "adm.json"
    write_json(path, {"names": figures.names, **dataclasses.asdict(figures)})
    logging.info("%s", figures)
    logging.info("wrote %s and %s", path, samples)
    return figures


def _samples(
    config: Config, data: DataShape, autoencoder: Autoencoder, workdir: epath.Path
) -> epath.Path | None:
    """The file of all samples, on the first process, which puts the shards together."""
    settings, folder = config.evaluation, workdir / "samples"
    params = load_system(config, data, workdir)
    plan = sampling_record(config) | {
        "samples": settings.num_samples,
        "shard": _SHARD,
        "classes": data.num_classes,
        settings.system: tree_digest(params),
        "decoder": autoencoder.identity,
    }
    if settings.system == "teacher":
        teacher = config.teacher
        plan |= teacher_record(config) | {
            "steps": settings.teacher_steps[-1],
            "guidance": [sampling_guidance(config), *teacher.guidance_interval],
            "orthogonal_guidance": teacher.orthogonal_guidance,
        }
    # Folders from before it was `ceil` do not know it: their samples are the same where all numbers
    # of substeps are.
    counts = [
        student_substeps(config.train, config.sampling_nfe, settings.substeps, rounding)
        for rounding in ("round", ROUNDING)
    ]
    if (counts[0] == counts[1]).all():
        del plan["rounding"]
    _check_plan(folder, plan)
    whole = folder / "samples.npz"
    shards = [folder / f"{i:05d}.npy" for i in range(-(-settings.num_samples // _SHARD))]
    mine = shards[jax.process_index() :: jax.process_count()]
    todo = [] if whole.exists() else [path for path in mine if not path.exists()]
    if todo:
        logging.info("evaluation: %d of %d shards of samples to make", len(todo), len(shards))
        sampler = Systems.of(config, data).sampler()
        run = index_sampler(
            config,
            data,
            pixel_sampler(sampler, autoencoder.module, data),
            np.arange(data.num_classes, dtype=np.int32),
            min(_SHARD, settings.num_samples),
            settings.system,
        )
        everything = jax.device_put((params, autoencoder.params), replicated(local_mesh()))
        for number, path in enumerate(todo, start=1):
            start = int(path.stem) * _SHARD
            indices = range(start, min(start + _SHARD, settings.num_samples))
            images = np.concatenate([to_uint8(b) for b in run.batches(everything, indices)])
            with replacing(path) as under_way:
                np.save(under_way, images)
            logging.info("evaluation: %d/%d shards of samples", number, len(todo))
    multihost_utils.sync_global_devices("samples")
    if jax.process_index() != 0:
        return None
    if not whole.exists():
        labels = index_labels(settings.num_samples, data.num_classes)
        write_samples(whole, (read_kept(path, np.load) for path in shards), labels)
    for path in shards:  # perhaps of a run that was killed in between
        path.unlink(missing_ok=True)
    read_kept(whole, lambda path: next(image_batches(path, 1)))
    return whole


def _check_plan(folder: epath.Path, plan: dict) -> None:
    """Records whose samples a folder has, or refuses to mix them with others."""
    path = folder / "plan.json"
    if jax.process_index() == 0 and not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, plan)
    multihost_utils.sync_global_devices("plan of samples")
    known = read_kept_json(path, dict, f"remove {folder}")
    different = differing(known, plan, "{} was {!r}, is {!r}")
    if different:
        raise ConfigError(
            f"{folder} has samples of other settings ({'; '.join(different)}); remove it, or pass "
            "another --workdir"
        )


def write_reference(config: Config, workdir: str | os.PathLike) -> epath.Path:
    """`--mode=statistics`: `config.evaluation.reference` from the images in `config.data.images`.

    Args:
      config: the run's settings.
      workdir: not used.

    Returns:
      The file, in ADM's format; without images, so without precision and recall.

    Raises:
      ConfigError: a key is not given, the reference exists, or fewer than two images can be read.
      FileNotFoundError: images or feature weights are not there.
      OSError: the reference's folder cannot be written.
      PicturesError: `config.data.images` is not what it should be.
      RefusedError: images cannot be read, and `config.data.skip_refused` is not set.
    """
    path = config.evaluation.reference
    for key, value in (("data.images", config.data.images), ("evaluation.reference", path)):
        if not value:
            raise ConfigError(f"--mode=statistics needs config.{key}")
    if located(path).exists():
        raise ConfigError(f"config.evaluation.reference = {path!r} exists; remove it first")
    folder = located(path).parent
    check_writable(folder, instead="name another config.evaluation.reference")
    if not is_remote(folder):
        folder.mkdir(parents=True, exist_ok=True)
    network = load_inception(config.evaluation)
    images = open_pictures(config.data.images)
    pool, spatial = Moments.empty(POOL_FEATURES), Moments.empty(SPATIAL_FEATURES)
    refused: list[PictureError] = []
    for batch in _crops(images, config.data, network.batch_size, refused):
        activations = network.activations(batch)
        pool, spatial = pool.add(activations.pool), spatial.add(activations.spatial)
    if refused and not config.data.skip_refused:
        raise RefusedError(refused)
    if refused:
        logging.warning("left out %d images; the first: %s", len(refused), refused[0])
    if pool.count < 2:
        raise ConfigError(
            f"config.data.images has {pool.count} images that can be read, too few for a "
            "covariance; name others"
        )
    write_statistics(
        path,
        pool.statistics(),
        spatial.statistics(),
        count=pool.count,
        feature_network=network.digest,
    )
    logging.info("wrote %s: statistics of %d images", path, pool.count)
    return located(path)


def _crops(
    images: PictureSet, settings: DataConfig, batch_size: int, refused: list[PictureError]
) -> Iterator[np.ndarray]:
    """Batches of crops; adds to `refused` what cannot be read.

    If that is not to be left out, there are no more batches, and the rest is read for its faults.
    """
    batch: list[np.ndarray] = []
    for index in range(len(images)):
        try:
            batch.append(center_crop(images[index].image, settings.image_size))
        except PictureError as error:
            refused.append(error)
        if refused and not settings.skip_refused:
            batch = []
        if len(batch) == batch_size:
            yield np.stack(batch)
            batch = []
    if batch:
        yield np.stack(batch)
