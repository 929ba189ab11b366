"""Weights with the names of facebookresearch/DiT, which SiT and REPA also use.

The networks are those of `convert.dit` with other names, and with fused queries, keys and values.
Three orders are the same on both sides: the modulations (shift, scale, gate of attention, then of
the MLP; shift, scale of the output), the time features (cosines, then sines) and the output rows
(row, column, channel).

The *meaning* of the weights differs, and no shape shows it:

| weights | predict | time | load as |
| --- | --- | --- | --- |
| REPA | velocity noise - data, as here | 1 is noise, as here | "original_dit" |
| SiT | velocity data - noise | 1 is data | "original_sit" |
| DiT | noise of a discrete diffusion | integers up to 999 | "original_dit", `time_scale=1000` |

A DiT is therefore not a flow teacher, although it loads as one. SiT's time and sign are absorbed
into the weights exactly. `cos(f (1 - t))` and `sin(f (1 - t))` are rotations of `cos(f t)` and
`sin(f t)`, so the first layer of the time embedder is rotated, and the output layer is negated.
REPA checkpoints trained with the cosine path are not linear flows and cannot be used here.

Two differences from the original remain, and the pi-Flow release shares both. The norm before the
MLP adds 1e-5 to the variance where the original adds 1e-6. The fixed position table is computed
instead of read (averaging over a training run changes the stored table by rounding).

Source: DiT, arXiv 2212.09748; SiT, arXiv 2401.08740; REPA, arXiv 2410.06940.
"""

import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from piflow_jax.convert.dit import CLASS_EMBED, DIT, OUTPUT, PATCH_EMBED, POSITIONS, load_dit
from piflow_jax.convert.kinds import Kind
from piflow_jax.models.dit import DiT
from piflow_jax.models.layers import TIME_FEATURES
from piflow_jax.safetensors_files import LazyArray

TIME_IN = "t_embedder.mlp.0.weight"
# REPA's projections to the features of an image encoder; only its training loss needs them.
PROJECTORS = "projectors."

_LINEAR = {
    "x_embedder.proj": PATCH_EMBED,
    "t_embedder.mlp.0": "emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "emb.timestep_embedder.linear_2",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": OUTPUT,
}
_BLOCK_LINEAR = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
_QKV = "attn.qkv"
_CLASSES, _POSITIONS = "y_embedder.embedding_table.weight", "pos_embed"
_ALONE = {_CLASSES: CLASS_EMBED, _POSITIONS: POSITIONS}


def load_original_dit(
    state: Mapping[str, np.ndarray],
    *,
    time_scale: float = 1.0,
    turned: bool = False,
    **sizes: Any,
) -> tuple[DiT, dict]:
    """Loads a DiT, SiT or REPA checkpoint; see the module's table for the meaning of its weights.

    Predicted variances and REPA's projectors are dropped.

    Args:
        state: Arrays by name in the original repositories.
        time_scale: See `DiT`; 1 for REPA and SiT.
        turned: Converts a velocity network with data at t = 1 to one with data at t = 0, as
            everywhere here. If False, weights are loaded unchanged.
        **sizes: `num_heads` (16 in the XL and L networks), `sample_size` (32 for 256 pixels), and
            what else `load_dit` takes.

    Returns:
        The module, and `{"params": ...}` as JAX arrays with the dtypes of `state`.

    Raises:
        ValueError: Names or shapes do not match (the message lists all), a given size contradicts
            them, or `time_scale` is not 1 with `turned`.
    """
    state = {n: a for n, a in state.items() if not n.startswith(PROJECTORS)}
    _check_names(state)
    if turned:
        if time_scale != 1.0:
            raise ValueError(f"original_sit networks see t in [0, 1], got time_scale {time_scale}")
        _turn_time(state)
    return load_dit(DIT, _official_names(state), "", time_scale=time_scale, **sizes)


def _check_names(state: Mapping[str, np.ndarray]) -> None:
    """Lists missing and unexpected names, in the original's notation."""
    layers = [re.match(r"blocks\.(\d+)\.", name) for name in state]
    depth = 1 + max((int(match[1]) for match in layers if match), default=0)
    modules = list(_LINEAR)
    for i in range(depth):
        modules += [f"blocks.{i}.{name}" for name in (*_BLOCK_LINEAR, _QKV)]
    expected = [f"{name}.{which}" for name in modules for which in ("weight", "bias")] + [_CLASSES]
    problems = [f"missing {name}" for name in expected if name not in state]
    known = {*expected, _POSITIONS}
    problems += [f"unexpected {n} {np.shape(a)}" for n, a in state.items() if n not in known]
    if problems:
        raise ValueError("the state does not fit an original DiT:\n  " + "\n  ".join(problems))


def _turn_time(state: dict[str, np.ndarray]) -> None:
    """Rotates the time features by one unit of time and negates the output."""
    weight = np.asarray(state[TIME_IN])
    half = TIME_FEATURES // 2
    if weight.ndim != 2 or weight.shape[1] != TIME_FEATURES:
        raise ValueError(f"{TIME_IN} has shape {weight.shape}, expected [.., {TIME_FEATURES}]")
    unit = np.exp(-math.log(10000.0) * np.arange(half) / half)
    cos, sin = weight[:, :half].astype(np.float64), weight[:, half:].astype(np.float64)
    turned = [cos * np.cos(unit) + sin * np.sin(unit), cos * np.sin(unit) - sin * np.cos(unit)]
    state[TIME_IN] = np.concatenate(turned, axis=1).astype(weight.dtype)
    for which in ("weight", "bias"):
        state[f"final_layer.linear.{which}"] = -np.asarray(state[f"final_layer.linear.{which}"])


def _official_names(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Renames arrays, and splits fused queries, keys and values without reading them."""
    renamed = {}
    for name, array in state.items():
        module, _, which = name.rpartition(".")
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", module)
        if name in _ALONE:
            renamed[_ALONE[name]] = array
        elif block is None:
            renamed[f"{_LINEAR[module]}.{which}"] = array
        elif block[2] == _QKV:
            for i, piece in enumerate("qkv"):
                official = f"transformer_blocks.{block[1]}.attn1.to_{piece}.{which}"
                renamed[official] = _third(name, array, i)
        else:
            official = f"transformer_blocks.{block[1]}.{_BLOCK_LINEAR[block[2]]}.{which}"
            renamed[official] = array
    return renamed


def _third(name: str, array: np.ndarray, i: int) -> LazyArray:
    """Rows of queries, keys or values, copied so that the fused array can be freed."""
    shape = np.shape(array)
    if not shape or shape[0] % 3:
        raise ValueError(f"{name} has shape {shape}, expected a multiple of 3 rows")
    size = shape[0] // 3

    def read(index: tuple[slice, ...] = ()) -> np.ndarray:
        rows, *others = index or (slice(None),)
        start, stop, _ = rows.indices(size)
        return np.array(array[(slice(i * size + start, i * size + stop), *others)])

    at_once = getattr(array, "at_once", 1)
    return LazyArray((size, *shape[1:]), array.dtype, read, in_parts=True, at_once=at_once)


ORIGINAL_DIT = Kind(name="original_dit", mark=TIME_IN, load=load_original_dit, module=DiT)
ORIGINAL_SIT = Kind(
    name="original_sit",
    mark=TIME_IN,
    load=functools.partial(load_original_dit, turned=True),
    module=DiT,
)
