"""`--mode=prepare`: images to cached latents, once, before training on them."""

import concurrent.futures
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from piflow_jax.config import Config, ConfigError
from piflow_jax.data.latents import LATENTS, LatentsPlan
from piflow_jax.data.picture_sets import PictureSet, center_crop, open_pictures
from piflow_jax.data.pictures import PictureError
from piflow_jax.models.vae import AutoencoderKL
from piflow_jax.modes.autoencoder import Autoencoder, load_autoencoder
from piflow_jax.parallel import batch_sharding, local_mesh, replicated
from piflow_jax.systems.networks import official_data

_READ_THREADS = 16


def prepare(
    source: PictureSet,
    autoencoder: Autoencoder,
    directory: str | os.PathLike,
    *,
    image_size: int = 256,
    shard_size: int = 8192,
    batch_size: int = 64,
    dtype: str = "float16",
    precision: str = "high",
    **how: Any,
) -> dict[str, Any] | None:
    """Encodes all images and their mirror images, in the order of the source.

    Goes on where a preparation was killed, and shares the work, see `ShardedSet.prepare`.

    Images go by `center_crop` and to [-1, 1]. One step of all local devices encodes `batch_size`
    images and as many mirror images, while the next images are decoded by threads.

    Args:
      source: Images by index.
      autoencoder: The autoencoder.
      directory: Where the set goes, on a disk or in a bucket. TFDS finds it by name, besides by
        path, if it ends in `latents/1.0.0`.
      image_size: Side of the crops.
      shard_size: Images in each shard.
      batch_size: Images in each step, rounded up to a multiple of the number of local devices;
        fewer if no shard has as many.
      dtype: Type of the stored moments.
      precision: JAX's precision of products; `high` is TensorFloat-32 or three bfloat16 passes.
      **how: `process_index`, `process_count`, `on_progress` and `skip_refused` of
        `ShardedSet.prepare`.

    Returns:
      The manifest if all shards are there, None if other processes still have some to write.

    Raises:
      ValueError: If the batch size is not positive, or the process does not exist.
      LatentsError: If another preparation was begun in the directory, latents are not finite, or
        shards are damaged.
      RefusedError: If images cannot be read and are not left out; when all shards without such
        images are written.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, got {batch_size}")
    devices = jax.local_device_count()
    batch_size = -(-min(batch_size, shard_size, len(source)) // devices) * devices
    image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    module, params = autoencoder.module, autoencoder.params
    moments, _ = jax.eval_shape(
        lambda params, x: module.apply(params, x, method="encode"), params, image
    )
    plan = LatentsPlan(
        vae=autoencoder.identity,
        compute=f"{moments.dtype.name}, precision {precision}, {image_size} by centre crop",
        source=source.description,
        num_examples=len(source),
        num_classes=len(source.class_names),
        image_size=image_size,
        latent_shape=moments.shape[1:],
        shard_size=shard_size,
        dtype=dtype,
        scale=module.latent_scale,
        shift=module.latent_shift,
    )
    encode = _encoder(module, params, dtype, precision)
    with concurrent.futures.ThreadPoolExecutor(_READ_THREADS) as pool:

        def examples(shard):
            return _encoded(source, plan.shard_range(shard), encode, batch_size, plan, pool)

        return LATENTS.prepare(
            directory,
            plan,
            examples,
            **how,
        )


def prepare_latents(config: Config, workdir: str | os.PathLike) -> None:
    """`--mode=prepare`: the latents of `config.data.images` into `config.data.data_dir`.

    Args:
      config: the run's settings; `config.data` names images, autoencoder and directory.
      workdir: not used; the latents are shared between runs.

    Raises:
      ConfigError: one of the three is not given, or the autoencoder's file is not one.
      FileNotFoundError: one of them is not there.
      LatentsError: another preparation was begun in the directory, or shards are damaged.
      PicturesError: `config.data.images` is not what it should be.
      RefusedError: images cannot be read, and `config.data.skip_refused` is not set.
    """
    settings = config.data
    for key in ("images", "vae", "data_dir"):
        if not getattr(settings, key):
            raise ConfigError(f"--mode=prepare needs config.data.{key}")
    source = open_pictures(settings.images)
    autoencoder = load_autoencoder(config, official_data(config) if settings.latents else None)
    if settings.image_size % autoencoder.module.downsampling:
        raise ConfigError(
            f"config.data.image_size must be a multiple of {autoencoder.module.downsampling}, by "
            f"which config.data.vae shrinks images, got {settings.image_size}"
        )
    if np.ndim(autoencoder.module.latent_scale) > 1:
        raise ConfigError(
            f"config.data.vae = {settings.vae!r} scales its latents by place (FLUX.2), which those "
            "of class images are not; name another autoencoder"
        )
    manifest = prepare(
        source,
        autoencoder,
        settings.data_dir,
        image_size=settings.image_size,
        skip_refused=settings.skip_refused,
    )
    if manifest is not None:
        logging.info("prepare: %d images in %s", manifest["num_examples"], settings.data_dir)


def _encoder(module: AutoencoderKL, params: Any, dtype: str, precision: str) -> Callable:
    """The jitted `uint8[B, H, W, 3] -> mean, std [B, 2, h, w, C]` on all local devices."""
    whole, split = replicated(local_mesh()), batch_sharding(local_mesh())
    params = jax.device_put(params, whole)

    def encode(params, pixels):
        x = pixels.astype(jnp.float32) / 127.5 - 1.0
        # Rows stay with their devices: image and mirror image side by side, not one after another.
        both = jnp.stack([x, x[:, :, ::-1]], axis=1).reshape(-1, *x.shape[1:])
        mean, logvar = module.apply(params, both, method="encode")
        moments = (mean, jnp.exp(logvar.astype(jnp.float32) / 2))
        return tuple(m.astype(dtype).reshape(-1, 2, *m.shape[1:]) for m in moments)

    jitted = jax.jit(encode, in_shardings=(whole, split), out_shardings=split)

    def run(pixels):
        with jax.default_matmul_precision(precision):
            return jitted(params, pixels)

    return run


def _encoded(
    source: PictureSet,
    indices: range,
    encode: Callable,
    batch_size: int,
    plan: LatentsPlan,
    pool: concurrent.futures.Executor,
) -> Iterator[dict[str, Any] | PictureError]:
    """Examples of one shard. Batches do not cross shards, so a shard is always made alike."""

    def read(index):
        try:
            image, label, key = source[index]
        except PictureError as error:
            return error
        return center_crop(image, plan.image_size), label, key

    under_way = None  # on the devices, while the next images are read
    for start in range(0, len(indices), batch_size):
        rows = list(pool.map(read, indices[start : start + batch_size]))
        images = [row[0] for row in rows if not isinstance(row, PictureError)]
        pixels = np.zeros((batch_size, plan.image_size, plan.image_size, 3), np.uint8)
        for place, image in enumerate(images):
            pixels[place] = image
        current = (encode(pixels), rows)
        if under_way is not None:
            yield from _rows(*under_way)
        under_way = current
    yield from _rows(*under_way)


def _rows(
    moments: tuple[jax.Array, jax.Array], rows: list[tuple | PictureError]
) -> Iterator[dict[str, Any] | PictureError]:
    pairs = zip(*jax.device_get(moments), strict=True)  # behind the images there is padding
    for row in rows:
        if isinstance(row, PictureError):
            yield row
        else:
            (mean, std), (_, label, key) = next(pairs), row
            yield {"mean": mean, "std": std, "label": label, "key": key}
