"""Digits that a prompt edits: image editing in small, with one reference image for each prompt.

The prompt says what to do with the reference, such as "move it up", and the image is the result.
Conditions have the keys of those of cached prompts (`prompts.py`).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from piflow_jax.data.captions import CAPTIONS, embedded_caption
from piflow_jax.data.digits import load_digits_source

__all__ = ["EDITS", "EditedDigits", "load_edited_digits_source"]


def _moved(image: np.ndarray, axis: int) -> np.ndarray:
    """The image two sites further towards the beginning of an axis, on its background of -1."""
    kept = image.take(range(2, image.shape[axis]), axis)
    added = [(0, 2 * (i == axis)) for i in range(image.ndim)]
    return np.pad(kept, added, constant_values=-1)


EDITS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "invert it": lambda image: -image,
    "move it up": lambda image: _moved(image, 0),
    "move it to the left": lambda image: _moved(image, 1),
}
"""What prompts do to images `[H, W, C]` in [-1, 1]."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class EditedDigits:
    """The digits, each with every edit; held in memory.

    Attributes:
      name: Short name for logs and reports.
      digits: float32[N, H, W, C] in [-1, 1], the references.
      captions: The edits' prompts; example `i` applies edit `i mod 3` to reference `i // 3`.
      text_length: Tokens that prompts are padded to, the length of the longest.
      null: The empty prompt: `text: float32[L, D]`, `text_length: int32[]` and `pooled:
        float32[P]`.
      references: Number of reference images of an example.
      text_features: Width `D` of the text embeddings.
      pooled_features: Width `P` of the pooled embedding.
    """

    name: str
    digits: np.ndarray
    captions: tuple[str, ...]
    text_length: int
    null: dict[str, np.ndarray]
    references: int = 1
    text_features: int = CAPTIONS.text_features
    pooled_features: int = CAPTIONS.pooled_features

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape `(H, W, C)` of one image."""
        return self.digits.shape[1:]

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompt of each example."""
        return self.captions * len(self.digits)

    @property
    def buckets(self) -> list[tuple[int, int]]:
        """Shapes `(H, W)` that images have: one."""
        return [self.digits.shape[1:3]]

    def __len__(self) -> int:
        """Returns the number of examples."""
        return len(self.digits) * len(self.captions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns one example: `x`, the edited image, its `condition`, and its `index`.

        The condition holds the prompt's embeddings and `references`, the digit in a tuple.
        """
        digit, edit = divmod(int(index), len(self.captions))
        reference, caption = self.digits[digit], self.captions[edit]
        condition = embedded_caption(caption, self.text_length) | {"references": (reference,)}
        x = np.ascontiguousarray(EDITS[caption](reference))
        return {"x": x, "condition": condition, "index": np.int32(index)}


@functools.cache
def load_edited_digits_source() -> EditedDigits:
    """Loads the digits with their edits.

    Returns:
      5,391 images float32[8, 8, 1] in [-1, 1], each with the digit that it is made of.
    """
    captions = tuple(EDITS)
    length = max(len(CAPTIONS([caption])[0]["text"]) for caption in captions)
    return EditedDigits(
        name="edited_digits",
        digits=load_digits_source().x,
        captions=captions,
        text_length=length,
        null=embedded_caption("", length),
    )
