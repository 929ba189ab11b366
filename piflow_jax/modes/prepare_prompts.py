"""`--mode=prepare` of prompts: their embeddings, and their images' latents, once, before training.

The text encoders are PyTorch's and run here alone; see `piflow_jax.data.text_encoders`.
"""

import concurrent.futures
import functools
import hashlib
import json
import math
import os
import reprlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from piflow_jax.config import Config, ConfigError, naming
from piflow_jax.data.pictures import PictureError, PictureFile, picture_sizes, read_picture
from piflow_jax.data.prompt_lists import (
    ASPECTS,
    DOWNSAMPLING,
    Prompt,
    bucket_size,
    list_digest,
    read_prompts,
)
from piflow_jax.data.prompts import PROMPTS, PromptsPlan
from piflow_jax.data.text_encoders import TextEncoder, load_text_encoder
from piflow_jax.keys import seed_key
from piflow_jax.models.vae import picture_encoder, sample_posterior
from piflow_jax.modes.autoencoder import Autoencoder, load_autoencoder
from piflow_jax.systems.networks import network_kind

_READ_THREADS = 16
_TOKENIZED = 1024  # prompts at once
# Logarithms of aspect ratios that differ less are of the same shape: sizes are whole numbers.
_SAME_ASPECT = 0.01


def encode_prompts(
    prompts: Sequence[Prompt],
    encoder: TextEncoder,
    directory: str | os.PathLike,
    *,
    source: str,
    image_size: int = 1024,
    shard_size: int = 512,
    batch_size: int = 32,
    autoencoder: Autoencoder | None = None,
    image_folder: str | os.PathLike = "",
    reference_size: Callable[[int, int, int], tuple[int, int]] | None = None,
    reference_scale: Callable[[int, int, int], tuple[int, int]] | None = None,
    **how: Any,
) -> dict[str, Any] | None:
    """Encodes all prompts and the empty one, aspect ratio by aspect ratio.

    Goes on where a preparation was killed, and shares the work, see `ShardedSet.prepare`.

    Images are scaled to cover their bucket's size and cut at its centre; latents are one sample of
    the autoencoder's posterior, as pi-Flow trains on, with noise that depends on the prompt's place
    alone. A listed shape that is a picture's before its EXIF orientation is turned with it.

    References are scaled to the size of `reference_size`, or to that of `reference_scale` and then
    cut at their centre; their latents are the posterior's mean, as editing networks read them.

    Args:
      prompts: The list.
      encoder: The text encoders.
      directory: Where the set goes, on a disk or in a bucket.
      source: What the prompts are, for the record.
      image_size: Side of a square image; others have about as many pixels.
      shard_size: Prompts in each shard.
      batch_size: Prompts encoded at once. Batches do not cross shards.
      autoencoder: Of images and references; None leaves the images out.
      image_folder: What names of images are relative to.
      reference_size: `(height, width, side) -> (height, width)` of references, with the side of a
        square one, see `NetworkKind`; needed only for prompts with references.
      reference_scale: Likewise the size to which references are scaled before they are cut; None if
        they are not cut.
      **how: `process_index`, `process_count`, `on_progress` and `skip_refused` of
        `ShardedSet.prepare`.

    Returns:
      The manifest if all shards are there, None if other processes still have some to write.

    Raises:
      ValueError: If some prompts have an image and others none, references have no autoencoder or
        size, or the process does not exist.
      ConfigError: If the list's file is damaged where its images are, or the autoencoder does not
        fit.
      PromptsError: If another preparation was begun in the directory, or shards are damaged.
      RefusedError: If images cannot be read and are not left out; when all shards without such
        images are written.
    """
    edits, drawn = any(p.references for p in prompts), [bool(p.image) for p in prompts]
    if edits and (autoencoder is None or reference_size is None):
        raise ValueError("references need an autoencoder and a function of their sizes")
    # Without any images, an autoencoder is that of references alone.
    with_images = autoencoder is not None and (any(drawn) or not edits)
    if with_images and not all(drawn):
        bare = drawn.index(False)
        raise ValueError(f"latents need an image of every prompt, number {bare} has none")

    def pictured(prompt):
        return [_seen_size(path) for path in prompt.reference_files(image_folder)]

    def seen(prompt, references):
        if prompt.aspect is None:
            height, width = references[-1]
            aspect = width / height
        else:
            aspect = _seen_aspect(prompt, image_folder) if with_images else prompt.aspect
        own = (reference_size(*size, image_size) for size in references)
        return bucket_size(aspect, image_size), tuple(own)

    with concurrent.futures.ThreadPoolExecutor(_READ_THREADS) as pool:
        pictures = list(pool.map(pictured, prompts))
        sizes = list(pool.map(seen, prompts, pictures))
    known = dict.fromkeys(bucket_size(width / height, image_size) for width, height in ASPECTS)
    # By shape, then by the references' sizes.
    buckets = sorted(set(sizes), key=lambda size: (list(known).index(size[0]), size[1]))
    order = sorted(range(len(prompts)), key=lambda i: buckets.index(sizes[i]))

    def in_latents(size):
        return tuple(side // DOWNSAMPLING for side in size)

    channels = 0 if autoencoder is None else autoencoder.module.latent_channels
    plan = PromptsPlan(
        encoder=encoder.identity,
        compute=encoder.compute,
        source=f"{source}, SHA-256 {list_digest(prompts)}",
        num_examples=len(prompts) + 1,
        shard_size=shard_size,
        buckets=[in_latents(size) for size, _ in buckets],
        bucket_sizes=[sizes.count(size) for size in buckets],
        text_features=encoder.text_features,
        pooled_features=encoder.pooled_features,
        max_length=encoder.max_length,
        latent_channels=channels if with_images else 0,
        latents="" if autoencoder is None else autoencoder.identity,
        tokenizer=encoder.tokenizer,
        cut_off=_count_cut_off(prompts, encoder, pictures if encoder.sees_references else ()),
        references=tuple(tuple(map(in_latents, own)) for _, own in buckets) if edits else (),
        reference_channels=channels if edits else 0,
        with_references=edits and encoder.sees_references,
    )
    latents = None
    if autoencoder is not None:
        scale = reference_scale and functools.partial(reference_scale, side=image_size)
        latents = _Latents(autoencoder, image_folder, with_images, scale)
    listed = [(i, prompts[i], *sizes[i]) for i in order] + [(len(prompts), Prompt(""), None, ())]

    def examples(shard):
        part = [listed[i] for i in plan.shard_range(shard)]
        return _encoded(part, encoder, batch_size, latents)

    return PROMPTS.prepare(
        directory,
        plan,
        examples,
        **how,
    )


def listed_prompts(config: Config) -> list[Prompt]:
    """The prompts of the list `config.data.prompts`.

    Args:
      config: the run's settings.

    Returns:
      The prompts, in order.

    Raises:
      ConfigError: the file is no such list, or pyarrow is needed to read it.
      FileNotFoundError: there is no such file.
    """
    with naming("config.data.prompts"):
        return read_prompts(config.data.prompts)


def prepare_prompts(config: Config, workdir: str | os.PathLike) -> None:
    """`--mode=prepare` of prompts: `config.data.prompts` into `config.data.data_dir`.

    Args:
      config: the run's settings; `config.data` names list, encoders and directory, and an
        autoencoder if the list's images are to become latents.
      workdir: not used; embeddings are shared between runs.

    Raises:
      ConfigError: one of the three is not given, or not what it should be.
      FileNotFoundError: one of them is not there.
      PromptsError: another preparation was begun in the directory, or shards are damaged.
      RefusedError: images cannot be read, and `config.data.skip_refused` is not set.
    """
    settings = config.data
    for key in ("prompts", "text_encoder", "data_dir"):
        if not getattr(settings, key):
            raise ConfigError(f"--mode=prepare of prompts needs config.data.{key}")
    prompts = listed_prompts(config)
    with naming("config.data.text_encoder or text_length"):
        encoder = load_text_encoder(
            settings.text_encoder,
            max_length=settings.text_length,
            dtype=settings.text_dtype,
            gpu=_own_gpu(),
        )
    edits = _check_references(config, prompts)
    autoencoder = load_autoencoder(config) if settings.vae else None
    drawn = [bool(prompt.image) for prompt in prompts]
    if autoencoder is not None and not all(drawn) and (any(drawn) or not edits):
        raise ConfigError(
            f"config.data.vae is given, but not all of {settings.prompts} has an 'image'"
        )
    kind = network_kind(config.model)
    manifest = encode_prompts(
        prompts,
        encoder,
        settings.data_dir,
        source=os.path.basename(settings.prompts),
        image_size=settings.image_size,
        autoencoder=autoencoder,
        image_folder=os.path.dirname(settings.prompts),
        reference_size=kind.reference_size,
        reference_scale=kind.reference_scale,
        skip_refused=settings.skip_refused,
    )
    if manifest is not None:
        logging.info(
            "prepare: %d prompts of %d aspect ratios in %s",
            manifest["num_examples"] - 1,
            len(manifest["buckets"]),
            settings.data_dir,
        )


def _check_references(config: Config, prompts: Sequence[Prompt]) -> bool:
    """Whether prompts have references; refuses those that the network or the settings do not fit.

    Raises:
      ConfigError: the message names the key and the remedy.
    """
    most = max(len(prompt.references) for prompt in prompts)
    taken = network_kind(config.model).conditioning(config.model.own).references
    if most > taken:
        first = next(i for i, prompt in enumerate(prompts) if len(prompt.references) > taken)
        raise ConfigError(
            f"config.model.{config.model.network}.references is {taken}, but prompt number {first} "
            f"of {config.data.prompts}, counted from 0, has {len(prompts[first].references)} "
            "'references': take a configuration for editing, or raise it"
        )
    if most and not config.data.vae:
        raise ConfigError(
            f"{config.data.prompts} has 'references', which become latents: config.data.vae must "
            "name the autoencoder's weights"
        )
    return most > 0


def _own_gpu() -> int:
    """The GPU of this process among those that it sees; the first where JAX uses none."""
    first = jax.local_devices()[0]
    return first.local_hardware_id if first.platform == "gpu" else 0


def _count_cut_off(
    prompts: Sequence[Prompt],
    encoder: TextEncoder,
    pictures: Sequence[Sequence[tuple[int, int]]] = (),
) -> int:
    """The number of prompts longer than the encoder reads; warns of them.

    Args:
      prompts: The prompts.
      encoder: The text encoders.
      pictures: Sizes of the references of each prompt, if the encoder sees them.

    Raises:
      ConfigError: References leave a prompt no token of its text.
    """
    first: dict[bytes, tuple[str, bool]] = {}
    cut, alike = [], 0
    for start in range(0, len(prompts), _TOKENIZED):
        part = prompts[start : start + _TOKENIZED]
        texts, sizes = [prompt.text for prompt in part], pictures[start : start + _TOKENIZED]
        read = encoder.tokens(texts, sizes) if any(sizes) else encoder.tokens(texts)
        for place, (text, (tokens, lost)) in enumerate(zip(texts, read, strict=True)):
            own = sizes[place : place + 1]
            if lost and text and any(own) and encoder.tokens([""], own)[0][0] == tokens:
                raise ConfigError(
                    f"config.data.text_length: the references of prompt number {start + place}, "
                    f"counted from 0, take all of the {encoder.max_length} tokens that are read, "
                    "so that none is left for its text; raise it, or list fewer references"
                )
            names = part[place].references if any(own) else ()
            key = hashlib.sha256(json.dumps([tokens, names]).encode()).digest()
            other, other_lost = first.setdefault(key, (text, lost > 0))
            alike += text != other and (lost > 0 or other_lost)
            if lost:
                cut.append(text)
    if cut:
        logging.warning(
            "%d of %d prompts have more tokens than the %d that the text encoder reads and are cut "
            "off there, the first is %s; of these %d have the same embedding as another prompt",
            *(len(cut), len(prompts), encoder.max_length, reprlib.repr(cut[0]), alike),
        )
    return len(cut)


def _encoded(
    part: Sequence[tuple[int, Prompt, tuple[int, int] | None, tuple[tuple[int, int], ...]]],
    encoder: TextEncoder,
    batch_size: int,
    latents: "_Latents | None",
) -> Iterator[dict[str, Any] | PictureError]:
    for start in range(0, len(part), batch_size):
        batch = part[start : start + batch_size]
        examples: list[Any] = [_pictured(latents, *entry) for entry in batch]
        readable = [example for example in examples if isinstance(example, dict)]
        _embed(encoder, readable)
        yield from examples


def _pictured(
    latents: "_Latents | None",
    index: int,
    prompt: Prompt,
    size: tuple[int, int] | None,
    references: tuple[tuple[int, int], ...],
) -> dict[str, Any] | PictureError:
    """An example without its embeddings, or why a picture cannot be read."""
    example = {"prompt": prompt.text, "index": index}
    if latents is None or size is None:
        return example
    try:
        return example | latents(prompt, size, index) | latents.of_references(prompt, references)
    except PictureError as error:
        return error


def _embed(encoder: TextEncoder, examples: Sequence[dict[str, Any]]) -> None:
    """Adds the embeddings of prompts, seen with their pictures if the encoder sees them."""
    pictures = [example.pop("pictures", []) for example in examples]
    texts = [example["prompt"] for example in examples]
    if not (encoder.sees_references and any(pictures)):
        embeddings = encoder(texts) if texts else []
    else:
        embeddings = encoder(texts, pictures)
        nulls = encoder([""] * len(texts), pictures)
        for example, null in zip(examples, nulls, strict=True):
            example["null"] = null["text"]
    for example, embedding in zip(examples, embeddings, strict=True):
        example |= embedding


def _seen_size(path: str) -> tuple[int, int]:
    """Height and width of a picture; of one that is refused when its turn comes, any."""
    try:
        return picture_sizes(path)[1]
    except PictureError:
        return 1, 1


def _seen_aspect(prompt: Prompt, folder: str | os.PathLike) -> float:
    """A prompt's aspect ratio; one that was read off a picture lying on its side is turned."""
    if prompt.aspect == 1:
        return 1.0
    try:
        (stored_height, stored_width), (height, width) = picture_sizes(*_picture(prompt, folder))
    except PictureError:  # refused when its turn comes
        return prompt.aspect
    listed_as_stored = abs(math.log(prompt.aspect * stored_height / stored_width)) < _SAME_ASPECT
    turned = (stored_height, stored_width) != (height, width)
    return width / height if turned and listed_as_stored else prompt.aspect


def _picture(prompt: Prompt, folder: str | os.PathLike) -> tuple[PictureFile, str]:
    """A prompt's image for `read_picture`, and its name; `ConfigError` if the list is damaged."""
    try:
        return prompt.picture(folder)
    except PictureError:
        raise
    except ValueError as error:
        raise ConfigError(f"config.data.prompts: {error}; write the list again") from error


def _fitted(picture: PictureFile, size: tuple[int, int], name: str = "") -> np.ndarray:
    """A picture as uint8[height, width, 3], scaled to cover this size and cut at its centre."""
    from PIL import Image, ImageOps

    image = Image.fromarray(read_picture(picture, name))
    # Pillow's sizes have the width first.
    return np.asarray(ImageOps.fit(image, size[::-1], Image.Resampling.LANCZOS))


class _Latents:
    """Latents of prompts' images, and of their references.

    Args:
      autoencoder: What encodes them.
      folder: What names of pictures are relative to.
      with_images: Whether prompts have images.
      scale: `(height, width) -> (height, width)` to which references are scaled before they are
        cut; None if they are not cut.

    Raises:
      ConfigError: Latents are not as many times smaller as those of the networks here.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        folder: str | os.PathLike,
        with_images: bool,
        scale: Callable[[int, int], tuple[int, int]] | None = None,
    ):
        module = autoencoder.module
        if module.downsampling != DOWNSAMPLING:
            raise ConfigError(
                f"config.data.vae shrinks images by {module.downsampling}, not by {DOWNSAMPLING}"
            )

        @jax.jit
        def encode(params, pixels, index):
            image = pixels[None].astype(jnp.float32) / 127.5 - 1
            mean, logvar = module.apply(params, image, method="encode")
            key = jax.random.fold_in(seed_key(0), index)
            return module.scaled(sample_posterior(key, mean, jnp.exp(logvar / 2)))[0]

        self._encode = functools.partial(encode, autoencoder.params)
        self._encode_reference = picture_encoder(module, autoencoder.params)
        self._folder, self._with_images, self._scale = folder, with_images, scale

    def __call__(self, prompt: Prompt, size: tuple[int, int], index: int) -> dict[str, np.ndarray]:
        """Latents of the image at a size, with the noise of an index; empty without images."""
        if not self._with_images:
            return {}
        picture, name = _picture(prompt, self._folder)
        return {"latents": np.asarray(self._encode(_fitted(picture, size, name), index))}

    def of_references(self, prompt: Prompt, sizes: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """Latents of the references at their sizes, their names, and the pictures themselves."""
        if not sizes:
            return {}
        pictures = [read_picture(path) for path in prompt.reference_files(self._folder)]
        made = {"pictures": pictures, "reference_names": prompt.references}
        for number, (pixels, size) in enumerate(zip(pictures, sizes, strict=True)):
            image = _scaled(pixels, self._scale(*pixels.shape[:2]) if self._scale else size)
            image = np.float32(_cut(image, size))[None] / np.float32(127.5) - 1
            made[f"reference_{number}"] = np.asarray(self._encode_reference(image)[0])
        return made


def _scaled(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A picture as uint8[height, width, 3], stretched to this size."""
    from PIL import Image

    return np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.LANCZOS))


def _cut(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The part of this size at the centre of `image[H, W, C]`."""
    top, left = ((have - want) // 2 for have, want in zip(image.shape, size, strict=False))
    return image[top : top + size[0], left : left + size[1]]
