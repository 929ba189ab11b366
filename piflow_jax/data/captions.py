"""Digits with captions: text-to-image in small, on embeddings that are made here.

A caption is a few words that name the digit, such as "a handwritten seven". Its embeddings are
those of `WordEncoder`. Conditions have the keys of those of cached prompts (`prompts.py`).
"""

import dataclasses
import functools

import numpy as np

from piflow_jax.data.digits import load_digits_source
from piflow_jax.data.source import stacked
from piflow_jax.data.text_encoders import WordEncoder

__all__ = ["CaptionedDigits", "embedded_caption", "load_captioned_digits_source"]

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_FORMS = ("{}", "a {}", "the digit {}", "a handwritten {}", "a drawing of a {}")
CAPTIONS = WordEncoder(text_features=24, pooled_features=16)
"""The encoder of captions of digits."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class CaptionedDigits:
    """The digits, each with a caption; held in memory.

    Attributes:
      name: Short name for logs and reports.
      x: float32[N, H, W, C] in [-1, 1], the images.
      labels: int32[N], the digits.
      captions: N captions.
      text_length: Tokens that captions are padded to, the length of the longest.
      null: Example of the empty caption, without an image: `text: float32[L, D]`, `text_length:
        int32[]` and `pooled: float32[P]`.
      num_classes: Number of digits, ten.
      text_features: Width `D` of the text embeddings.
      pooled_features: Width `P` of the pooled embedding.
    """

    name: str
    x: np.ndarray
    labels: np.ndarray
    captions: tuple[str, ...]
    text_length: int
    null: dict[str, np.ndarray]
    num_classes: int = len(_DIGITS)
    text_features: int = CAPTIONS.text_features
    pooled_features: int = CAPTIONS.pooled_features

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape `(H, W, C)` of one image."""
        return self.x.shape[1:]

    @property
    def prompts(self) -> tuple[str, ...]:
        """The captions, as they are called where they are drawn from."""
        return self.captions

    @property
    def buckets(self) -> list[tuple[int, int]]:
        """Shapes `(H, W)` that images have: one."""
        return [self.x.shape[1:3]]

    def __len__(self) -> int:
        """Returns the number of examples."""
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Returns one example: `x`, the image, its caption's embeddings and its `index`."""
        caption = embedded_caption(self.captions[index], self.text_length)
        return {"x": self.x[index], "condition": caption, "index": np.int32(index)}

    def of_classes(self) -> dict[str, np.ndarray]:
        """Examples of one caption of each class, stacked; without images.

        Returns:
          `text: float32[10, L, D]`, `text_length: int32[10]` and `pooled: float32[10, P]`.
        """
        return stacked(
            [embedded_caption(_FORMS[3].format(digit), self.text_length) for digit in _DIGITS]
        )


@functools.cache
def _embedded(caption: str) -> dict[str, np.ndarray]:
    return CAPTIONS([caption])[0]


def embedded_caption(caption: str, length: int) -> dict[str, np.ndarray]:
    """A caption as a condition.

    Args:
      caption: The caption.
      length: Tokens that it is padded to.

    Returns:
      `text: float32[length, D]`, `text_length: int32[]` and `pooled: float32[P]`.
    """
    embedding = _embedded(caption)
    tokens = embedding["text"]
    text = np.zeros((length, tokens.shape[1]), np.float32)
    text[: len(tokens)] = tokens
    return {"text": text, "text_length": np.int32(len(tokens)), "pooled": embedding["pooled"]}


@functools.cache
def load_captioned_digits_source() -> CaptionedDigits:
    """Loads the digits with their captions.

    Returns:
      1,797 images float32[8, 8, 1] in [-1, 1]; image `i` has form `i mod 5` of the captions of its
      digit.
    """
    digits = load_digits_source()
    captions = tuple(
        _FORMS[i % len(_FORMS)].format(_DIGITS[label]) for i, label in enumerate(digits.condition)
    )
    length = max(len(_embedded(caption)["text"]) for caption in captions)
    return CaptionedDigits(
        name="captioned_digits",
        x=digits.x,
        labels=digits.condition,
        captions=captions,
        text_length=length,
        null=embedded_caption("", length),
    )
