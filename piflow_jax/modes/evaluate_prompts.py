"""`--mode=evaluate` of prompts: a student's pictures against its teacher's, both already made."""

import os
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from absl import logging
from etils import epath

from piflow_jax.config import Config, ConfigError, naming
from piflow_jax.data.prompt_lists import list_digest
from piflow_jax.evaluation import frechet_distance
from piflow_jax.evaluation.image_sets import (
    PATCH,
    ImageSet,
    cached_features,
    centre_patch,
    open_images,
    resized,
)
from piflow_jax.evaluation.image_text import (
    ImageNetwork,
    clip_similarity,
    load_image_network,
    prompt_diversity,
)
from piflow_jax.evaluation.text_report import TextReport
from piflow_jax.modes.prepare_prompts import listed_prompts
from piflow_jax.runs.workdir import user_path
from piflow_jax.systems.judges import load_inception

_CACHE = "evaluation_features"
_REPORT = "text_report.json"
# Prompts that a network reads at a time.
_TEXTS = 256

T = TypeVar("T")
_VIEWS = {"resized": resized, "centre_patch": centre_patch}


def evaluate_images(config: Config, workdir: str | os.PathLike) -> TextReport | None:
    """Measures pictures that `--mode=sample` made of prompts.

    Figures whose networks or pictures are not given are left out. Features are kept in the work
    directory, so a run that was killed goes on.

    Args:
      config: the run's settings; `config.evaluation` names pictures and networks,
        `config.data.prompts` the list.
      workdir: the run's directory; `text_report.json` is written there.

    Returns:
      The report, which is also printed as a table; None on all processes but the first, which works
      alone.

    Raises:
      ConfigError: nothing can be measured, or a key names something else than it should.
      FileNotFoundError: pictures, list or a network are not there.
    """
    settings, workdir = config.evaluation, user_path(workdir)
    if not settings.images:
        raise ConfigError(
            "config.evaluation.images must name the student's pictures, a folder of PNG files or "
            "an .npz file; --mode=sample makes them"
        )
    if not (settings.features or settings.clip or settings.diversity_features):
        raise ConfigError(
            "nothing to measure: give config.evaluation.features (and teacher_images), clip or "
            "diversity_features"
        )
    if jax.process_index() != 0:
        return None
    student = _opened("images", settings.images, open_images)
    teacher = _opened("teacher_images", settings.teacher_images, open_images)
    if teacher is not None:
        _check_pairs(student, teacher)
    both = {"": student} | ({"teacher_": teacher} if teacher is not None else {})
    figures: dict[str, float] = {}
    protocol = {
        "pictures": len(student),
        "prompts": len(np.unique(student.places)),
        "seeds": len(np.unique(student.seeds)),
        "jax": jax.__version__,
    }
    cache = workdir / _CACHE
    if settings.features:
        if teacher is None:
            raise ConfigError("config.evaluation.features need config.evaluation.teacher_images")
        if len(student) < 2:
            raise ConfigError(
                "config.evaluation.images must have two pictures or more for "
                "config.evaluation.features, got 1"
            )
        network = load_inception(config.evaluation)
        protocol["inception"] = {
            "sha256": network.digest,
            "published": network.published,
            "teacher_fid": f"whole pictures, Pillow's bicubic filter to {PATCH}x{PATCH}",
            "patch_fid": f"central {PATCH}x{PATCH} pixels, not scaled",
        }
        for figure, view in (("teacher_fid", "resized"), ("patch_fid", "centre_patch")):
            features = [
                _inception_features(images, network, view, cache) for images in (student, teacher)
            ]
            figures[figure] = frechet_distance(*features)
    clip = _opened("clip", settings.clip, load_image_network)
    if clip is not None:
        if not clip.reads_text:
            raise ConfigError(f"config.evaluation.clip = {settings.clip!r} is {clip.name}, no CLIP")
        prompts = _prompts(config, student)
        protocol["clip"] = {"network": clip.name, "sha256": clip.digest}
        protocol["prompt_list"] = list_digest(prompts)
        for prefix, images in both.items():
            texts = {place: prompts[place].text for place in np.unique(images.places)}
            vectors = dict(zip(texts, _text_features(clip, list(texts.values())), strict=True))
            rows = np.stack([vectors[place] for place in images.places])
            figures[f"{prefix}clip"] = clip_similarity(_features(images, clip, cache), rows)
    network = _opened("diversity_features", settings.diversity_features, load_image_network) or clip
    if network is not None and len(student) > protocol["prompts"]:
        protocol["diversity"] = {
            "network": network.name,
            "sha256": network.digest,
            "dissimilarity": "1 - cosine",
        }
        for prefix, images in both.items():
            features = _features(images, network, cache)
            figures[f"{prefix}diversity"] = prompt_diversity(features, images.places)
    if not figures:
        raise ConfigError(
            "nothing to measure: give config.evaluation.teacher_images with features, or clip, or "
            "pictures of two seeds or more of a prompt for diversity_features"
        )
    report = TextReport(**figures, protocol=protocol)
    workdir.mkdir(parents=True, exist_ok=True)
    report.write(workdir / _REPORT)
    logging.info("\n%s\n", report.table())
    logging.info("wrote %s", workdir / _REPORT)
    return report


def _opened(key: str, path: str, open_: Callable[[str], T]) -> T | None:
    """What the value of a key of `config.evaluation` names; None of an empty one."""
    with naming(f"config.evaluation.{key}"):
        return open_(path) if path else None


def _check_pairs(student: ImageSet, teacher: ImageSet) -> None:
    """Both are of the same prompts and seeds."""
    pairs = [set(zip(images.places, images.seeds, strict=True)) for images in (student, teacher)]
    odd = pairs[0] ^ pairs[1]
    if odd:
        place, seed = min(odd)
        whose = "teacher_images" if (place, seed) in pairs[0] else "images"
        raise ConfigError(
            f"config.evaluation.{whose} lacks the picture of prompt {place} with seed {seed}, and "
            f"{len(odd) - 1} others differ: both sets must be of the same prompts and seeds"
        )


def _prompts(config: Config, images: ImageSet):
    if not config.data.prompts:
        raise ConfigError("config.evaluation.clip needs config.data.prompts, the list of prompts")
    prompts = listed_prompts(config)
    last = int(images.places.max())
    if last >= len(prompts):
        raise ConfigError(
            f"config.data.prompts has {len(prompts)} prompts, but there is a picture of prompt "
            f"{last}, counted from 0"
        )
    return prompts


def _progress(done: int, total: int) -> None:
    logging.log_every_n_seconds(logging.INFO, "evaluate: features of %d/%d", 30, done, total)


def _inception_features(images: ImageSet, network, view: str, cache: epath.Path) -> np.ndarray:
    def extract(pictures):
        return network.activations(np.stack([_VIEWS[view](p) for p in pictures])).pool

    with naming("config.evaluation.images or teacher_images"):
        key = f"inception {network.digest} {view}"
        return cached_features(images, extract, cache, key, _progress)


def _features(images: ImageSet, network: ImageNetwork, cache: epath.Path) -> np.ndarray:
    key = f"{network.name} {network.digest}"
    return cached_features(images, network.image_features, cache, key, _progress)


def _text_features(network: ImageNetwork, prompts: list[str]) -> np.ndarray:
    parts = [prompts[i : i + _TEXTS] for i in range(0, len(prompts), _TEXTS)]
    return np.concatenate([network.text_features(part) for part in parts])
