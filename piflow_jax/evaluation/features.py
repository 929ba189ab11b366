"""Feature spaces for measuring samples, identified by the digest of their weights.

Each one is a small convolutional network. It was trained to predict the class *and* to restore the
clean image from a shifted and noised one, with a penalty on correlated features (see
`feature_training`). Classification alone would let the images of one class collapse onto a point,
which would make recall and diversity blind. The features are the penultimate layer, standardised
over the real data. Every dimension has mean 0 and variance 1 there, so a squared distance between
two unrelated images is about twice the dimension. The spaces that ship with the package were made
by `tools/train_features.py`; figures in them are comparable between runs and machines.
"""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from piflow_jax.evaluation.area import area_averaged

Parameters = dict[str, jax.Array]

_BATCH = 512  # one shape and hence one compilation, for any number of images
SHIPPED = ("digits", "mnist", "fashion_mnist")


def penultimate(parameters: Parameters, images: jax.Array, strides: tuple[int, ...]) -> jax.Array:
    """The network up to its features, before standardisation.

    Args:
      parameters: `conv{i}_kernel [3, 3, in, out]` and `conv{i}_bias [out]` for each stride, then
        `dense_kernel [flattened, D]` and `dense_bias [D]`.
      images: float32[B, H, W, C] in [-1, 1].
      strides: Stride of each convolution.

    Returns:
      float32[B, D]. Every activation is SiLU, which is smooth and never dead. The last layer is
      linear: its values are sums over many units and close to Gaussian, as the Frechet distance
      assumes.
    """
    # Gives the same figures on machines with TF32 or bfloat16 units.
    exact = jax.lax.Precision.HIGHEST
    hidden = images
    for index, stride in enumerate(strides):
        hidden = jax.lax.conv_general_dilated(
            hidden,
            parameters[f"conv{index}_kernel"],
            (stride, stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=exact,
        )
        hidden = jax.nn.silu(hidden + parameters[f"conv{index}_bias"][None, None, None, :])
    flat = hidden.reshape(len(hidden), -1)
    dense = jnp.matmul(flat, parameters["dense_kernel"], precision=exact)
    return dense + parameters["dense_bias"][None, :]


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureNetwork:
    """A trained feature space.

    Attributes:
      name: Its name in reports, such as the name of its data set.
      shape: Shape `(H, W, C)` of the images.
      sites: `(h, w)` to which images are averaged first, see `area_averaged`.
      strides: Stride of each convolution.
      parameters: Weights, see `penultimate`, and `mean [D]` and `scale [D]` of the standardisation.
      digest: SHA-256 of the weights, 64 hexadecimal digits. Reports print it, because figures are
        comparable only between equal digests.
    """

    name: str
    shape: tuple[int, int, int]
    sites: tuple[int, int]
    strides: tuple[int, ...]
    parameters: Parameters
    digest: str

    @property
    def dimension(self) -> int:
        """Number of features per image."""
        return self.parameters["mean"].shape[0]

    def extract(self, images: ArrayLike) -> np.ndarray:
        """Returns the features of images.

        Args:
          images: [N, H, W, C] with any N; values are first clipped to [-1, 1], as in pictures.

        Returns:
          float32[N, D].

        Raises:
          ValueError: If `images` has another shape than `[N, *self.shape]`, or a NaN or infinity.
        """
        images = checked_images(images, self.shape, self.name)
        outputs = [np.zeros((0, self.dimension), np.float32)]
        for start in range(0, len(images), _BATCH):
            part = images[start : start + _BATCH]
            padding = ((0, _BATCH - len(part)), (0, 0), (0, 0), (0, 0))
            padded = np.pad(part, padding)
            features = _standardised(self.parameters, padded, self.sites, self.strides)
            outputs.append(np.asarray(features)[: len(part)])
        return np.concatenate(outputs)

    def features(self, images: jax.Array) -> jax.Array:
        """Features of images inside of another program, with derivatives.

        Args:
          images: `[B, H, W, C]`; clipped as in `extract`, so a pixel outside of [-1, 1] has none.

        Returns:
          `[B, D]`.
        """
        return _standardised(self.parameters, images, self.sites, self.strides)

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, np.ndarray], name: str) -> "FeatureNetwork":
        """Restores a network that was saved.

        Args:
          arrays: The result of `feature_training.stored_arrays`: `shape [3]`, `strides`, `sites
            [2]` if images are averaged, and those of `parameters`.
          name: Its name in reports.

        Returns:
          The network, with weights in float32.

        Raises:
          KeyError: An array is missing.
        """
        arrays = dict(arrays)
        shape, strides = arrays.pop("shape"), arrays.pop("strides")
        sites = arrays.pop("sites", shape[:2])
        return cls(
            name=name,
            shape=tuple(map(int, shape)),
            sites=tuple(map(int, sites)),
            strides=tuple(map(int, strides)),
            parameters={key: jnp.asarray(value, jnp.float32) for key, value in arrays.items()},
            digest=weight_digest(arrays),
        )


@functools.partial(jax.jit, static_argnames=("sites", "strides"))
def _standardised(
    parameters: Parameters, images: jax.Array, sites: tuple[int, int], strides: tuple[int, ...]
) -> jax.Array:
    clipped = jnp.clip(images, -1.0, 1.0)
    raw = penultimate(parameters, area_averaged(clipped, sites), strides)
    return (raw - parameters["mean"][None, :]) / parameters["scale"][None, :]


def checked_images(images: ArrayLike, shape: tuple[int, int, int], name: str) -> np.ndarray:
    """Returns images as float32 if they fit a feature space.

    Args:
      images: Images that should be `[N, H, W, C]`.
      shape: `(H, W, C)`.
      name: Name of the feature space, for the message.

    Returns:
      `float32[N, H, W, C]`.

    Raises:
      ValueError: If they have another shape, a NaN or infinity.
    """
    images = np.asarray(images)
    if images.shape[1:] != tuple(shape) or images.ndim != 4:
        raise ValueError(
            f"`images` must have the shape [N, {', '.join(map(str, shape))}] for the feature space "
            f"{name!r}, got {list(images.shape)}"
        )
    images = images.astype(np.float32)
    if not np.isfinite(images).all():
        bad = int((~np.isfinite(images)).any(axis=(1, 2, 3)).sum())
        raise ValueError(f"`images` has NaN or infinity in {bad} of {len(images)} images")
    return images


@functools.cache
def load_features(name: str) -> FeatureNetwork:
    """Loads a feature space that ships with the package.

    Args:
      name: `digits` (8x8x1), `mnist` or `fashion_mnist` (28x28x1).

    Returns:
      The network, with weights in float32.

    Raises:
      ValueError: If no feature space has that name.
    """
    if name not in SHIPPED:
        raise ValueError(f"unknown feature space {name!r}; choose one of {list(SHIPPED)}")
    return read_features(weight_path(name), name)


def read_features(path: str | os.PathLike, name: str) -> FeatureNetwork:
    """Reads a feature space from a file.

    Args:
      path: An `.npz` file of the result of `feature_training.stored_arrays`.
      name: Its name in reports.

    Returns:
      The network, with weights in float32.
    """
    with np.load(path, allow_pickle=False) as archive:
        return FeatureNetwork.of_arrays(dict(archive), name)


def weight_path(name: str) -> Path:
    """Returns the file next to this module that holds the weights of a feature space."""
    return Path(__file__).with_name(f"features_{name}.npz")


def weight_digest(arrays: dict[str, np.ndarray]) -> str:
    """Returns the SHA-256 of named arrays: names, shapes and values, in the order of the names."""
    digest = hashlib.sha256()
    for key in sorted(arrays):
        value = np.ascontiguousarray(arrays[key], dtype="<f4")
        digest.update(f"{key}{list(value.shape)}".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()
