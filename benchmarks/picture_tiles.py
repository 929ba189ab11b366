"""A folder of small colour pictures: tiles of the two photographs that scikit-learn ships.

    python -m benchmarks.picture_tiles FOLDER

writes 1,000 tiles of 32x32 of each into a class folder of its own, as PNG. Tiles lie at random
places and have sides of 32 to 96 pixels before they are scaled down; the same folder comes of every
call. It is what the time of `configs/images.py:quick` was taken on.
"""

import argparse
from pathlib import Path

import numpy as np

SIDE, LARGEST = 32, 96


def write_tiles(folder: Path, per_class: int = 1000, seed: int = 0) -> None:
    """Writes the tiles of both photographs.

    Args:
      folder: where the class folders go.
      per_class: tiles of each photograph.
      seed: of their places and sizes.
    """
    from PIL import Image
    from sklearn.datasets import load_sample_image

    rng = np.random.default_rng(seed)
    for name in ("china", "flower"):
        picture = Image.fromarray(load_sample_image(f"{name}.jpg"))
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(per_class):
            side = int(rng.integers(SIDE, LARGEST + 1))
            left, top = (int(rng.integers(0, whole - side + 1)) for whole in picture.size)
            tile = picture.crop((left, top, left + side, top + side))
            tile.resize((SIDE, SIDE), Image.Resampling.BOX).save(folder / name / f"{index:04d}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", type=Path)
    write_tiles(parser.parse_args().folder)
