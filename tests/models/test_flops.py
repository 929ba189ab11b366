"""Counted operations against closed forms and against each other."""

import jax
import jax.numpy as jnp
import pytest

from piflow_jax.models import DiT, DXHead, GMHead, VelocityHead
from piflow_jax.models.flops import forward_flops, gradient_flops, traced_flops
from piflow_jax.models.flux import FLUX_TARGETS, Flux
from piflow_jax.models.lora import LoRA, merge, split
from piflow_jax.models.qwen_image import QWEN_TARGETS, QwenImage


def test_loops_count_as_often_as_they_run():
    a, b = jnp.ones((3, 5)), jnp.ones((5, 5))

    def loop(a, b):
        return jax.lax.scan(lambda x, _: (x @ b, None), a, length=7)[0]

    assert traced_flops(loop, a, b) == 7 * 2 * 3 * 5 * 5
    assert traced_flops(jax.jit(loop), a, b) == 7 * 2 * 3 * 5 * 5
    # Two products of the same size in the backward pass.
    assert traced_flops(jax.grad(lambda *x: loop(*x).sum(), (0, 1)), a, b) == 3 * 7 * 2 * 3 * 5 * 5


def test_branches_count_the_dearest_and_batched_products_their_batch():
    a = jnp.ones((4, 3, 5))
    assert traced_flops(lambda a: jnp.einsum("bij,bkj->bik", a, a), a) == 4 * 2 * 3 * 5 * 3

    def branches(a):
        return jax.lax.cond(a[0, 0, 0] > 0, lambda: a[0] @ a[0].T, lambda: a[0, :, :3])

    assert traced_flops(branches, a) == 2 * 3 * 5 * 3


def test_the_network_by_its_shapes_is_the_network_as_traced():
    for head in (VelocityHead(), GMHead(4, 8)):
        for remat in ("none", "full"):
            module = DiT(
                patch_size=2,
                in_channels=4,
                hidden=32,
                num_heads=2,
                depth=3,
                num_classes=10,
                sample_size=8,
                head=head,
                remat=remat,
            )
            inputs = jnp.ones((1, 8, 8, 4)), jnp.ones((1,)), jnp.zeros((1,), jnp.int32)
            params = jax.eval_shape(module.init, jax.random.key(0), *inputs)
            by_shapes = forward_flops(module, 8, 8)
            traced = traced_flops(module.apply, params, *inputs)
            # The count by shapes leaves the logstd head out, a vector by sample.
            assert by_shapes <= traced <= 1.02 * by_shapes


SIZES = {"in_channels": 4, "hidden": 64, "num_heads": 4, "text_features": 48}
SIZES |= {"axes_dims_rope": (4, 6, 6)}


@pytest.mark.parametrize("network", ["flux", "qwen_image"])
@pytest.mark.parametrize("rank", [0, 8])
def test_networks_that_read_text_by_their_shapes_are_the_traced_ones(network, rank):
    head = GMHead(4, 8) if rank else DXHead(3)
    if network == "flux":
        lora = LoRA(FLUX_TARGETS, rank=rank) if rank else None
        sizes = SIZES | {"double_depth": 3, "single_depth": 5, "pooled_features": 24}
        module = Flux(**sizes, head=head, lora=lora)
    else:
        module = QwenImage(
            **SIZES, depth=3, head=head, lora=LoRA(QWEN_TARGETS, rank=rank) if rank else None
        )
    shapes = list(module.example())
    shapes[0] = jax.ShapeDtypeStruct((1, 8, 12, 4), jnp.float32)
    shapes[2] = jax.ShapeDtypeStruct((1, 7, 48), jnp.float32)
    params = jax.eval_shape(module.init, jax.random.key(0), *shapes)
    by_shapes, traced = forward_flops(module, 8, 12, 7), traced_flops(module.apply, params, *shapes)
    assert 0.999 * by_shapes <= traced <= 1.02 * by_shapes

    # Of a base that stays as it is, no gradient by its weights is taken.
    base, trained = split(params)

    def loss(trained, base, *inputs):
        outputs = module.apply(merge(base, trained), *inputs)
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(outputs))

    both = traced_flops(jax.grad(loss), trained, base, *shapes)
    # What is before the first adapter needs no gradient at all.
    assert rank == 0 or 0.8 < both / gradient_flops(module, 8, 12, 7) < 1.01
