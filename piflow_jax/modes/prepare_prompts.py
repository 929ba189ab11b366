"""`--mode=prepare` of prompts: their embeddings, and their images' latents, once, before training.

The text encoders are PyTorch's and run here alone; see `piflow_jax.data.text_encoders`.
"""

import concurrent.futures
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
from piflow_jax.data.shards import left_out
from piflow_jax.data.text_encoders import TextEncoder, load_text_encoder
from piflow_jax.keys import seed_key
from piflow_jax.models.vae import sample_posterior
from piflow_jax.modes.autoencoder import Autoencoder, load_autoencoder

__all__ = ["encode_prompts", "listed_prompts", "prepare_prompts"]

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
    process_index: int = 0,
    process_count: int = 1,
    autoencoder: Autoencoder | None = None,
    image_folder: str | os.PathLike = "",
    on_progress: Callable[[int, int], None] | None = None,
    skip_refused: bool = False,
) -> dict[str, Any] | None:
    """Encodes all prompts and the empty one, aspect ratio by aspect ratio.

    Goes on with the first shard that is missing, so a preparation that was killed is just started
    again. Process `p` of `P` writes the shards `i` with `i % P == p`; processes need not know of
    each other but share the directory. Whichever finds all shards in place finalises the set.

    Images are scaled to cover their bucket's size and cut at its centre; latents are one sample of
    the autoencoder's posterior, as pi-Flow trains on, with noise that depends on the prompt's place
    alone. A listed shape that is a picture's before its EXIF orientation is turned with it.

    Args:
      prompts: The list.
      encoder: The text encoders.
      directory: Where the set goes, on a disk or in a bucket.
      source: What the prompts are, for the record.
      image_size: Side of a square image; others have about as many pixels.
      shard_size: Prompts in each shard.
      batch_size: Prompts encoded at once. Batches do not cross shards.
      process_index: This process.
      process_count: Number of processes.
      autoencoder: Of the images; None leaves the images out.
      image_folder: What names of images are relative to.
      on_progress: Called after each shard with the number of shards that this call has written and
        has to write.
      skip_refused: Leave out prompts whose image cannot be read; the manifest names them.

    Returns:
      The manifest if all shards are there, None if other processes still have some to write.

    Raises:
      ValueError: If some prompts have an image and others none, or the process does not exist.
      PromptsError: If another preparation was begun in the directory, or shards are damaged.
      RefusedError: If images cannot be read and are not left out; when all shards without such
        images are written.
    """
    if autoencoder is not None and not all(prompt.image for prompt in prompts):
        bare = next(i for i, prompt in enumerate(prompts) if not prompt.image)
        raise ValueError(f"latents need an image of every prompt, number {bare} has none")
    aspects = [prompt.aspect for prompt in prompts]
    if autoencoder is not None:
        with concurrent.futures.ThreadPoolExecutor(_READ_THREADS) as pool:
            aspects = list(pool.map(lambda prompt: _seen_aspect(prompt, image_folder), prompts))
    sizes = [bucket_size(aspect, image_size) for aspect in aspects]
    known = dict.fromkeys(bucket_size(width / height, image_size) for width, height in ASPECTS)
    buckets = [size for size in known if size in sizes]
    order = sorted(range(len(prompts)), key=lambda i: buckets.index(sizes[i]))
    plan = PromptsPlan(
        encoder=encoder.identity,
        compute=encoder.compute,
        source=f"{source}, SHA-256 {list_digest(prompts)}",
        num_examples=len(prompts) + 1,
        shard_size=shard_size,
        buckets=[tuple(side // DOWNSAMPLING for side in size) for size in buckets],
        bucket_sizes=[sizes.count(size) for size in buckets],
        text_features=encoder.text_features,
        pooled_features=encoder.pooled_features,
        max_length=encoder.max_length,
        latent_channels=0 if autoencoder is None else autoencoder.module.latent_channels,
        latents="" if autoencoder is None else autoencoder.identity,
        tokenizer=encoder.tokenizer,
        cut_off=_count_cut_off(prompts, encoder),
    )
    to_latents = None if autoencoder is None else _latents_encoder(autoencoder, image_folder)
    listed = [(i, prompts[i], sizes[i]) for i in order] + [(len(prompts), Prompt(""), None)]

    def examples(shard):
        part = [listed[i] for i in plan.shard_range(shard)]
        return _encoded(part, encoder, batch_size, to_latents)

    return PROMPTS.prepare(
        directory,
        plan,
        examples,
        process_index=process_index,
        process_count=process_count,
        on_progress=on_progress,
        skip_refused=skip_refused,
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
    autoencoder = load_autoencoder(config) if settings.vae else None
    if autoencoder is not None and not all(prompt.image for prompt in prompts):
        raise ConfigError(
            f"config.data.vae is given, but not all of {settings.prompts} has an 'image'"
        )
    manifest = encode_prompts(
        prompts,
        encoder,
        settings.data_dir,
        source=os.path.basename(settings.prompts),
        image_size=settings.image_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        autoencoder=autoencoder,
        image_folder=os.path.dirname(settings.prompts),
        on_progress=lambda done, todo: logging.info("prepare: %d/%d shards", done, todo),
        skip_refused=settings.skip_refused,
    )
    if manifest is not None:
        logging.info(
            "prepare: %d prompts of %d aspect ratios in %s",
            manifest["num_examples"] - 1,
            len(manifest["buckets"]),
            settings.data_dir,
        )
        if left_out(manifest):
            logging.warning("prepare: left out\n%s", left_out(manifest))


def _own_gpu() -> int:
    """The GPU of this process among those that it sees; the first where JAX uses none."""
    first = jax.local_devices()[0]
    return first.local_hardware_id if first.platform == "gpu" else 0


def _count_cut_off(prompts: Sequence[Prompt], encoder: TextEncoder) -> int:
    """The number of prompts longer than the encoder reads; warns of them."""
    first: dict[bytes, tuple[str, bool]] = {}
    cut, alike = [], 0
    for start in range(0, len(prompts), _TOKENIZED):
        texts = [prompt.text for prompt in prompts[start : start + _TOKENIZED]]
        for text, (tokens, lost) in zip(texts, encoder.tokens(texts), strict=True):
            key = hashlib.sha256(json.dumps(tokens).encode()).digest()
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
    part: Sequence[tuple[int, Prompt, tuple[int, int] | None]],
    encoder: TextEncoder,
    batch_size: int,
    to_latents: Callable | None,
) -> Iterator[dict[str, Any] | PictureError]:
    for start in range(0, len(part), batch_size):
        batch = part[start : start + batch_size]
        embeddings = encoder([prompt.text for _, prompt, _ in batch])
        for (index, prompt, size), embedding in zip(batch, embeddings, strict=True):
            example = {"prompt": prompt.text, "index": index, **embedding}
            if to_latents is not None and size is not None:
                try:
                    example["latents"] = to_latents(prompt, size, index)
                except PictureError as error:
                    yield error
                    continue
            yield example


def _seen_aspect(prompt: Prompt, folder: str | os.PathLike) -> float:
    """A prompt's aspect ratio; one that was read off a picture lying on its side is turned."""
    if prompt.aspect == 1:
        return 1.0
    try:
        (stored_height, stored_width), (height, width) = picture_sizes(*prompt.picture(folder))
    except PictureError:  # refused when its turn comes
        return prompt.aspect
    listed_as_stored = abs(math.log(prompt.aspect * stored_height / stored_width)) < _SAME_ASPECT
    turned = (stored_height, stored_width) != (height, width)
    return width / height if turned and listed_as_stored else prompt.aspect


def _fitted(picture: PictureFile, size: tuple[int, int], name: str = "") -> np.ndarray:
    """A picture as uint8[height, width, 3], scaled to cover this size and cut at its centre."""
    from PIL import Image, ImageOps

    image = Image.fromarray(read_picture(picture, name))
    # Pillow's sizes have the width first.
    return np.asarray(ImageOps.fit(image, size[::-1], Image.Resampling.LANCZOS))


def _latents_encoder(
    autoencoder: Autoencoder, folder: str | os.PathLike
) -> Callable[[Prompt, tuple[int, int], int], np.ndarray]:
    """Latents of a prompt's image, at a size, with the noise of an index."""
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

    def of_prompt(prompt, size, index):
        picture, name = prompt.picture(folder)
        return np.asarray(encode(autoencoder.params, _fitted(picture, size, name), index))

    return of_prompt
