"""Cached latents: the autoencoder's posterior of every image and of its mirror image.

A set is a `ShardedSet` (see `piflow_jax.data.shards`) that TFDS reads as `latents`: beside
the shards there are `dataset_info.json` and `features.json`. The manifest, `latents.json`, says
which autoencoder and images, and the scale and shift of latents.

The set stores raw moments. What models see is `(sample - shift) * scale`; see `draw_latents`.
"""

import dataclasses
import functools
import math
import os
import reprlib
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from piflow_jax.buckets import located
from piflow_jax.data.plans import Plan
from piflow_jax.data.records import Records
from piflow_jax.data.shards import ShardedSet, ShardsError
from piflow_jax.whole_files import copy_file

__all__ = [
    "LATENTS",
    "MANIFEST",
    "NAME",
    "SD_VAE_SCALE",
    "LatentsError",
    "LatentsPlan",
    "LatentsSource",
    "draw_latents",
    "load_latents_source",
]

NAME = "latents"
MANIFEST = "latents.json"
SD_VAE_SCALE = 0.18215

_SPLIT = "train"
_VERSION = "1.0.0"
_DTYPES = ("float16", "float32")
# Of numbers of float32, in which latents are scaled; Python's compare with any whole number.
_TINIEST, _HIGHEST = (float(getattr(np.finfo(np.float32), name)) for name in ("tiny", "max"))
_TFDS_FILES = ("dataset_info.json", "features.json")


class LatentsError(ShardsError):
    """A cached set of latents is unfinished, damaged, or not the one that was asked for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentsPlan(Plan):
    """What a set is, fixed before its first shard is written.

    Attributes:
      vae: Identity of the autoencoder, a hash of its weights.
      compute: How it was evaluated, for the record.
      source: What the images are.
      num_classes: Number of their classes.
      image_size: Side of the square crops.
      latent_shape: `(H, W, C)` of the latents.
      dtype: Type of the stored moments, `float16` or `float32`.
      scale: Latents are `(sample - shift) * scale`, a number or one for each channel.
      shift: See `scale`.

    Raises:
      ValueError: If a number is out of range or the type is neither.
    """

    stem = f"{NAME}-{_SPLIT}"

    vae: str
    compute: str
    source: str
    num_classes: int
    image_size: int
    latent_shape: tuple[int, int, int]
    dtype: str = "float16"
    scale: float | tuple[float, ...] = SD_VAE_SCALE
    shift: float | tuple[float, ...] = 0.0

    def __post_init__(self):  # noqa: D105
        super().__post_init__()
        for name in ("latent_shape", "scale", "shift"):
            if isinstance(getattr(self, name), list):  # from JSON
                object.__setattr__(self, name, tuple(getattr(self, name)))
        self.check_positive("num_classes", "image_size")
        sizes = {1, self.latent_shape[-1]}
        for name, low in (("scale", _TINIEST), ("shift", -_HIGHEST)):
            value = getattr(self, name)
            numbers = value if isinstance(value, tuple) else (value,)
            if len(numbers) not in sizes or not all(low <= n <= _HIGHEST for n in numbers):
                raise ValueError(
                    f"latents of {self.latent_shape} have the {name} {reprlib.repr(value)}"
                )
        if min(self.latent_shape) < 1:
            raise ValueError(f"latents cannot be {self.latent_shape}")
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {_DTYPES}, got {self.dtype!r}")


class LatentsSource:
    """A finished set by index, for `piflow_jax.data.batches`; made by `load_latents_source`.

    Examples have `x`, the moments `mean` and `std`: `[2, H, W, C]`, the image's and its mirror
    image's, and `condition: int32[]`, the label. Which of the two is used and the posterior's noise
    are drawn later, by `draw` from the training step's key: that costs the input pipeline nothing,
    and a resumed run draws the same.

    Attributes:
      name: `latents`.
      shape: `(H, W, C)` of one latent.
      num_classes: Number of classes.
      latent_scale: Networks see `(latent - latent_shift) * latent_scale`, a number or one for each
        channel.
      latent_shift: See `latent_scale`.
      vae: Identity of the autoencoder.
      manifest: All that is known of the set, `latents.json`.
    """

    def __init__(
        self, directory: epath.Path, manifest: dict[str, Any], cache_gib: float = math.inf
    ):
        import tensorflow_datasets as tfds

        self.name = NAME
        self.shape = tuple(manifest["latent_shape"])
        self.num_classes = manifest["num_classes"]
        self.latent_scale, self.latent_shift = (
            tuple(value) if isinstance(value, list) else value
            for value in (manifest["scale"], manifest["shift"])
        )
        self.vae = manifest["vae"]
        self.manifest = manifest
        lengths = [shard["examples"] for shard in manifest["shards"]]
        try:
            with tempfile.TemporaryDirectory(prefix="piflow_jax_") as here:
                for name in _TFDS_FILES:
                    copy_file(directory / name, epath.Path(here) / name)
                builder = tfds.builder_from_directory(here)
                known = list(builder.info.splits[_SPLIT].shard_lengths)
        except Exception as error:  # of two parsers, TFDS's and that of protocol buffers
            reason = " ".join(f"{error}".split())
            raise LatentsError(
                f"{directory} has a damaged {_TFDS_FILES[0]} or {_TFDS_FILES[1]} ({reason}); "
                "--mode=prepare writes them anew"
            ) from error
        if known != lengths:
            raise LatentsError(f"{directory / _TFDS_FILES[0]} contradicts {MANIFEST}")
        # Not as TFDS's files say, which others may read, but as the manifest does.
        parse = _parser((2, *self.shape), manifest["dtype"])
        self._examples = Records(directory, manifest["shards"], parse, LatentsError, cache_gib)
        self.stage = self._examples.stage

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self._examples)

    def __getitem__(self, index: SupportsIndex) -> dict[str, np.ndarray]:
        """Returns one example, `0 <= index < len(self)`."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[SupportsIndex]) -> list[dict[str, np.ndarray]]:
        """Returns several examples, read at once."""
        return [
            {
                "x": {"mean": example["mean"], "std": example["std"]},
                "condition": np.asarray(example["label"], np.int32),
            }
            for example in self._examples.__getitems__(indices)
        ]

    def draw(self, key: jax.Array, x: dict[str, jax.Array]) -> jax.Array:
        """Draws states of the moments of a batch; see `draw_latents`.

        Args:
          key: Random key.
          x: `mean` and `std`, `[B, 2, H, W, C]` each.

        Returns:
          States float32[B, H, W, C].
        """
        return draw_latents(key, **x, scale=self.latent_scale, shift=self.latent_shift)

    def key(self, index: SupportsIndex) -> str:
        """Returns the name of the image of one example.

        Args:
          index: `0 <= index < len(self)`.

        Returns:
          The name, `<wnid>/<file name>` for ImageNet.
        """
        return self._examples[index]["key"].decode(errors="surrogateescape")


def load_latents_source(
    directory: str | os.PathLike,
    *,
    expect_vae: str | None = None,
    expect_scale: float | tuple[float, ...] | None = None,
    expect_shift: float | tuple[float, ...] | None = None,
    verify: bool = True,
    cache_gib: float = math.inf,
) -> LatentsSource:
    """Opens a finished set.

    Args:
      directory: Its directory.
      expect_vae: Identity of the autoencoder that it must come from; None takes any.
      expect_scale: Scale that latents must have; None takes any.
      expect_shift: Shift that latents must have; None takes any.
      verify: Compare all checksums, which reads the whole set. Without it only lengths of files are
        compared; a damaged record then raises when it is read.
      cache_gib: Most GiB of the copies that a process makes of a set in a bucket.

    Returns:
      The source.

    Raises:
      LatentsError: If the set is unfinished, a file is missing or differs from the manifest (the
        message names it), or it was made with another autoencoder, scale or shift.
    """
    directory, manifest = located(directory), LATENTS.open(directory)
    expected = {"vae": expect_vae, "scale": expect_scale, "shift": expect_shift}
    for name, value in expected.items():
        value = list(value) if isinstance(value, tuple) else value  # as JSON has them
        if value is not None and manifest[name] != value:
            raise LatentsError(
                f"{directory} was made with {name} {manifest[name]!r}, but {value!r} was asked for"
            )
    for name in _TFDS_FILES:
        if not (directory / name).exists():
            raise LatentsError(f"{directory / name} is missing")
    LATENTS.verify(directory, manifest["shards"], checksums=verify)
    return LatentsSource(directory, manifest, cache_gib)


def draw_latents(
    key: jax.Array,
    mean: jax.Array,
    std: jax.Array,
    scale: float | tuple[float, ...] = SD_VAE_SCALE,
    shift: float | tuple[float, ...] = 0.0,
) -> jax.Array:
    """Chooses image or mirror image with equal chances and samples its posterior; jittable.

    It is here because it resolves the format's second axis. It loads JAX only when called.

    Args:
      key: Random key.
      mean: `[B, 2, *sites, C]`, as batches of a `LatentsSource` have it.
      std: Standard deviation of the same shape.
      scale: Latents are `(sample - shift) * scale`, a number or one for each channel.
      shift: See `scale`.

    Returns:
      Latents float32[B, *sites, C].
    """
    mirror_key, noise_key = jax.random.split(key)
    mirror = jax.random.bernoulli(mirror_key, shape=mean.shape[:1])
    mirror = mirror.reshape(-1, *[1] * (mean.ndim - 2))
    mean, std = (
        jnp.where(mirror, moment[:, 1], moment[:, 0]).astype(jnp.float32) for moment in (mean, std)
    )
    scale, shift = (
        jnp.asarray(value, jnp.float32).reshape((1,) * (mean.ndim - 1) + (-1,))
        for value in (scale, shift)
    )
    return (mean + std * jax.random.normal(noise_key, mean.shape) - shift) * scale


def _parser(shape: tuple[int, ...], dtype: str) -> Callable[[bytes], dict[str, Any]]:
    """Reads a record that TFDS wrote with `_features`; TFDS's own reader takes twice as long."""
    from tensorflow_datasets.proto import tf_example_pb2

    def parse(record: bytes) -> dict[str, Any]:
        entries = tf_example_pb2.Example.FromString(record).features.feature

        def moments(name: str) -> np.ndarray:
            return np.frombuffer(entries[name].bytes_list.value[0], dtype).reshape(shape)

        return {
            "mean": moments("mean"),
            "std": moments("std"),
            "label": entries["label"].int64_list.value[0],
            "key": entries["key"].bytes_list.value[0],
        }

    return parse


@functools.cache
def _features(latent_shape: tuple[int, ...], dtype: str, num_classes: int) -> Any:
    """What TFDS calls the types of an example's entries."""
    import tensorflow_datasets as tfds

    moments = tfds.features.Tensor(
        shape=(2, *latent_shape),
        dtype=np.dtype(dtype).type,
        encoding=tfds.features.Encoding.BYTES,
    )
    return tfds.features.FeaturesDict(
        {
            "mean": moments,
            "std": moments,
            "label": tfds.features.ClassLabel(num_classes=num_classes),
            "key": tfds.features.Text(),
        }
    )


def _serialized(
    plan: LatentsPlan, index: int, example: dict[str, Any], notes: dict[str, int]
) -> bytes:
    if not all(np.isfinite(example[name]).all() for name in ("mean", "std")):
        raise LatentsError(f"latents of {example['key']} are not finite in {plan.dtype}")
    features = _features(plan.latent_shape, plan.dtype, plan.num_classes)
    key = example["key"].encode(errors="surrogateescape")  # as the file system has it
    return features.serialize_example(example | {"key": key})


def _write_tfds_files(
    directory: epath.Path, plan: LatentsPlan, shards: list[dict[str, Any]]
) -> None:
    import tensorflow_datasets as tfds

    template = tfds.core.ShardedFileTemplate(
        data_dir=directory, dataset_name=NAME, split=_SPLIT, filetype_suffix="array_record"
    )
    split = tfds.core.SplitInfo(
        name=_SPLIT,
        shard_lengths=[shard["examples"] for shard in shards],
        num_bytes=sum(shard["bytes"] for shard in shards),
        filename_template=template,
    )
    for shard in shards:  # whose names it looks for
        (directory / shard["file"]).touch()
    tfds.folder_dataset.write_metadata(
        data_dir=directory,
        features=_features(plan.latent_shape, plan.dtype, plan.num_classes),
        split_infos=[split],
        version=_VERSION,
        filename_template=template.template,
        check_data=False,  # it would read with TensorFlow, which cannot read ArrayRecord
        description=f"Moments of autoencoder {plan.vae}. Images: {plan.source}.",
    )
    for shard in shards:
        (directory / shard["file"]).unlink()


LATENTS = ShardedSet(
    manifest=MANIFEST,
    format=1,
    plan=LatentsPlan,
    error=LatentsError,
    contents="latents",
    serialize=_serialized,
    describe=_write_tfds_files,
)
"""Sets of latents.

Their examples have `mean`, `std`: `[2, *plan.latent_shape]` of `plan.dtype`, the image's and its
mirror image's; `label: int`; `key: str`.
"""
