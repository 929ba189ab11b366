"""IDX files, the format of MNIST and Fashion-MNIST."""

import gzip
import math
import zlib

import numpy as np
from etils import epath

from piflow_jax.arguments import prefixed

__all__ = ["find_idx", "read_idx"]

_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def find_idx(folder: epath.Path, split: str) -> tuple[epath.Path, epath.Path] | None:
    """The files of a split's images and labels.

    Args:
      folder: where they lie, compressed or not.
      split: `train` or `t10k`.

    Returns:
      The paths of `SPLIT-images-idx3-ubyte` and `SPLIT-labels-idx1-ubyte`, which may end in `.gz`;
      None if one of them is not there.
    """
    found = []
    for name in (f"{split}-images-idx3-ubyte", f"{split}-labels-idx1-ubyte"):
        # Some tools write a dot in the place of the second dash.
        names = (name, f"{name}.gz", name.replace("-idx", ".idx"))
        found.append(next((p for n in names if (p := folder / n).exists()), None))
    return None if None in found else tuple(found)


def read_idx(path: epath.Path) -> np.ndarray:
    """Reads an IDX file.

    Args:
      path: the file; one that is gzipped is decompressed, whatever its name.

    Returns:
      The array, of the shape in the file's header, in the byte order of this machine.

    Raises:
      ValueError: the file is damaged, cut short or no IDX; the message has its path.
    """
    content = path.read_bytes()
    faults = (EOFError, IndexError, OSError, ValueError, zlib.error)
    with prefixed(f"{path} is damaged", faults):
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        zeros, kind, dimensions = content[:2], content[2], content[3]
        if zeros != b"\0\0" or kind not in _TYPES:
            raise ValueError(f"it begins with {content[:4].hex(' ')}, which no IDX file does")
        shape = np.frombuffer(content, ">u4", dimensions, 4).tolist()
        dtype = np.dtype(_TYPES[kind])
        values, start = math.prod(shape), 4 + 4 * dimensions
        if len(content) - start != values * dtype.itemsize:
            raise ValueError(
                f"its header says {shape}, {values * dtype.itemsize} bytes; it has "
                f"{len(content) - start}"
            )
    array = np.frombuffer(content, dtype, values, start).reshape(shape)
    return array.astype(dtype.newbyteorder("="))
