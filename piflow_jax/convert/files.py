"""Weight files of PyTorch releases, opened lazily: names and shapes first, tensors one by one.

Source: layout of the pi-Flow release (arXiv 2510.14974) and of facebookresearch/DiT checkpoints.
"""

import argparse
import json
import os
import pickle
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from absl import logging

INDEX = ".safetensors.index.json"
PICKLES = (".pth", ".pt", ".bin", ".ckpt")

# What the header of a `.safetensors` file calls its dtypes.
_DTYPES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "U32": np.uint32,
    "I32": np.int32,
    "U64": np.uint64,
    "I64": np.int64,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F32": np.float32,
    "F64": np.float64,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}
# Wrappers that training adds around a whole network.
_WRAPPERS = ("module.", "_orig_mod.")
# mmcv checkpoints of pi-Flow hold several networks: diffusion, its average, sometimes the teacher.
_NETWORK = re.compile(r"(?:.+\.)?denoising\.")


class LazyArray:
    """An array that is read when numpy asks for it, and only then; nothing is kept.

    Attributes:
        shape: Shape.
        dtype: Dtype.
        ndim: Number of axes.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any, read: Callable[[], np.ndarray]):
        self.shape = tuple(shape)
        self.dtype = np.dtype(dtype)
        self.ndim = len(self.shape)
        self._read = read

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Reads the array; every call reads anew."""
        if copy is False:
            raise ValueError("a lazy array is always read into new memory")
        array = self._read()
        return array if dtype is None else array.astype(dtype, copy=False)

    def __repr__(self) -> str:
        """Shape and dtype; reads nothing."""
        return f"LazyArray(shape={self.shape}, dtype={self.dtype})"


class Weights(Mapping[str, LazyArray]):
    """Lazily read arrays by name; made by `open_weights`.

    Attributes:
        path: The file or directory.
        metadata: Text that the file carries besides its tensors; released pi-Flow students keep
            their policy's settings there, as JSON under `policy_config`.
        selected: Which part of a file that holds several networks this is, "" for all of it.
    """

    def __init__(
        self,
        path: Path,
        arrays: Mapping[str, LazyArray],
        metadata: Mapping[str, str],
        selected: str = "",
    ):
        self.path = path
        self.metadata = dict(metadata)
        self.selected = selected
        self._arrays = dict(arrays)

    def __getitem__(self, name: str) -> LazyArray:
        """The array of a name, not read yet."""
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        """Names, in the order of the file."""
        return iter(self._arrays)

    def __len__(self) -> int:
        """Number of arrays."""
        return len(self._arrays)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the array called `name`; reads nothing."""
        return self._arrays[name].shape


def open_weights(path: str | os.PathLike, select: str | None = None) -> Weights:
    """Opens a weight file without reading its tensors.

    Checkpoints of training runs hold more than one network. Averaged weights are preferred, and
    the choice is logged: `ema` of DiT, SiT and REPA checkpoints (`{"model", "ema", "opt",
    "args"}`), `diffusion_ema.denoising` of pi-Flow ones. Prefixes of the chosen part, and wrappers
    such as `module.` around every name, are taken off.

    Args:
        path: A `.safetensors` file; an index `*.safetensors.index.json` of shards; a `.pth`, `.pt`,
            `.bin` or `.ckpt` file of PyTorch; or a directory with exactly one of these.
        select: The part to take where a file holds several: a key such as "model", or a prefix of
            names such as "diffusion.denoising" or "teacher.denoising". "" takes all names as they
            are.

    Returns:
        The arrays by name. Those of a PyTorch file are mapped from the disk (those written before
        PyTorch 1.6 are held in memory); either kind is copied out when it is read.

    Raises:
        FileNotFoundError: No such file, or a shard of an index is missing.
        ValueError: The file is damaged, of an unknown kind, holds Python objects that could run
            code, or holds several parts of which none is the obvious one.
        ImportError: A PyTorch file, and PyTorch is not installed.
    """
    path = _one_file(Path(path))
    if path.name.endswith(INDEX):
        parts, metadata = _open_index(path)
    elif path.suffix == ".safetensors":
        parts, metadata = _open_safetensors(path)
    elif path.suffix in PICKLES:
        parts, metadata = _open_pickle(path), {}
    else:
        known = ", ".join((".safetensors", INDEX, *PICKLES))
        raise ValueError(f"{path}: unknown kind of weight file, known are {known}")
    arrays, selected = _select(path, parts, select)
    return Weights(path, arrays, metadata, selected)


def write_safetensors(
    path: str | os.PathLike, state: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes arrays to a `.safetensors` file, wholly or not at all.

    Args:
        path: The file; one that exists is replaced.
        state: Arrays (numpy, JAX or lazy) by name; all are held in memory at once.
        metadata: Text by text, stored in the file's header.

    Raises:
        OSError: The folder is not there or cannot be written to; an old file stays as it was.
        SafetensorError: An array has a dtype that the format lacks; nothing is written.
    """
    from safetensors.numpy import save

    path = Path(path)
    arrays = {name: np.asarray(array, order="C") for name, array in state.items()}
    content = save(arrays, dict(metadata or {}))
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files private; a weight file gets the permissions of any new file.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _one_file(path: Path) -> Path:
    """The weight file that a path means: itself, or the one in a directory."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such weight file or directory")
    if not path.is_dir():
        return path
    for endings in ((INDEX,), (".safetensors",), PICKLES):
        found = sorted(p for p in path.iterdir() if p.name.endswith(endings) and p.is_file())
        if len(found) > 1:
            names = ", ".join(p.name for p in found)
            raise ValueError(f"{path} holds several weight files, name one of: {names}")
        if found:
            return found[0]
    raise FileNotFoundError(f"{path}: a directory without weight files")


def _open_safetensors(path: Path) -> tuple[dict[str, LazyArray], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="np")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or cut short, fetch it again: {error!r}") from error

    def lazy(name: str) -> LazyArray:
        header = file.get_slice(name)
        if header.get_dtype() not in _DTYPES:
            raise ValueError(f"{path}: {name} has the unknown dtype {header.get_dtype()}")
        dtype = _DTYPES[header.get_dtype()]
        return LazyArray(header.get_shape(), dtype, lambda: file.get_tensor(name))

    return {name: lazy(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def _open_index(path: Path) -> tuple[dict[str, LazyArray], dict[str, str]]:
    """Opens the shards that an index names."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        where = {str(name): str(shard) for name, shard in index["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no index of shards: {error!r}") from error
    shards = sorted(set(where.values()))
    outside = [shard for shard in shards if Path(shard).name != shard]
    if outside:
        raise ValueError(f"{path} names shards outside its own directory: {outside}")
    absent = [shard for shard in shards if not (path.parent / shard).is_file()]
    if absent:
        raise FileNotFoundError(f"{path}: missing shards {', '.join(absent)}")
    arrays, metadata, problems = {}, {}, []
    for shard in shards:
        found, shard_metadata = _open_safetensors(path.parent / shard)
        listed = {name for name, its_shard in where.items() if its_shard == shard}
        problems += [f"{shard} lacks {name}" for name in sorted(listed - set(found))]
        problems += [f"{shard} has the unlisted {n}" for n in sorted(set(found) - listed)]
        arrays |= found
        metadata |= shard_metadata
    if problems:
        raise ValueError(f"{path} does not fit its shards:\n  " + "\n  ".join(problems))
    return {name: arrays[name] for name in where}, metadata


def _open_pickle(path: Path) -> dict:
    """Opens a PyTorch file: nested dicts with lazy arrays in place of tensors."""
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"{path} is a PyTorch file: pip install torch, or convert it to .safetensors"
        ) from error
    path.open("rb").close()  # what is not readable at all is not damaged
    try:
        # Checkpoints of DiT, SiT and REPA keep their command line: a Namespace holds plain
        # values, and its own construction runs nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is damaged, or holds Python objects that could run code when loaded; nothing "
            "of it was loaded. If you trust its origin, convert it to .safetensors where it was "
            f"written. PyTorch met {_unsupported(str(error))}"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is damaged or cut short, fetch it again: {error!r}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not tensors by name")
    return {str(name): _without_tensors(value) for name, value in content.items()}


def _unsupported(message: str) -> str:
    """What PyTorch refused, out of a message that is mostly advice to load it all the same."""
    found = re.search(r"GLOBAL ([\w.]+)", message)
    return found[1] if found else f"{message.splitlines()[-1]!r}"


def _without_tensors(value: Any) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        return _lazy_tensor(value.detach())
    if isinstance(value, Mapping):
        return {str(name): _without_tensors(inner) for name, inner in value.items()}
    return value


def _lazy_tensor(tensor: Any) -> LazyArray:
    import torch

    # numpy knows neither type, so their bits change hands.
    bits = {
        torch.bfloat16: (torch.int16, ml_dtypes.bfloat16),
        torch.float8_e4m3fn: (torch.uint8, ml_dtypes.float8_e4m3fn),
        torch.float8_e5m2: (torch.uint8, ml_dtypes.float8_e5m2),
    }
    if tensor.dtype not in bits:
        dtype = torch.empty(0, dtype=tensor.dtype).numpy().dtype
        return LazyArray(tensor.shape, dtype, lambda: np.array(tensor.numpy()))
    carrier, dtype = bits[tensor.dtype]
    return LazyArray(
        tensor.shape, dtype, lambda: np.array(tensor.view(carrier).numpy()).view(dtype)
    )


def _arrays_in(content: Mapping) -> dict[str, LazyArray]:
    return {name: value for name, value in content.items() if isinstance(value, LazyArray)}


def _select(path: Path, content: Mapping, select: str | None) -> tuple[dict[str, LazyArray], str]:
    """The arrays of one network, without prefixes, and the name of the part they come from."""
    arrays, selected = _arrays_in(content), []
    # Tensors of an optimiser lie one level deeper, so its key is never among these.
    keys = [k for k, v in content.items() if isinstance(v, Mapping) and _arrays_in(v)]
    if keys:
        key = select if select in keys else _preferred(path, keys, "ema", select)
        select = None if select == key else select
        arrays, selected = _arrays_in(content[key]), [key]
        others = [name for name in content if name != key]
        if others:
            logging.info("%s: took %s, not %s", path, key, ", ".join(others))
    elif not arrays:
        raise ValueError(f"{path} holds no tensors by name")
    if select == "":
        return arrays, "/".join(selected)
    for wrapper in _WRAPPERS:
        asked = select is not None and f"{select}.".startswith(wrapper)
        if not asked and all(name.startswith(wrapper) for name in arrays):
            arrays = {name.removeprefix(wrapper): array for name, array in arrays.items()}
    if select is None:
        found = (_NETWORK.match(name) for name in arrays)
        prefixes = sorted({match[0] for match in found if match})
        if not prefixes:
            return arrays, "/".join(selected)
        prefix = _preferred(path, prefixes, "diffusion_ema.denoising.", None)
    else:
        prefix = select.removesuffix(".") + "."
    chosen = {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
    if not chosen:
        tops = sorted({".".join(name.split(".")[:2]) for name in arrays})
        raise ValueError(
            f"{path}: no part {select!r}; keys are {keys}, prefixes of names are {tops[:20]}"
        )
    if len(chosen) < len(arrays):
        logging.info("%s: took %s, %d of %d arrays", path, prefix, len(chosen), len(arrays))
    return chosen, "/".join([*selected, prefix.removesuffix(".")])


def _preferred(path: Path, parts: list[str], first: str, select: str | None) -> str:
    """The averaged part if the others are the same network's; the only part; else an error."""
    same_network = {"ema", "model", "diffusion_ema.denoising.", "diffusion.denoising."}
    if len(parts) == 1:
        return parts[0]
    if first in parts and set(parts) <= same_network:
        return first
    asked = "" if select is None else f"no part {select!r}; "
    names = ", ".join(part.removesuffix(".") for part in parts)
    raise ValueError(f"{path}: {asked}it holds several parts, select one of: {names}")
