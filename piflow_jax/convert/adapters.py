"""pi-Flow's released adapters of FLUX.1 and Qwen-Image, in and out.

Source: names and layouts of the pi-Flow release (arXiv 2510.14974), which are those of `peft`: of a
layer `x W^T + b + (x A^T) B^T` the arrays `lora_A.weight [rank, in]` and `lora_B.weight [out,
rank]`. Beside the adapters a file holds the output head and the modulation of the last norm.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from piflow_jax.convert.flux import flux_rules
from piflow_jax.convert.qwen_image import qwen_image_rules
from piflow_jax.convert.rules import Place, Rule, as_jax, export_state, import_state
from piflow_jax.models.flux import Flux
from piflow_jax.models.heads import DXHead, GMHead
from piflow_jax.models.lora import DOWN, TRAINED, UP
from piflow_jax.models.qwen_image import QwenImage

__all__ = ["adapter_config", "export_adapter", "load_adapter"]

# Where the release, or `peft`, names the network or the adapter in a name.
_PREFIXES = ("transformer.",)
_NAMED = {"lora_A.default.weight": "lora_A.weight", "lora_B.default.weight": "lora_B.weight"}


def adapter_rules(module: Flux | QwenImage) -> list[Rule]:
    """The table of the trained part of a student with adapters.

    Args:
        module: The student, with `lora`.

    Returns:
        Rules that cover every trained parameter once.

    Raises:
        ValueError: The module has no adapters, or its head has no official counterpart.
    """
    if module.lora is None:
        raise ValueError("the network has no adapters")
    whole = flux_rules(module) if isinstance(module, Flux) else qwen_image_rules(module)
    rules = []
    for rule in whole:
        if rule.path[0] in TRAINED:
            rules.append(rule)
        elif rule.path[-1] == "kernel" and rule.path[-2] in module.lora.targets:
            rules += _of_kernel(rule, module.lora.rank)
    return rules


def _of_kernel(rule: Rule, rank: int) -> list[Rule]:
    """The two matrices of an adapter, which split and stack as the kernel beside them does."""
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
    """Output and input axes of a weight's pattern, each one axis or one in brackets."""
    if side.startswith("("):
        outs, _, ins = side.partition(") ")
        return f"{outs})", ins
    outs, _, ins = side.partition(" ")
    return outs, ins


def _unused(module: Flux | QwenImage) -> dict[str, tuple[int, ...]]:
    """Adapters that the release leaves out: those of Qwen-Image's last text, which nobody reads."""
    if not isinstance(module, QwenImage):
        return {}
    last = f"transformer_blocks.{module.depth - 1}.txt_mlp."
    return {
        name: rule.torch_shape
        for rule in adapter_rules(module)
        for name in rule.torch_names(0)
        if name.startswith(last)
    }


def load_adapter(
    module: Flux | QwenImage, state: Mapping[str, np.ndarray], place: Place | None = None
) -> dict:
    """Loads the trained part of a student.

    Args:
        module: The student, with `lora` and the head that the file is of.
        state: Arrays by official name, such as `open_weights` gives.
        place: See `import_state`; None keeps leaves on the default device.

    Returns:
        `{"params": ...}` for `models.lora.merge`.

    Raises:
        ValueError: Names or shapes do not fit; all of them are listed.
    """
    found: dict[str, Any] = {}
    for name, array in state.items():
        for prefix in _PREFIXES:
            name = name.removeprefix(prefix)
        for ending, ours in _NAMED.items():
            if name.endswith(ending):
                name = name.removesuffix(ending) + ours
        found[name] = array
    like = next((a.dtype for n, a in found.items() if n.endswith("lora_A.weight")), np.float32)
    for name, shape in _unused(module).items():
        found.setdefault(name, np.zeros(shape, like))
    return {"params": import_state(found, adapter_rules(module), 0, place or as_jax)}


def export_adapter(module: Flux | QwenImage, trained: Mapping) -> dict[str, np.ndarray]:
    """Turns the trained part of a student into arrays under official names.

    Args:
        module: The student, with `lora`.
        trained: `{"params": ...}` as `models.lora.split` gives it.

    Returns:
        Arrays by official name, in PyTorch layout, dtypes kept.

    Raises:
        ValueError: The parameters are not this module's, or there are no official names for them.
    """
    if module.lora is not None and module.lora.scale != 1:
        raise ValueError(f"adapters of the release have the scale 1, not {module.lora.scale}")
    if isinstance(module.head, DXHead) and module.head.input_skip:
        raise ValueError("DXHead.input_skip: official networks have no such skip")
    state = export_state(trained["params"], adapter_rules(module), 0)
    return {name: array for name, array in state.items() if name not in _unused(module)}


def adapter_config(module: Flux | QwenImage) -> dict[str, Any]:
    """What stands in the `config.json` beside an adapter, by which official pipelines load it.

    Args:
        module: The student.

    Returns:
        The class of the network in the release and its arguments.

    Raises:
        ValueError: There is no official class for its head.
    """
    head, flux = module.head, isinstance(module, Flux)
    patches = module.in_channels * module.patch_size**2
    common = {
        "in_channels": patches,
        "attention_head_dim": module.hidden // module.num_heads,
        "num_attention_heads": module.num_heads,
        "joint_attention_dim": module.text_features,
        "axes_dims_rope": list(module.axes_dims_rope),
    }
    if flux:
        common |= {
            "num_layers": module.double_depth,
            "num_single_layers": module.single_depth,
            "pooled_projection_dim": module.pooled_features,
            "guidance_embeds": module.guidance_embed,
        }
    else:
        common |= {"num_layers": module.depth}
    name = "FluxTransformer2DModel" if flux else "QwenImageTransformer2DModel"
    if isinstance(head, DXHead):
        # No class of its own: the plain network with more outputs. One side of a patch is a factor
        # of Qwen-Image's outputs and none of FLUX.1's.
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
