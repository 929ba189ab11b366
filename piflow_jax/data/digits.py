"""The embedded data set: the 1,797 handwritten digits (8x8) that ship with scikit-learn.

They are the test part of E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits"
(UCI, 1998): 32x32 bitmaps whose 4x4 blocks were counted, so a pixel is an integer from 0 to 16.
"""

import functools
import importlib.util
from pathlib import Path

import numpy as np

from piflow_jax.data.source import ArraySource, labelled_pictures


@functools.cache
def load_digits_source() -> ArraySource:
    """Loads the digits.

    Returns:
      1,797 images float32[8, 8, 1], 0..16 scaled to [-1, 1], in scikit-learn's order; ten classes.
    """
    # Only the file is read: importing scikit-learn takes longer than importing JAX.
    package = Path(importlib.util.find_spec("sklearn").origin).parent
    table = np.loadtxt(package / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    pictures = (table[:, :-1].reshape(-1, 8, 8, 1) / 8.0 - 1.0).astype(np.float32)
    return labelled_pictures("digits", pictures, table[:, -1].astype(np.int32), 10)
