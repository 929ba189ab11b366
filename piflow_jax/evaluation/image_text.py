"""Image and text features of released PyTorch networks, and figures computed from them.

CLIP (A. Radford et al., arXiv 2103.00020) measures how well a picture fits its prompt. CLIP or
DINOv2 (M. Oquab et al., arXiv 2304.07193) measures how much pictures of one prompt differ. The
networks are loaded by `transformers`, from folders on this machine; it comes with the extra `text`.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from piflow_jax import hub
from piflow_jax.data.torch_parts import files_digest, load_network, load_part, read_kind
from piflow_jax.evaluation.checks import check_same_dimension, checked_features

__all__ = ["ImageNetwork", "clip_similarity", "load_image_network", "prompt_diversity"]

_CLIP = "clip"


class ImageNetwork:
    """A released network from its folder; made by `load_image_network`.

    Pictures are preprocessed as in its `preprocessor_config.json`: the shorter side is resized with
    Pillow's bicubic filter, the centre is cut out, and channels are standardised.

    Attributes:
      name: Kind of network and name of the folder.
      digest: SHA-256 of the folder's weights and settings.
      reads_text: Whether it also has text features.
    """

    def __init__(self, folder: Path, kind: str, device: str):
        import torch
        import transformers

        self._torch, self._device = torch, device
        self.name = f"{kind} {folder.name}"
        self.digest = files_digest(folder)
        self.reads_text = kind == _CLIP
        load = transformers.CLIPModel if self.reads_text else transformers.AutoModel
        self._network = load_network(
            load, folder, dtype="float32", device=device, unused=("pooler.",)
        )
        if self.reads_text:
            self._tokens = load_part(transformers.AutoTokenizer, folder)
        settings = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        self._resize = _side(settings["size"], "shortest_edge")
        self._crop = _side(settings.get("crop_size", self._resize), "height")
        self._mean = np.array(settings["image_mean"], np.float32)
        self._std = np.array(settings["image_std"], np.float32)

    def image_features(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Features of pictures.

        Args:
          images: Arrays uint8[H, W, 3] of any size.

        Returns:
          float32[N, D], normalised to length 1.
        """
        pixels = np.stack([self._pixels(image) for image in images]).transpose(0, 3, 1, 2)
        with self._torch.inference_mode():
            batch = self._torch.from_numpy(np.ascontiguousarray(pixels)).to(self._device)
            if self.reads_text:
                pooled = self._network.vision_model(pixel_values=batch).pooler_output
                features = self._network.visual_projection(pooled)
            else:
                features = self._network(pixel_values=batch).last_hidden_state[:, 0]
        return _unit(features.float().cpu().numpy())

    def text_features(self, prompts: Sequence[str]) -> np.ndarray:
        """Features of prompts; CLIP reads their first 77 tokens.

        Args:
          prompts: The prompts.

        Returns:
          float32[N, D], normalised to length 1.

        Raises:
          ValueError: If the network does not read text.
        """
        if not self.reads_text:
            raise ValueError(f"{self.name} reads no text; CLIP does")
        tokens = self._tokens(
            list(prompts),
            padding=True,
            truncation=True,
            max_length=self._network.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self._device)
        with self._torch.inference_mode():
            pooled = self._network.text_model(
                input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
            ).pooler_output
            features = self._network.text_projection(pooled)
        return _unit(features.float().cpu().numpy())

    def _pixels(self, image: np.ndarray) -> np.ndarray:
        """A picture as float32[crop, crop, 3], standardised."""
        from PIL import Image

        picture = Image.fromarray(image)
        scale = self._resize / min(picture.size)
        size = tuple(max(round(side * scale), self._crop) for side in picture.size)
        pixels = np.asarray(picture.resize(size, Image.Resampling.BICUBIC), np.float32) / 255
        top, left = ((side - self._crop) // 2 for side in pixels.shape[:2])
        pixels = pixels[top : top + self._crop, left : left + self._crop]
        return (pixels - self._mean) / self._std


def load_image_network(folder: str | os.PathLike) -> ImageNetwork:
    """Loads a network.

    Args:
      folder: A release of CLIP, DINOv2 or a vision transformer in the layout of `transformers`,
        with its `preprocessor_config.json`, or its name on the Hugging Face hub.

    Returns:
      The network, in float32, on the first GPU, or on the CPU if there is none.

    Raises:
      FileNotFoundError: There is no such folder.
      ImportError: PyTorch or `transformers` is not installed.
      ValueError: The folder does not hold such a release.
    """
    folder = Path(hub.local(folder) if hub.is_name(folder) else folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder of an image network")
    with hub.remedied(folder, ValueError):
        return _loaded(folder)


def _loaded(folder: Path) -> ImageNetwork:
    for name in ("config.json", "preprocessor_config.json"):
        if not (folder / name).exists():
            raise ValueError(f"{folder} is not of a released image network: it has no {name}")
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"{folder}: image networks need PyTorch and transformers, "
            "pip install 'piflow_jax[text]'"
        ) from error
    kind = read_kind(folder / "config.json", "model_type")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return ImageNetwork(folder, kind, device)
    # This covers its preprocessor's settings; errors in its other files explain themselves.
    except (
        *(AttributeError, KeyError, OSError, RecursionError, TypeError, UnicodeError),
        json.JSONDecodeError,
    ) as error:
        raise ValueError(f"{folder} is not of a released image network: {error!r}") from error


def clip_similarity(image_features: ArrayLike, text_features: ArrayLike) -> float:
    """Mean cosine between each picture's features and its prompt's features.

    Args:
      image_features: [N, D].
      text_features: [N, D], features of the pictures' prompts, row by row.

    Returns:
      The mean, in [-1, 1].

    Raises:
      ValueError: If shapes do not match, or a value is NaN or infinite.
    """
    images = checked_features(image_features, "image_features", minimum=1)
    texts = checked_features(text_features, "text_features", minimum=1)
    check_same_dimension(images, texts, ("image_features", "text_features"))
    if len(images) != len(texts):
        raise ValueError(f"{len(images)} pictures have {len(texts)} prompts")
    return float(np.sum(_unit(images) * _unit(texts), axis=1).mean())


def prompt_diversity(features: ArrayLike, places: ArrayLike) -> float:
    """Mean dissimilarity of two pictures of the same prompt, averaged over prompts.

    This is the figure of OneIG-Bench (arXiv 2506.07977, section 3.2) with another dissimilarity:
    DreamSim there, one minus the cosine of the given features here.

    Args:
      features: [N, D].
      places: Integers [N], the place of each picture's prompt. Prompts with one picture are left
        out.

    Returns:
      The mean over prompts of the mean over their pairs, in [0, 2].

    Raises:
      ValueError: If shapes do not match, a value is NaN or infinite, or no prompt has two pictures.
    """
    features = _unit(checked_features(features, "features"))
    places = np.asarray(places)
    if places.shape != features.shape[:1]:
        raise ValueError(f"{len(features)} pictures have places {list(places.shape)}")
    means = []
    for place in np.unique(places):
        members = features[places == place]
        count = len(members)
        if count > 1:
            # Sum over ordered pairs of distinct members.
            cosines = np.square(members.sum(axis=0)).sum() - count
            means.append(1 - cosines / (count * (count - 1)))
    if not means:
        raise ValueError("no prompt has two pictures, so there is no pair to compare")
    return float(np.mean(means))


def _unit(features: np.ndarray) -> np.ndarray:
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def _side(size: int | dict[str, int], key: str) -> int:
    """A side from settings; old releases give it as a plain number."""
    return size if isinstance(size, int) else size.get(key, size.get("height"))
