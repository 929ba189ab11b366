"""Weight files of PyTorch releases, opened lazily: names and shapes first, then single tensors.

Source: layouts of the pi-Flow release (arXiv 2510.14974) and of facebookresearch/DiT checkpoints.
"""

import argparse
import contextlib
import json
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from absl import logging
from etils import epath

from piflow_jax import hub
from piflow_jax.arguments import prefixed
from piflow_jax.buckets import fetcher, is_file, is_remote
from piflow_jax.convert.float8 import with_scales
from piflow_jax.convert.rules import listed
from piflow_jax.safetensors_files import LazyArray, check_here, open_safetensors
from piflow_jax.whole_files import reading, visible

INDEX = ".safetensors.index.json"
PICKLES = (".pth", ".pt", ".bin", ".ckpt")
_ENDINGS = (INDEX, ".safetensors", *PICKLES)

# Wrappers that training puts around a network. The first kind also wraps parts of it.
_INNER_WRAPPER = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_WRAPPER = "module."
# mmcv checkpoints of pi-Flow hold several networks: the diffusion, its average and sometimes the
# teacher. Those of ema-pytorch hold the average and the averaged network.
_NETWORK = re.compile(r"(?:.+\.)?denoising\.|(?:ema|online)_model\.")
# Parts that are averages, with the parts that they average.
_AVERAGES = {
    "ema": "model",
    "diffusion_ema.denoising.": "diffusion.denoising.",
    "ema_model.": "online_model.",
}
_SHARD = re.compile(r"-\d+-of-\d+\.safetensors")


class Weights(dict[str, LazyArray]):
    """Lazily read arrays by name, in the order of the file; made by `open_weights`.

    Attributes:
        path: The file or directory.
        metadata: Text that the file contains in addition to its tensors. Released pi-Flow students
            store their policy's settings there, as JSON under `policy_config`.
        selected: The selected part of a file with several networks, "" for the whole file.
    """

    def __init__(
        self,
        path: epath.Path,
        arrays: Mapping[str, LazyArray],
        metadata: Mapping[str, str],
        selected: str = "",
    ):
        super().__init__(arrays)
        self.path = path
        self.metadata = dict(metadata)
        self.selected = selected

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the array called `name`, without reading it."""
        return self[name].shape


def open_weights(
    path: str | os.PathLike, select: str | None = None, part: str = hub.NETWORK[0]
) -> Weights:
    """Opens a weight file without reading its tensors.

    Checkpoints of training runs hold several networks. Averaged weights are preferred, and the
    choice is logged: `ema` in DiT, SiT and REPA checkpoints (`{"model", "ema", "opt", "args"}`),
    `diffusion_ema.denoising` in pi-Flow's, `ema_model` in ema-pytorch's. The prefix of the chosen
    part and wrappers such as `module.` and `_orig_mod.` are removed. Float8 weights are multiplied
    by their scales.

    Args:
        path: A `.safetensors` file; an index `*.safetensors.index.json` of shards; a `.pth`, `.pt`,
            `.bin` or `.ckpt` file of PyTorch; or a directory with exactly one of these. The path
            may be in a bucket (`gs://...`): `.safetensors` is then read by ranges of bytes, and
            files of PyTorch are first copied to a temporary directory. It may be a name on the
            Hugging Face hub (`hf:owner/name`), of files in the hub's cache.
        select: The part to take from a file with several: a key such as "model", or a prefix of
            names such as "diffusion.denoising" or "teacher.denoising". "" takes all arrays under
            their own names.
        part: The folder to take from a pipeline of `diffusers`, a directory with a
            `model_index.json`; it comes before weights that lie beside it.

    Returns:
        The arrays by name. Arrays of a PyTorch file are mapped from the disk (or held in memory, if
        the file is older than PyTorch 1.6). Both kinds are copied when they are read.

    Raises:
        FileNotFoundError: There is no such file, or a shard of an index is missing.
        OSError: The bucket cannot be read; the message says why and gives the remedy.
        ValueError: The file is damaged or of an unknown kind, or holds Python objects that could
            run code, several parts without an obvious choice, or averages without names.
        ImportError: The file is PyTorch's, and PyTorch is not installed.
    """
    path = readable(path)
    with hub.remedied(path):
        path = _one_file(path, part)
        if path.name.endswith(INDEX):
            parts, metadata = _open_index(path)
        elif path.suffix == ".safetensors":
            parts, metadata = open_safetensors(path)
        elif path.suffix in PICKLES:
            parts, metadata = _open_pickle(path), {}
        else:
            known = ", ".join((".safetensors", INDEX, *PICKLES))
            raise ValueError(f"{path}: unknown kind of weight file, known are {known}")
    arrays, selected = _select(path, parts, select)
    with prefixed(path):
        return Weights(path, arrays if select == "" else with_scales(arrays), metadata, selected)


def holds_weights(path: str | os.PathLike) -> bool:
    """Whether there is anything for `open_weights` to open.

    Args:
        path: Any path.

    Returns:
        Whether the path is a file, or a folder that contains a weight file.
    """
    path = readable(path)
    if not path.is_dir():
        return path.exists()
    return any(p.name.endswith(_ENDINGS) and is_file(p) for p in visible(path))


def readable(path: str | os.PathLike) -> epath.Path:
    """Returns a path after checking that its bucket, if it has one, can be read.

    Args:
        path: Any path, whether or not it exists, or a name on the Hugging Face hub.

    Returns:
        The path; of a name, its place in the hub's cache.

    Raises:
        FileNotFoundError: The hub's cache does not have it; the message gives the remedy.
        ValueError: gcsfs or huggingface_hub is missing; the message gives the remedy.
        OSError: The bucket cannot be read; the message says why and gives the remedy.
    """
    if hub.is_name(path):
        return epath.Path(hub.local(path))
    if is_remote(path):
        with contextlib.suppress(FileNotFoundError):  # the caller, which knows more, reports this
            fetcher(path)
    return epath.Path(path)


def _one_file(path: epath.Path, part: str) -> epath.Path:
    """The weight file of a path: the path itself, or the only one in it or in a pipeline's part."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such weight file or directory")
    if not path.is_dir():
        if not is_file(path):
            raise ValueError(f"{path} is not a regular file")
        return path
    # What lies beside a pipeline's parts is often the same network under its first names.
    if is_file(path / "model_index.json") and holds_weights(path / part):
        return _one_file(path / part, part)
    for endings in ((INDEX,), (".safetensors",), PICKLES):
        found = [p for p in visible(path) if p.name.endswith(endings) and is_file(p)]
        if all(_SHARD.search(p.name) for p in found) and found:
            raise ValueError(f"{path} holds shards and no index, *{INDEX}: fetch that too")
        if len(found) > 1:
            names = ", ".join(p.name for p in found)
            raise ValueError(f"{path} holds several weight files, name one of: {names}")
        if found:
            return found[0]
    inside = [p.name for p in visible(path) if p.is_dir() and holds_weights(p)]
    # The network comes before the other parts of its pipeline.
    inside.sort(key=lambda name: not name.startswith("transformer"))
    hint = "".join(f"{', ' if i else '; look in '}{name}/" for i, name in enumerate(inside))
    raise FileNotFoundError(f"{path}: a directory without weight files{hint}")


def _open_index(path: epath.Path) -> tuple[dict[str, LazyArray], dict[str, str]]:
    """Opens the shards that an index names."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        where = {str(name): str(shard) for name, shard in index["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is no index of shards: {error!r}") from error
    shards = sorted(set(where.values()))
    outside = [shard for shard in shards if epath.Path(shard).name != shard]
    if outside:
        raise ValueError(f"{path} names shards outside its own directory: {outside}")
    absent = [shard for shard in shards if not is_file(path.parent / shard)]
    if absent:
        raise FileNotFoundError(f"{path}: missing shards {', '.join(absent)}")
    arrays, metadata, problems = {}, {}, []
    for shard in shards:
        found, shard_metadata = open_safetensors(path.parent / shard)
        named = {name for name, its_shard in where.items() if its_shard == shard}
        problems += [f"{shard} lacks {name}" for name in sorted(named - set(found))]
        problems += [f"{shard} has the unlisted {n}" for n in sorted(set(found) - named)]
        arrays |= found
        metadata |= shard_metadata
    if problems:
        raise ValueError(f"{path} does not fit its shards:{listed(problems)}")
    return {name: arrays[name] for name in where}, metadata


def _open_pickle(path: epath.Path) -> dict:
    """Opens a PyTorch file: nested dicts with lazy arrays instead of tensors."""
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"{path} is a PyTorch file: pip install torch, or convert it to .safetensors"
        ) from error
    check_here(path)
    try:
        # Checkpoints of DiT, SiT and REPA store their command line. A Namespace holds plain values,
        # and constructing one runs no foreign code. Mapped arrays stay mapped when a bucket's copy
        # is removed.
        with torch.serialization.safe_globals([argparse.Namespace]), reading(path) as here:
            content = torch.load(
                here, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(here)
            )
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is damaged, or holds Python objects that could run code when loaded; nothing "
            "of it was loaded. If you trust its origin, convert it to .safetensors where it was "
            f"written. PyTorch met {_unsupported(str(error))}"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # a damaged file makes PyTorch raise errors of any kind
        raise ValueError(f"{path} is damaged or cut short, fetch it again: {error!r}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not tensors by name")
    with prefixed(f"{path} has tensors of types that are not read", TypeError):
        return {str(name): _without_tensors(value) for name, value in content.items()}


def _unsupported(message: str) -> str:
    """The types that PyTorch refused, without its advice to load the file anyway."""
    found = re.search(r"GLOBAL ([\w.]+)", message)
    reason = re.search(r"WeightsUnpickler error:\s*(.+)", message)
    return found[1] if found else repr(reason[1] if reason else message.splitlines()[0])


def _without_tensors(value: Any) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        return _lazy_tensor(value.detach())
    if isinstance(value, Mapping):
        return {str(name): _without_tensors(inner) for name, inner in value.items()}
    return value


def _lazy_tensor(tensor: Any) -> LazyArray:
    import torch

    # numpy has neither of these types, so their bits are reinterpreted.
    bits = {
        torch.bfloat16: (torch.int16, ml_dtypes.bfloat16),
        torch.float8_e4m3fn: (torch.uint8, ml_dtypes.float8_e4m3fn),
        torch.float8_e5m2: (torch.uint8, ml_dtypes.float8_e5m2),
    }
    if tensor.layout is not torch.strided or tensor.is_meta:
        raise TypeError(f"{tensor.layout} on {tensor.device}")
    if tensor.dtype in bits:
        carrier, dtype = bits[tensor.dtype]
    else:
        carrier, dtype = tensor.dtype, torch.empty(0, dtype=tensor.dtype).numpy().dtype

    def read(index: tuple[slice, ...] = ()) -> np.ndarray:
        return np.array(tensor.view(carrier)[index].numpy()).view(dtype)

    return LazyArray(tensor.shape, dtype, read, in_parts=True)


def _arrays_in(content: Mapping) -> dict[str, LazyArray]:
    return {name: value for name, value in content.items() if isinstance(value, LazyArray)}


def _select(
    path: epath.Path, content: Mapping, select: str | None
) -> tuple[dict[str, LazyArray], str]:
    """The arrays of one network, without prefixes, and the name of the part that holds them."""
    if select is None and _has_nameless_average(content):
        raise ValueError(
            f"{path} holds its averages as a list without names (shadow_params): write them under "
            "the network's names, or take what was not averaged by open_weights(path, select=...)"
        )
    arrays, selected = _arrays_in(content), []
    # Tensors of an optimiser lie one level deeper, so its key never appears here.
    keys = [k for k, v in content.items() if isinstance(v, Mapping) and _arrays_in(v)]
    if keys:
        key = select if select in keys else _preferred(path, keys, select)
        select = None if select == key else select
        arrays, selected = _arrays_in(content[key]), [key]
        others = [name for name in content if name != key]
        if others:
            logging.info("%s: took %s, not %s", path, key, ", ".join(others))
    elif not arrays:
        raise ValueError(f"{path} holds no tensors by name")
    if select == "":
        return arrays, "/".join(selected)
    arrays = _unwrapped(arrays, select)
    if select is None:
        found = (_NETWORK.match(name) for name in arrays)
        prefixes = sorted({match[0] for match in found if match})
        if not prefixes:
            return arrays, "/".join(selected)
        prefix = _preferred(path, prefixes, None)
    else:
        prefix = select.removesuffix(".") + "."
    chosen = {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
    chosen = _unwrapped(chosen, None)
    if not chosen:
        tops = sorted({".".join(name.split(".")[:2]) for name in arrays})
        raise ValueError(
            f"{path}: no part {select!r}; keys are {keys}, prefixes of names are {tops[:20]}"
        )
    if len(chosen) < len(arrays):
        logging.info("%s: took %s, %d of %d arrays", path, prefix, len(chosen), len(arrays))
    return chosen, "/".join([*selected, prefix.removesuffix(".")])


def _has_nameless_average(content: Mapping) -> bool:
    """Whether a checkpoint contains averages of `diffusers` or torch_ema, which are a list."""
    return "shadow_params" in content or any(
        _has_nameless_average(value) for value in content.values() if isinstance(value, Mapping)
    )


def _unwrapped(arrays: Mapping[str, LazyArray], select: str | None) -> dict[str, LazyArray]:
    """Removes wrappers from names, except wrappers in the requested part."""
    names = list(arrays)
    asked = "" if select is None else f"{select}."
    if not _INNER_WRAPPER.search(asked):
        names = [_INNER_WRAPPER.sub("", name) for name in names]
    while names and not asked.startswith(_WRAPPER) and all(n.startswith(_WRAPPER) for n in names):
        names = [_INNER_WRAPPER.sub("", name.removeprefix(_WRAPPER)) for name in names]
    if len(set(names)) < len(names):  # then it is not a wrapper
        return dict(arrays)
    return dict(zip(names, arrays.values(), strict=True))


def _preferred(path: epath.Path, parts: list[str], select: str | None) -> str:
    """The average of the only other part, or the only part; otherwise an error."""
    if len(parts) == 1:
        return parts[0]
    for average, averaged in _AVERAGES.items():
        if average in parts and set(parts) <= {average, averaged}:
            return average
    asked = "" if select is None else f"no part {select!r}; "
    names = ", ".join(part.removesuffix(".") for part in parts)
    raise ValueError(f"{path}: {asked}it holds several parts, select one of: {names}")
