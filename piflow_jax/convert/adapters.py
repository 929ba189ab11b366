"""Import and export of pi-Flow's released adapters of the networks that read text.

Source: names and layouts of the pi-Flow release (arXiv 2510.14974), which follow `peft`: a layer `x
W^T + b + (x A^T) B^T` has the arrays `lora_A.weight [rank, in]` and `lora_B.weight [out, rank]`. In
addition to the adapters, a file holds the output head and the modulation of the last norm.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from piflow_jax.convert.heads import check_exportable
from piflow_jax.convert.kinds import adapter_of
from piflow_jax.convert.rules import Place, Rule, export_state, import_state
from piflow_jax.convert.table import kind_of
from piflow_jax.models.heads import DXHead, GMHead
from piflow_jax.models.joint import TextTransformer
from piflow_jax.models.lora import DOWN, TRAINED, UP
from piflow_jax.safetensors_files import LazyArray

__all__ = ["adapter_config", "export_adapter", "is_adapter", "load_adapter"]

# Prefixes and infixes by which pipelines and `peft` name the network and the adapter.
_NETWORK = re.compile(r"^(?:base_model\.model\.)?(?:transformer\.)?")
_ADAPTER = re.compile(r"\.lora_(A|B)\.\w+\.weight$")
# The settings of an adapter: `diffusers` keeps them in the file, `peft` in another one.
_METADATA = "lora_adapter_metadata"
_BESIDE = "adapter_config.json"
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
_READ = (
    "what is read has the names of diffusers, such as transformer_blocks.0.ff.net.2.lora_A.weight, "
    "and the student's head, proj_out_means or proj_out"
)


def adapter_rules(module: TextTransformer) -> list[Rule]:
    """The table for the trained part of a student with adapters.

    Args:
        module: The student, with `lora`.

    Returns:
        Rules that cover every trained parameter once.

    Raises:
        ValueError: The module has no adapters, or its head has no official counterpart.
    """
    if module.lora is None:
        raise ValueError("the network has no adapters")
    rules = []
    for rule in kind_of(module).rules(module):
        if rule.path[0] in TRAINED:
            rules.append(rule)
        elif rule.path[-1] == "kernel" and rule.path[-2] in module.lora.targets:
            rules += _of_kernel(rule, module.lora.rank)
    return rules


def _of_kernel(rule: Rule, rank: int) -> list[Rule]:
    """The two matrices of an adapter, which split and stack like the kernel that they adapt."""
    (name,) = rule.names
    layer = name.removesuffix(".weight")
    left, right = (side.strip() for side in rule.pattern.split("->"))
    stack = "l " if rule.layered else ""
    outs, ins = _groups(left.removeprefix(stack))
    axes = right.removeprefix(stack).split()
    kept_ins = " ".join(axis for axis in axes if axis in ins.strip("()").split())
    kept_outs = " ".join(axis for axis in axes if axis in outs.strip("()").split())
    sizes = dict(rule.sizes) | {"r": rank}

    def used(pattern):
        return {axis: size for axis, size in sizes.items() if axis in pattern}

    down = f"{stack}r {ins} -> {stack}{kept_ins} r"
    up = f"{stack}{outs} r -> {stack}r {kept_outs}"
    path = rule.path[:-1]
    return [
        Rule((f"{layer}.lora_A.weight",), (*path, DOWN), down, used(down), rule.depth),
        Rule((f"{layer}.lora_B.weight",), (*path, UP), up, used(up), rule.depth),
    ]


def _groups(side: str) -> tuple[str, str]:
    """Output and input axes of a weight's pattern, each a single axis or a group in brackets."""
    if side.startswith("("):
        outs, _, ins = side.partition(") ")
        return f"{outs})", ins
    outs, _, ins = side.partition(" ")
    return outs, ins


def _unused(module: TextTransformer) -> dict[str, tuple[int, ...]]:
    """Adapters that the release leaves out."""
    unread = kind_of(module).unread(module)
    return {
        name: rule.torch_shape
        for rule in adapter_rules(module)
        for name in rule.torch_names
        if unread and name.startswith(unread)
    }


def load_adapter(
    module: TextTransformer, state: Mapping[str, np.ndarray], place: Place | None = None
) -> dict:
    """Loads the trained part of a student.

    Args:
        module: The student, with `lora` and the same head as the file.
        state: Arrays by official name, for example from `open_weights`. A scale other than 1
            (`lora_alpha` over the rank, or over its root) in the file's metadata, or in the
            `adapter_config.json` next to it, is multiplied into the second matrices.
        place: Puts each leaf on its devices, see `import_state`; None keeps leaves on the default
            device.

    Returns:
        `{"params": ...}` for `models.lora.merge`.

    Raises:
        ValueError: The file does not hold an adapter of a student; its settings are damaged; names,
            shapes or dtypes do not match (the message lists the faults); or numbers are not finite.
    """
    if not is_adapter(state):
        raise ValueError(f"there are no LoRA matrices; {_READ}")
    found = _renamed(state)
    rules = adapter_rules(module)
    _check_kind(module, found)
    scale = scales(state)
    for name, array in found.items():
        if name.endswith(_UP):
            factor = scale(name.removesuffix(_UP), module.lora.rank)
            found[name] = array if factor == 1 else _times(factor, array)
    like = next((a.dtype for n, a in found.items() if n.endswith(_DOWN)), np.float32)
    for name, shape in _unused(module).items():
        found.setdefault(name, np.zeros(shape, like))
    return {"params": import_state(found, rules, place)}


def is_adapter(state: Mapping[str, Any]) -> bool:
    """Whether a state holds an adapter.

    Args:
        state: Arrays by name, for example from `open_weights`.

    Returns:
        Whether there are LoRA matrices with the names that `load_adapter` reads.

    Raises:
        ValueError: The matrices have names of another format, which the message gives.
    """
    what = adapter_of(state)
    if what is not None and not any(name.endswith(_DOWN) for name in _renamed(state)):
        raise ValueError(f"these are {what}; {_READ}")
    return what is not None


def _renamed(state: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays, with the names of network and adapter removed; `ValueError` for two of a name."""
    found: dict[str, Any] = {}
    for name, array in state.items():
        short = _ADAPTER.sub(r".lora_\1.weight", _NETWORK.sub("", name))
        if short in found:
            raise ValueError(f"{name} is the second {short} in the file; keep one adapter in it")
        found[short] = array
    return found


def _check_kind(module: TextTransformer, found: Mapping[str, Any]) -> None:
    """Raises an error that names the cause if nearly every name or shape is wrong."""
    ranks = {a.shape[0] for n, a in found.items() if n.endswith(_DOWN) and a.ndim}
    mixture, means = isinstance(module.head, GMHead), "proj_out_means.weight" in found
    if not means and "proj_out.weight" not in found:
        raise ValueError(
            "these are LoRA matrices without an output head, an adapter of the teacher and no "
            f"student: {_READ}"
        )
    if mixture != means:
        kinds = ("a mixture" if means else "a grid"), ("gm" if mixture else "dx")
        raise ValueError("the student predicts {}, and config.policy.kind is {!r}".format(*kinds))
    if ranks and module.lora.rank not in ranks:
        ranks = " and ".join(map(str, sorted(ranks)))
        raise ValueError(f"the rank is {ranks}, and the settings' lora_rank is {module.lora.rank}")


def scales(state: Mapping[str, Any]) -> Callable[[str, int], float]:
    """Scales of adapters in their own settings.

    Args:
        state: Arrays from `open_weights`, whose settings are in the file or next to it.

    Returns:
        The scale of a layer and its rank; 1 without settings.

    Raises:
        ValueError: The settings are damaged.
    """
    text, where = getattr(state, "metadata", {}).get(_METADATA), _METADATA
    path = getattr(state, "path", None)
    if text is None and path is not None and path.with_name(_BESIDE).is_file():
        where = path.with_name(_BESIDE)
        text = where.read_bytes()
    try:
        found = {} if text is None else json.loads(text)
        settings = {key.removeprefix("transformer."): value for key, value in found.items()}
        root = math.sqrt if settings.get("use_rslora") else float
        # As in `peft`: a pattern matches the end of a layer's name, and the first match counts.
        alphas = dict(settings.get("alpha_pattern") or {}) | {".*": settings.get("lora_alpha")}
        alphas = {re.compile(rf"(.*\.)?({key})$"): value for key, value in alphas.items()}
        wrong = [v for v in alphas.values() if v is not None and not 0 < float(v) < math.inf]
    except (
        ArithmeticError,
        AttributeError,
        RecursionError,
        TypeError,
        ValueError,
        re.error,
    ) as error:
        raise ValueError(f"{where} holds no settings of an adapter: {error!r}") from error
    if wrong:
        raise ValueError(f"{where}: lora_alpha must be finite and above 0, got {wrong[0]}")

    def scale(layer: str, rank: int) -> float:
        alpha = next(value for pattern, value in alphas.items() if pattern.match(layer))
        return 1.0 if alpha is None else float(alpha) / root(rank)

    return scale


def _times(factor: float, array: Any) -> LazyArray:
    def read(index: tuple[slice, ...] = ()) -> np.ndarray:
        wide = array[index]
        return (wide * np.asarray(factor, np.float32)).astype(wide.dtype)

    at_once = getattr(array, "at_once", 1)
    return LazyArray(array.shape, array.dtype, read, in_parts=True, at_once=at_once)


def export_adapter(module: TextTransformer, trained: Mapping) -> dict[str, np.ndarray]:
    """Turns the trained part of a student into arrays with official names.

    Args:
        module: The student, with `lora`.
        trained: `{"params": ...}` from `models.lora.split`.

    Returns:
        Arrays by official name, in PyTorch layout, with unchanged dtypes.

    Raises:
        ValueError: The parameters do not belong to this module, or have no official names.
    """
    if module.lora is not None and module.lora.scale != 1:
        raise ValueError(f"adapters of the release have the scale 1, not {module.lora.scale}")
    check_exportable(module.clone(lora=None))
    state = export_state(trained["params"], adapter_rules(module))
    return {name: array for name, array in state.items() if name not in _unused(module)}


def adapter_config(module: TextTransformer) -> dict[str, Any]:
    """The `config.json` of an adapter, with which official pipelines load it.

    Args:
        module: The student.

    Returns:
        The network's class in the release and its arguments.

    Raises:
        ValueError: The release has no class for its head.
    """
    head, release = module.head, kind_of(module).release(module)
    name = release.pop("_class_name")
    patches = module.in_channels * module.patch_size**2
    common = {
        "in_channels": patches,
        "attention_head_dim": module.hidden // module.num_heads,
        "num_attention_heads": module.num_heads,
        "joint_attention_dim": module.text_features,
        "axes_dims_rope": list(module.axes_dims_rope),
    } | release
    if isinstance(head, DXHead):
        # The release has no class of its own for it, only the plain network with more outputs. The
        # outputs of Qwen-Image contain the side of a patch as a factor, those of FLUX.1 do not.
        outputs = {"patch_size": 1, "out_channels": head.num_grid * patches}
        return {"_class_name": name} | outputs | common
    if not isinstance(head, GMHead) or head.constant_logstd is not None:
        raise ValueError(f"no official class for a head of type {type(head).__name__}")
    mixture = {
        "num_gaussians": head.num_components,
        "logstd_inner_dim": head.logstd_hidden,
        "gm_num_logstd_layers": 2,
        "logweights_channels": module.patch_size**2,
    }
    return {"_class_name": f"GM{name}"} | mixture | common
