"""Digits that a prompt edits: image editing in small, with one reference image for each prompt.

The prompt says what to do with the reference, such as "move it up", and the image is the result.
Conditions have the keys of those of cached prompts (`prompts.py`).
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from piflow_jax.data.captions import Captioned
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


class EditedDigits(Captioned):
    """The digits, each with every edit; see `Captioned`.

    Example `i` applies edit `i mod 3` to reference `i // 3`.

    Args:
      x: `[N, H, W, C]` references, float32 in [-1, 1].

    Attributes:
      prompts: The prompt of each example.
      references: Number of reference images of an example.
    """

    references = 1

    def __init__(self, x: np.ndarray):
        super().__init__("edited_digits", x, EDITS)
        self.prompts = self.captions * len(x)

    def __len__(self) -> int:
        """Returns the number of examples."""
        return len(self.prompts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns one example: `x`, the edited image, its `condition`, and its `index`.

        The condition holds the prompt's embeddings and `references`, the digit in a tuple.
        """
        digit, edit = divmod(int(index), len(self.captions))
        reference, caption = self.x[digit], self.captions[edit]
        condition = self._condition(caption) | {"references": (reference,)}
        x = np.ascontiguousarray(EDITS[caption](reference))
        return {"x": x, "condition": condition, "index": np.int32(index)}


@functools.cache
def load_edited_digits_source() -> EditedDigits:
    """Loads the digits with their edits.

    Returns:
      5,391 images float32[8, 8, 1] in [-1, 1], each with the digit that it is made of.
    """
    return EditedDigits(load_digits_source().x)
