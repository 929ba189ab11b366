"""Counted operations against closed forms and against each other."""

import functools

import jax
import jax.numpy as jnp

from piflow_jax.models import DiT, GMHead, VelocityHead
from piflow_jax.models.flops import forward_flops, traced_flops


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


def test_convolutions_count_every_tap():
    image, kernel = jnp.ones((2, 8, 6, 3)), jnp.ones((3, 3, 3, 5))

    def convolve(image, kernel, **options):
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            image, kernel, (1, 1), "SAME", dimension_numbers=dims, **options
        )

    assert traced_flops(convolve, image, kernel) == 2 * (2 * 8 * 6 * 5) * (3 * 3 * 3)
    grouped = functools.partial(convolve, feature_group_count=3)
    kernel = jnp.ones((3, 3, 1, 6))
    assert traced_flops(grouped, image, kernel) == 2 * (2 * 8 * 6 * 6) * (3 * 3)


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
