"""Small networks in the official layout, and what their files are read as."""

import functools

import jax
import numpy as np

from piflow_jax.convert import (
    export_adapter,
    load_adapter,
    load_torch_state,
    to_torch_state,
)
from piflow_jax.models.dit import DiT
from piflow_jax.models.flux import FLUX_TARGETS, Flux
from piflow_jax.models.flux2 import FLUX2_TARGETS, Flux2
from piflow_jax.models.heads import DXHead, GMHead, VelocityHead
from piflow_jax.models.lora import LoRA, split
from piflow_jax.models.qwen_image import QWEN_TARGETS, QwenImage

SIZES = {
    "in_channels": 4,
    "hidden": 32,
    "num_heads": 2,
    "text_features": 12,
    "axes_dims_rope": (4, 6, 6),
}
NETWORKS = {
    "dit": functools.partial(
        DiT, hidden=16, num_heads=2, depth=2, num_classes=3, in_channels=4, sample_size=4
    ),
    "flux": functools.partial(Flux, **SIZES, double_depth=1, single_depth=2, pooled_features=10),
    "qwen_image": functools.partial(QwenImage, **SIZES, depth=2),
    "flux2": functools.partial(
        Flux2, **SIZES | {"axes_dims_rope": (4, 4, 4, 4)}, double_depth=1, single_depth=2
    ),
}
FF = "transformer_blocks.0.ff.net.2"
GIVEN = {"dit": {"num_heads": 2, "sample_size": 4}}
HEADS = {"gm": GMHead(2, 8), "dx": DXHead(3), "": VelocityHead()}


def network(name, **options):
    """The module that is called `flux`, `gm_flux` and so on."""
    kind = name if name in NETWORKS else name.partition("_")[2]
    return NETWORKS[kind](head=HEADS[name.removesuffix(kind).removesuffix("_")], **options)


@functools.cache
def drawn(module):
    shapes = jax.eval_shape(module.init, jax.random.key(0), *module.example())
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32), shapes)


def state(name):
    """A whole network under official names, or the adapter of a student, `gm_flux+lora`."""
    if not name.endswith("+lora"):
        return to_torch_state(network(name), drawn(network(name)))
    module = adapted(name)
    return export_adapter(module, split(drawn(module))[1])


def adapted(name):
    targets = {"gm_qwen_image": QWEN_TARGETS, "gm_flux2": FLUX2_TARGETS}
    name = name.removesuffix("+lora")
    return network(name, lora=LoRA(targets.get(name, FLUX_TARGETS), rank=3))


def load(name, arrays):
    """What the weights are read as."""
    if name.endswith("+lora"):
        return load_adapter(adapted(name), arrays)
    given = GIVEN.get(name.partition("_")[2] or name, SIZES)
    axes = network(name).axes_dims_rope if given is SIZES else ()
    given = {"axes_dims_rope": axes} if given is SIZES else given
    return load_torch_state(arrays, name, **given)


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def kohya(name):
    layer, _, which = name.partition(".lora_")
    if not which:
        return name
    which = "down" if which.startswith("A") else "up"
    return f"lora_transformer_{layer.replace('.', '_')}.lora_{which}.weight"


def comfy(name):
    return f"diffusion_model.double_blocks.{name.replace('lora_A', 'lora_down')}"
