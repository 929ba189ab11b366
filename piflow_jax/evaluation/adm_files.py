"""Files of ADM's evaluator: references and samples as `.npz`, with hashes of the files read.

The layout is that of openai/guided-diffusion: statistics `mu, sigma` of FID's features and `mu_s,
sigma_s` of sFID's, images in `arr_0`, labels in `arr_1`. Our own statistics have two more keys,
`count` and `feature_network`.
"""

import contextlib
import dataclasses
import hashlib
import math
import os
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from etils import epath
from numpy.typing import ArrayLike

from piflow_jax.buckets import is_file, located
from piflow_jax.evaluation.frechet import GaussianStatistics
from piflow_jax.models.inception import POOL_FEATURES, SPATIAL_CHANNELS
from piflow_jax.whole_files import reading, replacing

SPATIAL_FEATURES = 17 * 17 * SPATIAL_CHANNELS
REFERENCE_URL = (
    "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/"
    "VIRTUAL_imagenet256_labeled.npz"
)
# First digits of the SHA-256 of `pt_inception-2015-12-05-6726825d.pth`, as in its name.
_PUBLISHED_WEIGHTS = "6726825d"
_STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")


def is_published(feature_network: str) -> bool:
    """Whether a hash of weights belongs to the published network, which alone gives an FID."""
    return feature_network.startswith(_PUBLISHED_WEIGHTS)


def file_digest(path: str | os.PathLike) -> str:
    """SHA-256 of the bytes of the file at `path`, 64 hexadecimal digits."""
    with located(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Reference:
    """Statistics of real data, in a file of ADM's format.

    Attributes:
      path: The file.
      digest: SHA-256 of its bytes.
      pool: Mean and covariance of FID's features; None if the file only has images.
      spatial: Mean and covariance of sFID's features; None if the file only has images.
      count: Number of samples behind the statistics; None if the file has no count (ADM's files
        have none).
      feature_network: Hash of the feature network; None in ADM's files, which use the published
        network.
      images: Number of images in the file, for precision and recall; ADM's files have 10,000.
    """

    path: epath.Path
    digest: str
    pool: GaussianStatistics | None
    spatial: GaussianStatistics | None
    count: int | None
    feature_network: str | None
    images: int

    def check(self, feature_network: str) -> None:
        """Raises ValueError unless the statistics use the network hashed `feature_network`."""
        if self.pool is None or self.feature_network == feature_network:
            return
        if self.feature_network is not None:
            raise ValueError(
                f"{self.path} was made with the feature network {self.feature_network[:16]}, not "
                f"with {feature_network[:16]}"
            )
        if not is_published(feature_network):
            raise ValueError(
                f"{self.path} names no feature network, so it was made with the published one, and "
                f"{feature_network[:16]} is another"
            )


def read_reference(path: str | os.PathLike) -> Reference:
    """Opens a reference: `mu, sigma, mu_s, sigma_s`, or images in `arr_0`, or both.

    Args:
      path: An `.npz` from ADM, `write_statistics` or `write_samples`.

    Returns:
      The reference, with its images not yet read.

    Raises:
      FileNotFoundError: The file is missing; the message says what to put there.
      ValueError: The file is damaged, has neither statistics nor images, lacks some of the
        statistics, or its statistics have another shape or are not finite.
    """
    path = located(path)
    if not is_file(path):
        raise FileNotFoundError(
            f"no reference statistics at {path}: for ImageNet 256x256, download {REFERENCE_URL} "
            "and put it there"
        )
    with reading(path) as here:
        return _read_reference(path, here)


def _read_reference(path: epath.Path, here: Path) -> Reference:
    pool = spatial = None
    with _about(path), np.load(here, allow_pickle=False) as archive:
        names = set(archive.files)
        found = [name for name in _STATISTICS if name in names]
        if len(found) < len(_STATISTICS) and (found or "arr_0" not in names):
            raise ValueError(
                f"{path} must have {', '.join(_STATISTICS)} or arr_0, has {sorted(names)}"
            )
        if found:
            mu, sigma, mu_s, sigma_s = (archive[name].astype(np.float64) for name in _STATISTICS)
            pool, spatial = GaussianStatistics(mu, sigma), GaussianStatistics(mu_s, sigma_s)
        for size, part in ((POOL_FEATURES, pool), (SPATIAL_FEATURES, spatial)):
            if part and (part.mean.shape, part.covariance.shape) != ((size,), (size, size)):
                raise ValueError(f"{path} has statistics of {part.mean.shape}, not of {size}")
            if part and not all(np.isfinite(array).all() for array in (part.mean, part.covariance)):
                raise ValueError(f"{path} has statistics that are not finite")
        count = int(archive["count"]) if "count" in names else None
        feature_network = str(archive["feature_network"]) if "feature_network" in names else None
    images = 0
    if "arr_0" in names:
        with _open_member(path, here, "arr_0") as (shape, _):
            images = shape[0]
    return Reference(
        path=path,
        digest=file_digest(here),
        pool=pool,
        spatial=spatial,
        count=count,
        feature_network=feature_network,
        images=images,
    )


@contextlib.contextmanager
def _about(path: Path) -> Iterator[None]:
    """Adds the file's name to any error of NumPy, zipfile and zlib about a damaged file."""
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path} is damaged, or no .npz file: {error!r}") from error


@contextlib.contextmanager
def _open_member(path: epath.Path, here: Path, name: str):
    """Shape and byte stream of one array in an `.npz`, read from `here`."""
    with (
        _about(path),
        zipfile.ZipFile(here) as archive,
        archive.open(f"{name}.npy") as stream,
    ):
        headers = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        shape, fortran, dtype = headers[np.lib.format.read_magic(stream)](stream)
        if fortran or dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3:
            raise ValueError(f"{path}: {name} must be uint8[N, H, W, 3], has {dtype}{list(shape)}")
        yield shape, stream


def image_batches(path: str | os.PathLike, batch_size: int = 512) -> Iterator[np.ndarray]:
    """Yields the images of an `.npz` in batches, so that only a few are in memory.

    Args:
      path: A file with `arr_0` uint8[N, H, W, 3].
      batch_size: Images per batch; the last one may be smaller.

    Yields:
      uint8[B, H, W, 3].

    Raises:
      ValueError: `arr_0` is another kind of array, damaged or truncated.
    """
    path = located(path)
    with reading(path) as here, _open_member(path, here, "arr_0") as (shape, stream):
        for start in range(0, shape[0], batch_size):
            wanted = (min(batch_size, shape[0] - start), *shape[1:])
            data = stream.read(math.prod(wanted))
            if len(data) != math.prod(wanted):
                raise ValueError(f"{path}: arr_0 ends before image {start + wanted[0]}")
            yield np.frombuffer(data, np.uint8).reshape(wanted)


def write_samples(
    path: str | os.PathLike, batches: Iterable[np.ndarray], labels: ArrayLike
) -> None:
    """Writes samples in the format of ADM's evaluator: `arr_0` images, `arr_1` labels.

    Args:
      path: File to write, `.npz`; replaced atomically.
      batches: Arrays uint8[B, H, W, 3], written one after the other.
      labels: Integers [N], one per image of all batches.

    Raises:
      ValueError: Batches are other arrays, differ in image size, or do not have N images in total.
    """
    path, labels = located(path), np.asarray(labels)
    if labels.ndim != 1 or not len(labels) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"`labels` must be integers [N], got {labels.dtype}{list(labels.shape)}")
    count, size = 0, None
    with replacing(path) as under_way:
        with zipfile.ZipFile(under_way, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as stream:
                for batch in batches:
                    size = size or batch.shape[1:]
                    wrong = batch.shape[1:] != size or len(size) != 3 or size[-1] != 3
                    if wrong or batch.dtype != np.uint8:
                        raise ValueError(
                            f"`batches` must all be uint8[B, H, W, 3] of one size, got "
                            f"{batch.dtype}{list(batch.shape)}"
                        )
                    if count == 0:
                        shape = (len(labels), *size)
                        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                        np.lib.format.write_array_header_1_0(stream, header)
                    stream.write(np.ascontiguousarray(batch).data)
                    count += len(batch)
            with archive.open("arr_1.npy", "w") as stream:
                np.lib.format.write_array(stream, labels.astype(np.int64))
        if count != len(labels):
            raise ValueError(f"`batches` had {count} images for {len(labels)} `labels`")


def write_statistics(
    path: str | os.PathLike,
    pool: GaussianStatistics,
    spatial: GaussianStatistics,
    *,
    count: int,
    feature_network: str,
) -> None:
    """Writes statistics of real data in ADM's format, with the count and the network's hash.

    Args:
      path: File to write, `.npz`; replaced atomically.
      pool: Mean and covariance of FID's features.
      spatial: Mean and covariance of sFID's features of the same images.
      count: Number of images.
      feature_network: SHA-256 of the network's weights.
    """
    values = (*pool, *spatial)
    extra = {"count": np.int64(count), "feature_network": np.str_(feature_network)}
    with replacing(located(path)) as under_way, under_way.open("wb") as file:
        np.savez(file, **dict(zip(_STATISTICS, values, strict=True)), **extra)
