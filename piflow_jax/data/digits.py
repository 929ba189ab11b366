"""The embedded data set: the 1,797 handwritten digits (8x8) that ship with scikit-learn.

They are the test part of E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits"
(UCI, 1998): 32x32 bitmaps whose 4x4 blocks were counted, so a pixel is an integer from 0 to 16.
"""

import functools

import numpy as np

from piflow_jax.data.source import ArraySource, labelled_pictures


@functools.cache
def load_digits_source() -> ArraySource:
    """Loads the digits.

    Returns:
      1,797 images float32[8, 8, 1], 0..16 scaled to [-1, 1], in scikit-learn's order; ten classes.
    """
    from sklearn.datasets import load_digits  # imports SciPy: seconds on a cold disk

    digits = load_digits()
    pictures = (digits.images[..., None] / 8.0 - 1.0).astype(np.float32)
    return labelled_pictures("digits", pictures, digits.target.astype(np.int32), 10)
