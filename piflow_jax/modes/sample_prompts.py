"""`--mode=sample` of prompts: one PNG each, with the settings that made it."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from piflow_jax.config import Config, ConfigError
from piflow_jax.data import stacked
from piflow_jax.data.prompt_lists import DOWNSAMPLING, Prompt, bucket_size
from piflow_jax.data.prompts import PromptsSource, load_prompts_source
from piflow_jax.distillation.sizes import Sizes
from piflow_jax.evaluation.adm import to_uint8
from piflow_jax.keys import index_keys, index_noise, seed_key
from piflow_jax.loading.runs import load_system
from piflow_jax.models.vae import picture_decoder
from piflow_jax.modes.autoencoder import load_autoencoder
from piflow_jax.modes.header import say_header
from piflow_jax.modes.prepare_prompts import listed_prompts
from piflow_jax.parallel import ActivationSharding, batch_sharding, config_mesh
from piflow_jax.progress import Progress
from piflow_jax.runs.workdir import user_path
from piflow_jax.systems.assembly import Systems
from piflow_jax.systems.sampling import sampling_record, teacher_record
from piflow_jax.systems.shapes import DataShape
from piflow_jax.systems.spec import student_spec, teacher_spec
from piflow_jax.whole_files import replacing

_OF_EVALUATION = ("nfe", "temperature", "substeps", "solver")
_FOLDERS = {"student": "samples", "teacher": "teacher_samples"}


def find_prompts(
    source: PromptsSource, wanted: Sequence[Prompt], image_size: int, where: str
) -> list[int]:
    """Where prompts stand in a cached set, which is read from its beginning until all are found.

    If the set has a prompt in several shapes, the shape in the list decides. If it has the prompt
    in other shapes only, the first of these is taken, with a warning. References must be the same.

    Args:
      source: the set.
      wanted: the prompts.
      image_size: side of a square image in pixels, which sets the size of the list's shapes.
      where: the set's directory, for messages.

    Returns:
      An index for each prompt.

    Raises:
      ConfigError: some prompts are missing; the message names the first.
    """
    shapes = [
        # Without a shape of its own, a prompt has that of its last reference, which the set knows.
        None
        if prompt.aspect is None
        else tuple(side // DOWNSAMPLING for side in bucket_size(prompt.aspect, image_size))
        for prompt in wanted
    ]
    texts, references = ([getattr(p, name) for p in wanted] for name in ("text", "references"))
    found = source.find(texts, shapes, references)
    absent = [(p.text, p.references) for p, i in zip(wanted, found, strict=True) if i is None]
    if absent:
        text, names = absent[0]
        edited = f" with the references {', '.join(names)}" if names else ""
        raise ConfigError(
            f"{where} has no embeddings of {len(set(absent))} of the prompts, the first is "
            f"{text!r}{edited}; prepare the list with --mode=prepare into a directory of its own, "
            "and give that as config.data.data_dir"
        )
    others = dict.fromkeys(
        (text, shape)
        for text, shape, index in zip(texts, shapes, found, strict=True)
        if shape is not None and source.buckets[source.bucket(index)] != shape
    )
    if others:
        logging.warning(
            "%d prompts, the first is %r, have other shapes in %s than in the list, and get those",
            len(others),
            next(iter(others))[0],
            where,
        )
    return found


def sample_prompts(config: Config, workdir: str | os.PathLike) -> list[epath.Path]:
    """Writes `<workdir>/samples/<number>-<seed>.png` for each prompt of a list.

    With `config.evaluation.system = "teacher"`, the teacher's pictures go to
    `<workdir>/teacher_samples/`, from the same noise. Embeddings and shapes of images come from the
    cached set `config.data.data_dir`. The noise of a prompt depends only on
    `config.evaluation.seed` and its place in the list. Without an autoencoder (`config.data.vae`),
    latents are written as `.npy`.

    Args:
      config: the run's settings; `config.data.prompts` is the list. Without it, all prompts of the
        set are sampled.
      workdir: the run's directory.

    Returns:
      The files. A PNG has the prompt as `prompt`, and as `piflow_jax` the settings in JSON.

    Raises:
      CheckpointError: there is no student, or it contradicts the settings.
      ConfigError: the file is not a list of prompts, embeddings are missing, the autoencoder is
        another one, or the devices do not divide a batch.
      PromptsError: the set is unfinished or damaged.
    """
    where = config.data.data_dir
    if not where:
        raise ConfigError(
            "config.data.data_dir must name a set that --mode=prepare made of prompts"
        )
    source = load_prompts_source(where, verify=False)
    if config.data.prompts:
        wanted = listed_prompts(config)
        chosen = dict(enumerate(find_prompts(source, wanted, config.data.image_size, where)))
    else:
        # The set lacks the places of prompts that were left out when it was made.
        chosen = {int(source[index]["index"]): index for index in range(len(source))}
    data = DataShape.of(config.data.name, source)
    autoencoder = load_autoencoder(config, data) if config.data.vae else None
    systems = Systems.of(config, data, source.null)
    Sizes(systems, source).check_sampling(len(chosen))
    directory = user_path(workdir) / _FOLDERS[config.evaluation.system]
    say_header(systems, workdir, f"{len(chosen)} pictures in {directory.name}/")
    mesh = config_mesh(config, groups=("evaluation",))
    params = load_system(config, data, workdir, mesh)
    sampler = jax.jit(_sampler(config, data, mesh, source.null), out_shardings=batch_sharding(mesh))
    decode = None
    if autoencoder is not None:
        decode = picture_decoder(autoencoder.module, autoencoder.params, jax.local_devices())
    directory.mkdir(parents=True, exist_ok=True)
    suffix = ".png" if decode is not None or data.channels in (1, 3) else ".npy"
    paths = []
    with Progress("pictures", len(chosen)) as progress:
        progress.compiling()
        for places, batch in _batches(config, source, chosen, mesh):
            here = jax.device_put((np.asarray(places, np.uint32), batch), batch_sharding(mesh))
            with jax.set_mesh(mesh):  # kernels split their batch over it
                latents = sampler(params, *here)
            latents = multihost_utils.process_allgather(latents, tiled=True)
            # What fills up a batch is one again.
            made = dict(zip(places, np.asarray(latents, np.float32), strict=True))
            files = {p: directory / f"{p:05d}-{config.evaluation.seed}{suffix}" for p in made}
            mine = list(made)[jax.process_index() :: jax.process_count()]
            for place, image in zip(mine, _pictures(decode, [made[p] for p in mine]), strict=True):
                prompt = source.prompts[chosen[place]]
                made_by = _settings(config, data, place)
                names = source.reference_names(chosen[place])
                made_by |= {"references": names} if names else {}
                _write(files[place], image, prompt, made_by)
            paths += files.values()
            progress.advance(len(made))
    logging.info("wrote %d files to %s", len(paths), directory)
    return sorted(paths)


def _sampler(config: Config, data: DataShape, mesh: jax.sharding.Mesh, null: dict[str, Any]):
    sampler = Systems.of(config, data, null, ActivationSharding(mesh)).sampler()

    def sample(params, places, batch):
        shape = (*batch["x"].shape[1:-1], data.channels)
        noise = index_noise(index_keys(seed_key(config.evaluation.seed), places), shape)
        return sampler(params, noise, batch["condition"])

    return sample


def _batches(
    config: Config, source: PromptsSource, chosen: Mapping[int, int], mesh: jax.sharding.Mesh
) -> Iterator[tuple[list[int], dict[str, np.ndarray]]]:
    """Places in the list and their examples, of one shape each; the last place fills a batch.

    `chosen` has the index in the set by place.
    """
    by_bucket: dict[int, list[int]] = {}
    for place, index in sorted(chosen.items()):
        by_bucket.setdefault(source.bucket(index), []).append(place)
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    for places in by_bucket.values():
        most = min(config.evaluation.batch_size, -(-len(places) // parts) * parts)
        for start in range(0, len(places), most):
            part = places[start : start + most]
            part += part[-1:] * (most - len(part))
            examples = [source[chosen[place]] for place in part]
            # Of the states the shape alone matters.
            examples = [e | {"x": np.zeros((*e["x"].shape[:-1], 0), np.float32)} for e in examples]
            yield part, stacked(examples)


def _pictures(decode: Callable | None, samples: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """Decoded samples, as many at a time as this process has devices; as they are without."""
    if decode is None:
        yield from samples
        return
    count = jax.local_device_count()
    for start in range(0, len(samples), count):
        yield from np.asarray(decode(np.stack(samples[start : start + count])))


def _settings(config: Config, data: DataShape, place: int) -> dict[str, Any]:
    """The settings that made a picture, without its prompt and the weights."""
    settings, teacher = config.evaluation, config.teacher
    record = sampling_record(config)
    made = {
        "evaluation.seed": record["seed"],
        "teacher.weights": teacher.weights,
        "model.dtype": record["dtype"],
        "place": place,
    }
    if base := getattr(config.model.own, "base_dtype", None):
        made["model.base_dtype"] = base
    for group in ("teacher", "evaluation"):
        if loras := getattr(config, group).loras:
            made[f"{group}.loras"] = list(loras)
    if settings.system == "teacher":
        return (
            teacher_spec(config, data)
            | made
            | {
                "evaluation.teacher_steps": settings.teacher_steps[-1],
                **{f"evaluation.{key}": value for key, value in teacher_record(config).items()},
                "teacher.guidance_scale": teacher.guidance_scale,
                "teacher.guidance_interval": [*teacher.guidance_interval],
                "teacher.orthogonal_guidance": teacher.orthogonal_guidance,
                "train.shift": record["shift"],
            }
        )
    return (
        student_spec(config, data)
        | made
        | {
            "rounding": record["rounding"],
            **{f"evaluation.{key}": record[key] for key in _OF_EVALUATION},
            "evaluation.weights": settings.weights,
            "evaluation.checkpoint": settings.checkpoint,
        }
    )


def _write(path: epath.Path, sample: np.ndarray, prompt: str, made: dict[str, Any]) -> None:
    from PIL import Image, PngImagePlugin

    if path.suffix == ".npy":
        with replacing(path) as under_way:
            np.save(under_way, sample)
        return
    text = PngImagePlugin.PngInfo()
    text.add_itxt("prompt", prompt)
    text.add_itxt("piflow_jax", json.dumps(made))
    pixels = to_uint8(sample)
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    with replacing(path) as under_way:
        picture.save(under_way, pnginfo=text)
