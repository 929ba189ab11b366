"""What the page draws, taken apart."""

import base64
import io
import re

import numpy as np
from PIL import Image


def drawn(generator):
    """What a generator of a drawer returns."""
    while True:
        try:
            next(generator)
        except StopIteration as end:
            return end.value


def films(text):
    """The pictures in HTML, in order, uint8[H, W, 3] each."""
    found = re.findall(r"url\(data:image/png;base64,([^)]*)\)", text)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(one)))) for one in found]
