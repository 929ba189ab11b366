"""Access to the reference vectors: `tests/golden/`, or the whole set beside the repository."""

import functools
import json
from pathlib import Path

import jax
import numpy as np

from piflow_jax.convert import load_torch_state

HERE = Path(__file__).parent / "golden"
SHARED = Path(__file__).parents[2] / "shared" / "golden"


@functools.cache
def _cases() -> dict[str, dict]:
    cases = {}
    for folder in (SHARED, HERE):
        index = folder / "cases.json"
        if index.exists():
            cases |= {case["file"]: case for case in json.loads(index.read_text())["cases"]}
    return cases


def names(prefix: str) -> list[str]:
    """File names of the available vectors that start with `prefix`, sorted."""
    found = {p.name for folder in (HERE, SHARED) for p in folder.glob(f"{prefix}*.npz")}
    return sorted(found)


def load(name: str) -> tuple[dict, dict[str, np.ndarray]]:
    """The parameters of a case and its arrays, in the reference's channels-first layout."""
    path = HERE / name
    if not path.exists():
        path = SHARED / name
    with np.load(path) as arrays:
        return _cases()[name]["params"], dict(arrays)


def network(kind: str, file: str, time_scale: float):
    """The module and variables of the weights in a file, in the precision of the moment."""
    return _network(kind, file, float(time_scale), jax.config.jax_enable_x64)


@functools.cache
def _network(kind, file, time_scale, x64):
    del x64  # arrays are made in the precision that is enabled
    sizes, arrays = load(file)
    state = {key[3:]: array for key, array in arrays.items() if key.startswith("sd/")}
    return load_torch_state(
        state,
        kind,
        num_heads=sizes["num_attention_heads"],
        sample_size=sizes["sample_size"],
        time_scale=time_scale,
    )


def sites_last(x: np.ndarray, batch_axes: int = 1) -> np.ndarray:
    """`[*batch, C, *sites]` of the reference to our `[*batch, *sites, C]`."""
    return np.moveaxis(x, batch_axes, -1)


def mixture_last(x: np.ndarray, batch_axes: int = 1) -> np.ndarray:
    """`[*batch, K, C, *sites]` of the reference to our `[*batch, *sites, K, C]`."""
    return np.moveaxis(x, (batch_axes, batch_axes + 1), (-2, -1))
