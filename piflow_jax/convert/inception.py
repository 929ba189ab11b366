"""Weights of the Inception network of FID with the names of its PyTorch port."""

import hashlib
import os
from collections.abc import Mapping

import numpy as np

from piflow_jax.buckets import is_file
from piflow_jax.convert.files import open_weights, readable
from piflow_jax.convert.kinds import Kind
from piflow_jax.convert.rules import Rule, import_state
from piflow_jax.models.inception import POOL_FEATURES, InceptionV3, convolutions

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_URL = (
    f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION_FILE}"
)

_NORM = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "variance"}


def inception_rules(module: InceptionV3) -> list[Rule]:
    """The table for the network; it covers every parameter once."""
    classes = {"o": module.num_classes}
    rules = [
        Rule(("fc.weight",), ("fc_kernel",), "o i -> i o", {**classes, "i": POOL_FEATURES}),
        Rule(("fc.bias",), ("fc_bias",), "o -> o", classes),
    ]
    for path, width, conv in convolutions():
        name = ".".join(path)
        height, breadth = conv.kernel
        sizes = {"o": conv.features, "i": width, "h": height, "w": breadth}
        kernel = Rule((f"{name}.conv.weight",), (*path, "kernel"), "o i h w -> h w i o", sizes)
        rules.append(kernel)
        for official, ours in _NORM.items():
            vector = {"o": conv.features}
            rules.append(Rule((f"{name}.bn.{official}",), (*path, ours), "o -> o", vector))
    return rules


def load_inception(state: Mapping[str, np.ndarray]) -> tuple[InceptionV3, dict]:
    """Loads the network; shapes show the number of classes.

    Args:
        state: Arrays by official name. `num_batches_tracked`, counters that inference does not use,
            are left out.

    Returns:
        The module, and `{"params": ...}` as JAX arrays with the dtypes of `state`.

    Raises:
        ValueError: Names, shapes or dtypes do not match (the message lists the faults), or numbers
            are not finite.
    """
    state = {n: array for n, array in state.items() if not n.endswith(".num_batches_tracked")}
    classes = np.shape(state["fc.bias"])[0] if np.ndim(state.get("fc.bias")) else 1008
    module = InceptionV3(num_classes=classes)
    return module, {"params": import_state(state, inception_rules(module))}


def read_inception(path: str | os.PathLike) -> tuple[Mapping[str, np.ndarray], str]:
    """Opens the published weight file; needs PyTorch.

    Args:
        path: The file.

    Returns:
        Its arrays (read on use), for `load_torch_state(state, "inception")`, and the SHA-256 of its
        bytes. The hash of the published file begins with the digits at the end of its name.

    Raises:
        FileNotFoundError: The file is missing; the message says where to get it.
        ValueError: The file is damaged.
    """
    path = readable(path)
    if not is_file(path):
        raise FileNotFoundError(
            f"no Inception weights at {path}: download {INCEPTION_URL} (91 MB) and put it there"
        )
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return open_weights(path, select=""), digest


INCEPTION = Kind(
    name="inception",
    mark="Mixed_5b.branch1x1.conv.weight",
    load=load_inception,
    module=InceptionV3,
    rules=inception_rules,
)
