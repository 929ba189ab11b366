"""Digits with captions: text-to-image in small, on embeddings that are made here.

A caption is a few words that name the digit, such as "a handwritten seven". Its embeddings are
those of `WordEncoder`. Conditions have the keys of those of cached prompts (`prompts.py`).
"""

import functools
from collections.abc import Iterable

import numpy as np

from piflow_jax.data.digits import load_digits_source
from piflow_jax.data.source import stacked
from piflow_jax.data.text_encoders import WordEncoder

__all__ = ["Captioned", "CaptionedDigits", "load_captioned_digits_source"]

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_FORMS = ("{}", "a {}", "the digit {}", "a handwritten {}", "a drawing of a {}")
CAPTIONS = WordEncoder(text_features=24, pooled_features=16)
"""The encoder of captions of digits."""


class Captioned:
    """Pictures of one size with a caption each; held in memory.

    Args:
      name: Short name for logs and reports.
      x: `[N, H, W, C]` pictures, float32 in [-1, 1].
      captions: The captions that there are.

    Attributes:
      name: The name.
      x: The pictures.
      captions: The captions.
      text_length: Tokens that captions are padded to, the length of the longest.
      null: The empty caption: `text: float32[L, D]`, `text_length: int32[]` and `pooled:
        float32[P]`.
      shape: Shape `(H, W, C)` of one picture.
      buckets: Shapes `(H, W)` that pictures have: one.
      text_features: Width `D` of the text embeddings.
      pooled_features: Width `P` of the pooled embedding.
    """

    text_features = CAPTIONS.text_features
    pooled_features = CAPTIONS.pooled_features

    def __init__(self, name: str, x: np.ndarray, captions: Iterable[str]):
        self.name, self.x, self.captions = name, x, tuple(captions)
        self.shape, self.buckets = x.shape[1:], [x.shape[1:3]]
        self.text_length = max(len(_embedded(caption)["text"]) for caption in self.captions)
        self.null = self._condition("")

    def _condition(self, caption: str) -> dict[str, np.ndarray]:
        """A caption as a condition, like `null`."""
        embedding = _embedded(caption)
        tokens = embedding["text"]
        text = np.zeros((self.text_length, tokens.shape[1]), np.float32)
        text[: len(tokens)] = tokens
        return {"text": text, "text_length": np.int32(len(tokens)), "pooled": embedding["pooled"]}


class CaptionedDigits(Captioned):
    """The digits, each with a caption; see `Captioned`.

    Args:
      x: `[N, H, W, C]` pictures, float32 in [-1, 1].
      labels: `[N]` digits, int32.

    Attributes:
      labels: The digits.
      prompts: The captions, as they are called where they are drawn from.
      num_classes: Number of digits, ten.
    """

    num_classes = len(_DIGITS)

    def __init__(self, x: np.ndarray, labels: np.ndarray):
        forms = (_FORMS[i % len(_FORMS)].format(_DIGITS[label]) for i, label in enumerate(labels))
        super().__init__("captioned_digits", x, forms)
        self.labels, self.prompts = labels, self.captions

    def __len__(self) -> int:
        """Returns the number of examples."""
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Returns one example: `x`, the image, its caption's embeddings and its `index`."""
        caption = self._condition(self.captions[index])
        return {"x": self.x[index], "condition": caption, "index": np.int32(index)}

    def of_classes(self) -> dict[str, np.ndarray]:
        """Examples of one caption of each class, stacked; without images.

        Returns:
          `text: float32[10, L, D]`, `text_length: int32[10]` and `pooled: float32[10, P]`.
        """
        return stacked([self._condition(_FORMS[3].format(digit)) for digit in _DIGITS])


@functools.cache
def _embedded(caption: str) -> dict[str, np.ndarray]:
    return CAPTIONS([caption])[0]


@functools.cache
def load_captioned_digits_source() -> CaptionedDigits:
    """Loads the digits with their captions.

    Returns:
      1,797 images float32[8, 8, 1] in [-1, 1]; image `i` has form `i mod 5` of the captions of its
      digit.
    """
    digits = load_digits_source()
    return CaptionedDigits(digits.x, digits.condition)
