"""Trains a feature space on any labelled set of images, for measuring samples.

A small convolutional network learns to predict the class *and* to restore the clean image from a
shifted and noised one, with a penalty on correlated features. The features are its penultimate
layer, see `piflow_jax.evaluation.features`. Figures in such a space are comparable only between
systems that were measured with the same weights. Every report prints the digest of the weights.

`tools/train_features.py` made the spaces that ship with the package, and contains their figures.
The penalty on correlations is that of Barlow Twins (arXiv 2103.03230).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from piflow_jax.data import Source, batches
from piflow_jax.evaluation.area import area_averaged, sites_within
from piflow_jax.evaluation.features import penultimate
from piflow_jax.keys import seed_key

__all__ = ["Recipe", "forward", "logits", "recipe_for", "stored_arrays", "train_network"]

DIMENSION = 32
LONGEST_SIDE = 64  # of the network's input images; larger images are averaged down to it
BATCH = 128
PEAK_RATE = 3e-3
WEIGHT_DECAY = 1e-2
LABEL_SMOOTHING = 0.05
NOISE = 0.3  # largest standard deviation, in images of [-1, 1]
FEATURE_DROPOUT = 0.2
RESTORATION = 10.0  # weight of the mean squared error against the cross-entropy
DECORRELATION = 0.5  # weight of the squared correlations between features


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Shape and training of a feature network.

    Attributes:
      strides: stride of each convolution.
      widths: outputs of each convolution.
      max_shift: largest shift of an image in training, in pixels.
      steps: training steps.
      border: values beyond an image that is moved: `-1`, or the image's own edge for None.
      sites: `(h, w)` to which images are averaged first; None leaves images as they are.
    """

    strides: tuple[int, ...]
    widths: tuple[int, ...]
    max_shift: float
    steps: int = 1000
    border: float | None = None
    sites: tuple[int, int] | None = None


def recipe_for(shape: tuple[int, ...]) -> Recipe:
    """The recipe for images of a shape: it halves the sides until about 4x4 sites remain.

    Args:
      shape: `(H, W, C)`.

    Returns:
      The recipe; images with a side above 64 are averaged down to 64.
    """
    sites = sites_within(shape, LONGEST_SIDE)
    side = min(sites)
    halvings = max(round(math.log2(side / 4)), 0)
    layers = max(halvings, 3)
    strides = tuple(2 if layer < halvings else 1 for layer in range(layers))
    widths = (32, *(64,) * (layers - 1))
    return Recipe(strides=strides, widths=widths, max_shift=0.09 * side, sites=sites)


def _initial_parameters(key, shape, recipe: Recipe, classes: int):
    """Random weights: He-normal convolutions, LeCun-normal dense layers, zero biases."""
    widths, strides = recipe.widths, recipe.strides
    keys = iter(jax.random.split(key, len(widths) + 3))
    parameters = {}
    height, width, channels = shape
    for index, (out, stride) in enumerate(zip(widths, strides, strict=True)):
        kernel = jax.random.normal(next(keys), (3, 3, channels, out))
        parameters[f"conv{index}_kernel"] = kernel * np.sqrt(2 / (9 * channels))
        parameters[f"conv{index}_bias"] = jnp.zeros(out)
        height, width, channels = -(-height // stride), -(-width // stride), out
    flat, pixels = height * width * channels, int(np.prod(shape))
    for name, size, out in (
        ("dense", flat, DIMENSION),
        ("class", DIMENSION, classes),
        ("image", DIMENSION, pixels),
    ):
        parameters[f"{name}_kernel"] = jax.random.normal(next(keys), (size, out)) / np.sqrt(size)
        parameters[f"{name}_bias"] = jnp.zeros(out)
    return parameters


def _shifted(images, offsets, angles, log_scales, border: float | None):
    """Images [B, H, W, C] moved, rotated (radians) and scaled, bilinearly."""
    _, height, width, _ = images.shape
    rows, columns = jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij")
    centre = jnp.array([(height - 1) / 2, (width - 1) / 2])
    beyond = {"mode": "nearest"} if border is None else {"mode": "constant", "cval": border}

    def one(image, offset, angle, log_scale):
        y, x = rows - centre[0], columns - centre[1]
        cosine, sine = jnp.cos(angle), jnp.sin(angle)
        scale = jnp.exp(-log_scale)
        source_y = scale * (cosine * y - sine * x) + centre[0] - offset[0]
        source_x = scale * (sine * y + cosine * x) + centre[1] - offset[1]
        sample = functools.partial(jax.scipy.ndimage.map_coordinates, order=1, **beyond)
        channels = [sample(image[..., c], [source_y, source_x]) for c in range(image.shape[-1])]
        return jnp.stack(channels, axis=-1)

    return jax.vmap(one)(images, offsets, angles, log_scales)


def _augmented(key, images, recipe: Recipe):
    """Returns (noised, clean) views of images with small random shifts, rotations and scales."""
    keys = jax.random.split(key, 5)
    count, shift = len(images), recipe.max_shift
    clean = _shifted(
        images,
        jax.random.uniform(keys[0], (count, 2), minval=-shift, maxval=shift),
        jax.random.uniform(keys[1], (count,), minval=-0.2, maxval=0.2),
        jax.random.uniform(keys[2], (count,), minval=-0.1, maxval=0.1),
        recipe.border,
    )
    level = jax.random.uniform(keys[3], (count, 1, 1, 1), maxval=NOISE)
    return clean + level * jax.random.normal(keys[4], clean.shape), clean


def logits(parameters: Any, features: jax.Array) -> jax.Array:
    """Logits of the classification head.

    Args:
      parameters: parameters from `train_network`.
      features: `[B, D]`.

    Returns:
      `[B, classes]`.
    """
    return features @ parameters["class_kernel"] + parameters["class_bias"][None, :]


def train_network(
    source: Source,
    recipe: Recipe,
    seed: int = 0,
    on_step: Callable[[int], None] | None = None,
) -> Any:
    """Trains a feature network, including its heads.

    Args:
      source: labelled images `[H, W, C]` in [-1, 1], see `Source`.
      recipe: shape and training of the network.
      seed: root of all randomness.
      on_step: called with the number of each finished step.

    Returns:
      The parameters, see `penultimate`; `class_*` and `image_*` are the heads.
    """
    root = seed_key(seed)
    sites = recipe.sites or source.shape[:2]
    shape = (*sites, source.shape[2])
    parameters = _initial_parameters(root, shape, recipe, source.num_classes)
    rate = optax.warmup_cosine_decay_schedule(0.0, PEAK_RATE, recipe.steps // 20, recipe.steps)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=WEIGHT_DECAY)
    )

    def loss_fn(parameters, key, batch):
        view_key, drop_key = jax.random.split(key)
        noised, clean = _augmented(view_key, area_averaged(batch["x"], sites), recipe)
        features = penultimate(parameters, noised, recipe.strides)
        restored = features @ parameters["image_kernel"] + parameters["image_bias"][None, :]
        keep = jax.random.bernoulli(drop_key, 1 - FEATURE_DROPOUT, features.shape)
        predicted = logits(parameters, features * keep / (1 - FEATURE_DROPOUT))
        classes = jax.nn.one_hot(batch["condition"], source.num_classes)
        targets = optax.smooth_labels(classes, LABEL_SMOOTHING)
        error = jnp.mean((restored - clean.reshape(restored.shape)) ** 2)
        centred = features - features.mean(axis=0, keepdims=True)
        centred = centred / jnp.sqrt(jnp.mean(centred**2, axis=0, keepdims=True) + 1e-4)
        correlation = centred.T @ centred / len(centred)
        redundancy = jnp.sum((correlation - jnp.eye(DIMENSION)) ** 2) / DIMENSION
        cross_entropy = optax.softmax_cross_entropy(predicted, targets).mean()
        return cross_entropy + RESTORATION * error + DECORRELATION * redundancy

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(parameters, state, number, batch):
        key = jax.random.fold_in(jax.random.fold_in(root, 1), number)
        gradient = jax.grad(loss_fn)(parameters, key, batch)
        updates, state = optimizer.update(gradient, state, parameters)
        return optax.apply_updates(parameters, updates), state

    state = optimizer.init(parameters)
    stream = batches(source, batch_size=BATCH, seed=seed)
    for number in range(recipe.steps):
        parameters, state = step(parameters, state, number, next(stream))
        if on_step is not None:
            on_step(number + 1)
    return parameters


@functools.partial(jax.jit, static_argnames="recipe")
def forward(parameters: Any, images: jax.Array, recipe: Recipe):
    """Features before standardisation, compiled once per shape.

    Args:
      parameters: arrays by name, see `penultimate`.
      images: `[B, H, W, C]`.
      recipe: the recipe of the training.

    Returns:
      `[B, D]`.
    """
    averaged = area_averaged(images, recipe.sites or images.shape[1:3])
    return penultimate(parameters, averaged, recipe.strides)


def stored_arrays(
    parameters: Any, batches: Iterable[np.ndarray], recipe: Recipe
) -> dict[str, np.ndarray]:
    """The arrays to save of a network: its layers up to the features, and the standardisation.

    Args:
      parameters: parameters from `train_network`.
      batches: batches of images float32[N, H, W, C], over which features get mean 0 and variance 1.
      recipe: the recipe of the training.

    Returns:
      Arrays by name, weights in float16, for `FeatureNetwork.of_arrays`.
    """
    arrays = {
        name: np.asarray(value, np.float16)
        for name, value in parameters.items()
        if name.startswith(("conv", "dense"))
    }
    rounded = {name: jnp.asarray(value, jnp.float32) for name, value in arrays.items()}
    features, shape = [], ()
    for images in batches:
        features.append(np.asarray(forward(rounded, images, recipe), np.float64))
        shape = images.shape[1:]
    raw = np.concatenate(features)
    arrays["mean"] = raw.mean(axis=0).astype(np.float32)
    arrays["scale"] = raw.std(axis=0).astype(np.float32)
    arrays["shape"] = np.array(shape, np.int32)
    arrays["strides"] = np.array(recipe.strides, np.int32)
    if recipe.sites is not None:
        arrays["sites"] = np.array(recipe.sites, np.int32)
    return arrays
