"""Cached latents: the autoencoder's posterior of every image and of its mirror image.

A set is a directory that TFDS reads as `imagenet_latents` (ArrayRecord shards, `dataset_info.json`,
`features.json`) and beside them `latents.json`, the manifest: which autoencoder and images, the
scale and shift of latents, and each shard's length and SHA-256. The manifest is written last, so a
directory that has one was finished.

While it is written, `preparation/` holds the plan, one small record for each shard, and shards
under construction. A shard is moved to its place when it is complete, with its record before it; so
one that is in its place is whole, and a preparation that was killed goes on with the others. The
directory must be local or mounted.

The set stores raw moments. What models see is `(sample - shift) * scale`; see `draw_latents`.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np

if TYPE_CHECKING:
    import jax

__all__ = [
    "MANIFEST",
    "NAME",
    "SD_VAE_SCALE",
    "LatentsError",
    "LatentsPlan",
    "LatentsSource",
    "draw_latents",
    "finalize_latents",
    "load_latents_source",
    "missing_shards",
    "start_latents",
    "write_shard",
]

NAME = "imagenet_latents"
MANIFEST = "latents.json"
SD_VAE_SCALE = 0.18215

_FORMAT = 1
_SPLIT = "train"
_VERSION = "1.0.0"
_DTYPES = ("float16", "float32")
_WORK = "preparation"
_PLAN = "plan.json"
_TFDS_FILES = ("dataset_info.json", "features.json")
# One record for each read. Half-precision noise hardly compresses: 6%, and reads take twice as long
_WRITER_OPTIONS = "group_size:1,uncompressed"
_HASH_THREADS = 8


class LatentsError(ValueError):
    """A cached set is unfinished, damaged, or not the one that was asked for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentsPlan:
    """What a set is, fixed before its first shard is written.

    Attributes:
      vae: Identity of the autoencoder, a hash of its weights.
      compute: How it was evaluated, for the record.
      source: What the images are.
      num_examples: Number of images.
      num_classes: Number of their classes.
      image_size: Side of the square crops.
      latent_shape: `(H, W, C)` of the latents.
      shard_size: Images in each shard; the last may have fewer.
      dtype: Type of the stored moments, `float16` or `float32`.
      scale: Latents are `(sample - shift) * scale`.
      shift: See `scale`.

    Raises:
      ValueError: If a number is out of range or the type is neither.
    """

    vae: str
    compute: str
    source: str
    num_examples: int
    num_classes: int
    image_size: int
    latent_shape: tuple[int, int, int]
    shard_size: int
    dtype: str = "float16"
    scale: float = SD_VAE_SCALE
    shift: float = 0.0

    def __post_init__(self):  # noqa: D105
        object.__setattr__(self, "latent_shape", tuple(self.latent_shape))
        for name in ("num_examples", "num_classes", "image_size", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {_DTYPES}, got {self.dtype!r}")

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return -(-self.num_examples // self.shard_size)

    def shard_name(self, shard: int) -> str:
        """Name of a shard's file, as TFDS wants it."""
        return f"{NAME}-{_SPLIT}.array_record-{shard:05d}-of-{self.num_shards:05d}"

    def shard_range(self, shard: int) -> range:
        """The images of a shard."""
        start = shard * self.shard_size
        return range(start, min(start + self.shard_size, self.num_examples))


def start_latents(directory: str | os.PathLike, plan: LatentsPlan) -> None:
    """Records what a directory is going to hold, or checks that it is what it was.

    Args:
      directory: The set's directory; made if need be.
      plan: What it is going to hold.

    Raises:
      LatentsError: If a preparation with another plan was begun there.
    """
    work = Path(directory) / _WORK
    work.mkdir(parents=True, exist_ok=True)
    if not (work / _PLAN).exists():
        _write_json(work / _PLAN, dataclasses.asdict(plan))
    known = _read_plan(directory)  # perhaps another process's, which came first
    if known != plan:
        differences = [
            f"{field.name} was {getattr(known, field.name)!r}, is {getattr(plan, field.name)!r}"
            for field in dataclasses.fields(plan)
            if getattr(known, field.name) != getattr(plan, field.name)
        ]
        raise LatentsError(f"{directory} was begun differently: {'; '.join(differences)}")


def missing_shards(directory: str | os.PathLike, plan: LatentsPlan) -> list[int]:
    """Shards that are not there, or shorter or longer than they were when they were written."""
    missing = []
    for shard in range(plan.num_shards):
        path = Path(directory) / plan.shard_name(shard)
        record = _record_path(directory, shard)
        whole = path.exists() and record.exists()
        if not whole or path.stat().st_size != _read_json(record)["bytes"]:
            missing.append(shard)
    return missing


def write_shard(
    directory: str | os.PathLike,
    plan: LatentsPlan,
    shard: int,
    examples: Iterable[dict[str, Any]],
) -> None:
    """Writes one shard, which appears under its name only when it is complete.

    Args:
      directory: The set's directory, after `start_latents`.
      plan: What it holds.
      shard: Index of the shard.
      examples: In order, `mean`, `std`: `[2, *plan.latent_shape]` of `plan.dtype`, the image's and
        its mirror image's; `label: int`; `key: str`.

    Raises:
      LatentsError: If there are not as many as the shard has images, or one is not finite.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    features = _features(plan)
    under_way = Path(directory) / _WORK / f"{shard:05d}.array_record"
    writer = ArrayRecordWriter(os.fspath(under_way), _WRITER_OPTIONS)
    count = 0
    try:
        for example in examples:
            if not all(np.isfinite(example[name]).all() for name in ("mean", "std")):
                raise LatentsError(f"latents of {example['key']} are not finite in {plan.dtype}")
            writer.write(features.serialize_example(example))
            count += 1
    finally:
        writer.close()
    if count != len(plan.shard_range(shard)):
        raise LatentsError(
            f"shard {shard} has {len(plan.shard_range(shard))} images, got {count} latents"
        )
    with open(under_way, "rb+") as file:
        os.fsync(file.fileno())
    record = {"examples": count, "bytes": under_way.stat().st_size, "sha256": _digest(under_way)}
    _write_json(_record_path(directory, shard), record)
    os.replace(under_way, Path(directory) / plan.shard_name(shard))


def finalize_latents(directory: str | os.PathLike) -> dict[str, Any]:
    """Verifies all shards, writes TFDS's description and then the manifest.

    It may be called again, and by several processes at once.

    Args:
      directory: The set's directory.

    Returns:
      The manifest.

    Raises:
      LatentsError: If a shard is missing or not as it was written; the message names its file.
    """
    directory = Path(directory)
    plan = _read_plan(directory)
    shards = []
    for shard in range(plan.num_shards):
        record = _record_path(directory, shard)
        if not record.exists():
            raise LatentsError(f"{directory / plan.shard_name(shard)} was not written")
        shards.append({"file": plan.shard_name(shard), **_read_json(record)})
    _verify_shards(directory, shards, checksums=True)
    for entry in shards:
        count = _num_records(directory / entry["file"])
        if count != entry["examples"]:
            raise LatentsError(
                f"{directory / entry['file']} has {count} examples, expected {entry['examples']}"
            )
    _write_tfds_files(directory, plan, shards)
    manifest = {"format": _FORMAT, **dataclasses.asdict(plan), "shards": shards}
    _write_json(directory / MANIFEST, manifest)
    return _read_json(directory / MANIFEST)


class LatentsSource:
    """A finished set by index, for `piflow_jax.data.batches`; made by `load_latents_source`.

    Examples are `mean`, `std`: `[2, H, W, C]`, the image's and its mirror image's, and
    `label: int32[]`. Which of the two is used and the posterior's noise are drawn later, by
    `draw_latents` from the training step's key: that costs the input pipeline nothing, and a
    resumed run draws the same.

    Attributes:
      name: `imagenet_latents`.
      shape: `(H, W, C)` of one latent.
      num_classes: Number of classes.
      manifest: All that is known of the set, `latents.json`.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any]):
        import tensorflow_datasets as tfds

        self.name = NAME
        self.shape = tuple(manifest["latent_shape"])
        self.num_classes = manifest["num_classes"]
        self.manifest = manifest
        builder = tfds.builder_from_directory(directory)
        lengths = [shard["examples"] for shard in manifest["shards"]]
        if list(builder.info.splits[_SPLIT].shard_lengths) != lengths:
            raise LatentsError(f"{directory / _TFDS_FILES[0]} contradicts {MANIFEST}")
        self._examples = builder.as_data_source(split=_SPLIT)

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self._examples)

    def __getitem__(self, index: SupportsIndex) -> dict[str, np.ndarray]:
        """Returns one example, `0 <= index < len(self)`."""
        example = self._examples[index]
        return {
            "mean": example["mean"],
            "std": example["std"],
            "label": np.asarray(example["label"], np.int32),
        }

    def key(self, index: SupportsIndex) -> str:
        """Returns the name of the image of one example."""
        return self._examples[index]["key"].decode()


def load_latents_source(
    directory: str | os.PathLike,
    *,
    expect_vae: str | None = None,
    expect_scale: float | None = None,
    expect_shift: float | None = None,
    verify: bool = True,
) -> LatentsSource:
    """Opens a finished set.

    Args:
      directory: Its directory.
      expect_vae: Identity of the autoencoder that it must come from; None takes any.
      expect_scale: Scale that latents must have; None takes any.
      expect_shift: Shift that latents must have; None takes any.
      verify: Compare all checksums, which reads the whole set. Without it only lengths of files are
        compared; a damaged record then raises when it is read.

    Returns:
      The source.

    Raises:
      LatentsError: If the set is unfinished, a file is missing or differs from the manifest (the
        message names it), or it was made with another autoencoder, scale or shift.
    """
    directory = Path(directory)
    if not (directory / MANIFEST).exists():
        raise LatentsError(
            f"{directory / MANIFEST} is missing: there are no latents, or their preparation has "
            "not finished; run it (again)"
        )
    manifest = _read_manifest(directory / MANIFEST)
    expected = {"vae": expect_vae, "scale": expect_scale, "shift": expect_shift}
    for name, value in expected.items():
        if value is not None and manifest[name] != value:
            raise LatentsError(
                f"{directory} was made with {name} {manifest[name]!r}, but {value!r} was asked for"
            )
    for name in _TFDS_FILES:
        if not (directory / name).exists():
            raise LatentsError(f"{directory / name} is missing")
    _verify_shards(directory, manifest["shards"], checksums=verify)
    return LatentsSource(directory, manifest)


def draw_latents(
    key: "jax.Array",
    mean: "jax.Array",
    std: "jax.Array",
    scale: float = SD_VAE_SCALE,
    shift: float = 0.0,
) -> "jax.Array":
    """Chooses image or mirror image with equal chances and samples its posterior; jittable.

    It stands beside the format, whose second axis it resolves, and loads JAX only when called.

    Args:
      key: Random key.
      mean: `[B, 2, *sites, C]`, as batches of a `LatentsSource` have it.
      std: Standard deviation of the same shape.
      scale: Latents are `(sample - shift) * scale`.
      shift: See `scale`.

    Returns:
      Latents float32[B, *sites, C].
    """
    import jax
    import jax.numpy as jnp

    mirror_key, noise_key = jax.random.split(key)
    mirror = jax.random.bernoulli(mirror_key, shape=mean.shape[:1])
    mirror = mirror.reshape(-1, *[1] * (mean.ndim - 2))
    mean, std = (
        jnp.where(mirror, moment[:, 1], moment[:, 0]).astype(jnp.float32) for moment in (mean, std)
    )
    return (mean + std * jax.random.normal(noise_key, mean.shape) - shift) * scale


def _features(plan: LatentsPlan):
    import tensorflow_datasets as tfds

    moments = tfds.features.Tensor(
        shape=(2, *plan.latent_shape),
        dtype=np.dtype(plan.dtype).type,
        encoding=tfds.features.Encoding.BYTES,
    )
    return tfds.features.FeaturesDict(
        {
            "mean": moments,
            "std": moments,
            "label": tfds.features.ClassLabel(num_classes=plan.num_classes),
            "key": tfds.features.Text(),
        }
    )


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest = _read_json(path)
    if manifest.get("format") != _FORMAT:
        raise LatentsError(f"{path} has format {manifest.get('format')!r}, expected {_FORMAT}")
    fields = {field.name for field in dataclasses.fields(LatentsPlan)} | {"format", "shards"}
    if set(manifest) != fields:
        raise LatentsError(f"{path} lacks or adds {sorted(fields ^ set(manifest))}")
    for shard in manifest["shards"]:
        if set(shard) != {"file", "examples", "bytes", "sha256"}:
            raise LatentsError(f"{path} does not have all of {shard.get('file')}")
    total = sum(shard["examples"] for shard in manifest["shards"])
    if total != manifest["num_examples"]:
        raise LatentsError(f"{path} lists shards of {total} of {manifest['num_examples']} examples")
    return manifest


def _write_tfds_files(directory: Path, plan: LatentsPlan, shards: list[dict[str, Any]]) -> None:
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
    tfds.folder_dataset.write_metadata(
        data_dir=directory,
        features=_features(plan),
        split_infos=[split],
        version=_VERSION,
        filename_template=template.template,
        check_data=False,  # it would read with TensorFlow, which cannot read ArrayRecord
        description=f"Moments of autoencoder {plan.vae}. Images: {plan.source}.",
    )


def _verify_shards(directory: Path, shards: list[dict[str, Any]], *, checksums: bool) -> None:
    """Compares lengths of all shards first, then their contents."""
    for shard in shards:
        path = directory / shard["file"]
        if not path.exists():
            raise LatentsError(f"{path} is missing")
        if path.stat().st_size != shard["bytes"]:
            raise LatentsError(
                f"{path} has {path.stat().st_size} bytes, expected {shard['bytes']}; remove it and "
                "prepare again"
            )
    if not checksums:
        return
    with concurrent.futures.ThreadPoolExecutor(_HASH_THREADS) as pool:
        digests = pool.map(lambda shard: _digest(directory / shard["file"]), shards)
        for shard, digest in zip(shards, digests, strict=True):
            if digest != shard["sha256"]:
                raise LatentsError(
                    f"{directory / shard['file']} differs from what was written: its SHA-256 is "
                    f"{digest}, expected {shard['sha256']}; remove it and prepare again"
                )


def _num_records(path: Path) -> int:
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(os.fspath(path))
    try:
        return reader.num_records()
    finally:
        reader.close()


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _record_path(directory: str | os.PathLike, shard: int) -> Path:
    return Path(directory) / _WORK / f"{shard:05d}.json"


def _read_plan(directory: str | os.PathLike) -> LatentsPlan:
    path = Path(directory) / _WORK / _PLAN
    if not path.exists():
        raise LatentsError(f"no preparation was begun in {directory}: {path} is missing")
    try:
        return LatentsPlan(**_read_json(path))
    except TypeError as error:
        raise LatentsError(f"{path} is not a plan: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LatentsError(f"{path} is damaged: {error}") from error


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a file that is there as a whole or not at all."""
    under_way = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with open(under_way, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(under_way, path)
