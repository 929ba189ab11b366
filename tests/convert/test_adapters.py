"""Released adapters: official names, layouts, arithmetic, in and out."""

import json

import jax
import numpy as np
import pytest

from piflow_jax.convert import (
    adapter_config,
    export_adapter,
    load_adapter,
    to_torch_state,
    write_safetensors,
)
from piflow_jax.convert.files import open_weights
from piflow_jax.models.flux import FLUX_TARGETS, Flux
from piflow_jax.models.flux2 import FLUX2_TARGETS, Flux2
from piflow_jax.models.heads import DXHead, GMHead
from piflow_jax.models.lora import LoRA, fuse, merge, split
from piflow_jax.models.qwen_image import QWEN_TARGETS, QwenImage
from tests.models.recorded import assert_bit_equal

RANK, D = 3, 32
SIZES = {
    "in_channels": 4,
    "hidden": D,
    "num_heads": 2,
    "text_features": 12,
    "axes_dims_rope": (4, 6, 6),
}
# `lora_target_modules` of the release's configurations; a layer is one of them if its name ends so.
OFFICIAL = {
    "flux": (
        *("proj_mlp", "proj_out", "ff.net.0.proj", "ff.net.2"),
        *("ff_context.net.0.proj", "ff_context.net.2"),
        *("timestep_embedder.linear_1", "timestep_embedder.linear_2"),
    ),
    "qwen_image": (
        *("img_mlp.net.0.proj", "img_mlp.net.2"),
        *("timestep_embedder.linear_1", "timestep_embedder.linear_2"),
        *(f"transformer_blocks.{i}.txt_mlp.net.0.proj" for i in range(2)),
        *(f"transformer_blocks.{i}.txt_mlp.net.2" for i in range(2)),
    ),
    # Of AsymFLUX.2; those of pi-FLUX.2 are not published.
    "flux2": (
        *("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out"),
        *("timestep_embedder.linear_1", "timestep_embedder.linear_2"),
        *(f"single_transformer_blocks.{i}.attn.to_out" for i in range(3)),
    ),
}


def student(network, head):
    if network == "flux":
        sizes = SIZES | {"double_depth": 2, "single_depth": 3, "pooled_features": 10}
        return Flux(**sizes, head=head, lora=LoRA(FLUX_TARGETS, rank=RANK))
    if network == "flux2":
        sizes = SIZES | {"double_depth": 2, "single_depth": 3, "axes_dims_rope": (4, 4, 4, 4)}
        return Flux2(**sizes, head=head, lora=LoRA(FLUX2_TARGETS, rank=RANK))
    return QwenImage(**SIZES, depth=3, head=head, lora=LoRA(QWEN_TARGETS, rank=RANK))


def drawn(module):
    """Parameters of a module without a zero among them."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *module.example())
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32), shapes)


def expected_shapes(network, whole):
    """What a file holds, from the shapes of the official network and the release's lists."""
    adapted = {
        name.removesuffix(".weight"): array.shape
        for name, array in whole.items()
        if name.endswith(".weight")
        and any(f".{name.removesuffix('.weight')}".endswith(f".{t}") for t in OFFICIAL[network])
    }
    adapted.pop("proj_out", None)  # the output layer of a grid is trained itself
    kept = ("proj_out", "norm_out.")
    expected = {n: a.shape for n, a in whole.items() if n.startswith(kept)}
    for layer, (out, in_) in adapted.items():
        expected |= {f"{layer}.lora_A.weight": (RANK, in_), f"{layer}.lora_B.weight": (out, RANK)}
    return expected


@pytest.mark.parametrize("network", OFFICIAL)
@pytest.mark.parametrize("head", [GMHead(2, 7), DXHead(3)])
def test_names_layouts_and_arithmetic_are_the_releases(network, head, tmp_path):
    module = student(network, head)
    params = drawn(module)
    base, trained = split(params)
    adapter = export_adapter(module, trained)
    plain = module.clone(lora=None)
    _, without = split(fuse(params, 0.0))
    whole = to_torch_state(plain, merge(base, without))
    assert {n: a.shape for n, a in adapter.items()} == expected_shapes(network, whole)

    # `peft`: the layer's weight grows by B A.
    fused = to_torch_state(plain, fuse(params, module.lora.scale))
    for name, weight in whole.items():
        layer, grown = name.removesuffix(".weight"), np.asarray(weight, np.float64)
        if f"{layer}.lora_A.weight" in adapter:
            a, b = (np.float64(adapter[f"{layer}.lora_{x}.weight"]) for x in "AB")
            grown = grown + b @ a
        unread = network == "qwen_image" and name.startswith("transformer_blocks.2.txt_mlp")
        if not unread:
            np.testing.assert_allclose(fused[name], grown, rtol=1e-5, atol=1e-5, err_msg=name)

    # In again, under the other names that files have.
    renamed = {
        "transformer." + n.replace(".lora_A.", ".lora_A.default."): a for n, a in adapter.items()
    }
    path = tmp_path / "adapter.safetensors"
    write_safetensors(path, renamed)
    again = load_adapter(module, open_weights(path))
    assert jax.tree.map(np.shape, again) == jax.tree.map(np.shape, trained)
    assert_bit_equal(export_adapter(module, again), adapter)
    if network == "qwen_image":  # the last text MLP of nobody
        last = again["params"]["joint_blocks"]["text_mlp_in"]
        assert not np.any(last["lora_a"][2]) and np.all(last["lora_a"][1])


@pytest.mark.parametrize("network", OFFICIAL)
def test_the_configuration_beside_an_adapter_makes_the_official_network(network):
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    module = student(network, DXHead(3))
    made = json.loads(json.dumps(adapter_config(module)))
    peer = getattr(diffusers, made["_class_name"]).from_config(made)
    theirs = {name: tuple(array.shape) for name, array in peer.state_dict().items()}
    ours = to_torch_state(module.clone(lora=None), fuse(drawn(module), 0.0))
    assert theirs == {name: array.shape for name, array in ours.items()}
    mixture = adapter_config(student(network, GMHead(2, 7)))
    assert mixture["_class_name"] == f"GM{made['_class_name']}"
    assert (mixture["num_gaussians"], mixture["logstd_inner_dim"]) == (2, 7)


def test_misfits():
    module = student("flux", GMHead(2, 7))
    adapter = export_adapter(module, split(drawn(module))[1])
    name = next(name for name in adapter if name.endswith(".lora_A.weight"))
    second = name.replace(".weight", ".two.weight")
    with pytest.raises(ValueError, match=r"two\.weight is the second .*; keep one adapter in it"):
        load_adapter(module, {**adapter, second: adapter[name]})
    del adapter["norm_out.linear.bias"]
    with pytest.raises(ValueError, match=r"missing norm_out.linear.bias \(64,\)"):
        load_adapter(module, adapter)
    with pytest.raises(ValueError, match="no adapters"):
        load_adapter(module.clone(lora=None), adapter)
    with pytest.raises(ValueError, match="input_skip"):
        skipping = module.clone(head=DXHead(2, input_skip=True))
        export_adapter(skipping, split(drawn(skipping))[1])
    with pytest.raises(ValueError, match="has adapters"):
        to_torch_state(module, {"params": {}})
