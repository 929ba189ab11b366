"""Counted operations against closed forms, those of the networks at full size too."""

import functools

import jax
import jax.numpy as jnp
import pytest
from absl import logging
from jax.experimental import pallas as pl
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from piflow_jax.config import parse
from piflow_jax.models import ArcHead, DiT, DXHead, GMHead, VelocityHead
from piflow_jax.models.attention import attend
from piflow_jax.parallel.flops import flops
from piflow_jax.systems.network import abstract_variables
from piflow_jax.systems.networks import student_network, teacher_network
from piflow_jax.systems.shapes import DataShape
from piflow_jax.training.optimizer import make_optimizer
from piflow_jax.training.state import TrainState
from tests import recorded, tiny
from tests.steps import step_of

PRODUCT = 2 * 3 * 5 * 5


def loop(a, b, remat=False):
    def body(x, _):
        return jnp.sin(x @ b), None

    return jax.lax.scan(jax.checkpoint(body) if remat else body, a, length=7)[0]


def test_loops_count_as_often_as_they_run():
    a, b = jnp.ones((3, 5)), jnp.ones((5, 5))
    assert flops(loop, a, b).total == 7 * PRODUCT
    assert flops(jax.jit(loop), a, b).total == 7 * PRODUCT
    # Two products of the same size in the backward pass.
    assert flops(jax.grad(lambda *x: loop(*x).sum(), (0, 1)), a, b).total == 3 * 7 * PRODUCT


def test_what_a_backward_pass_repeats_is_counted_apart():
    a, b = jnp.ones((3, 5)), jnp.ones((5, 5))
    found = flops(jax.grad(lambda *x: loop(*x, remat=True).sum(), (0, 1)), a, b)
    assert (found.needed, found.recomputed) == (3 * 7 * PRODUCT, 7 * PRODUCT)
    assert found.total == 4 * 7 * PRODUCT


def test_a_product_belongs_to_the_innermost_scope_and_so_does_its_gradient():
    a, b = jnp.ones((3, 5)), jnp.ones((5, 5))

    @jax.named_scope("outer")
    def program(a, b):
        with jax.named_scope("inner"):
            a = loop(a, b)
        return (a @ b).sum()

    found = flops(jax.grad(program, (0, 1)), a, b, scopes=("inner", "outer", "none"))
    assert found.by_scope == {
        "inner": 3 * 7 * PRODUCT,
        "outer": 3 * PRODUCT,
        "none": 0,
        "other": 0,
    }
    assert flops(program, a, b, scopes=("outer",)).by_scope == {"outer": 8 * PRODUCT, "other": 0}


def test_branches_count_the_dearest_and_batched_products_their_batch():
    a = jnp.ones((4, 3, 5))
    assert flops(lambda a: jnp.einsum("bij,bkj->bik", a, a), a).total == 4 * 2 * 3 * 5 * 3

    def branches(a):
        return jax.lax.cond(a[0, 0, 0] > 0, lambda: a[0] @ a[0].T, lambda: a[0, :, :3])

    assert flops(branches, a).total == 2 * 3 * 5 * 3


def test_convolutions_count_every_tap():
    image, kernel = jnp.ones((2, 8, 6, 3)), jnp.ones((3, 3, 3, 5))

    def convolve(image, kernel, **options):
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            image, kernel, (1, 1), "SAME", dimension_numbers=dims, **options
        )

    assert flops(convolve, image, kernel).total == 2 * (2 * 8 * 6 * 5) * (3 * 3 * 3)
    grouped = functools.partial(convolve, feature_group_count=3)
    kernel = jnp.ones((3, 3, 1, 6))
    assert flops(grouped, image, kernel).total == 2 * (2 * 8 * 6 * 6) * (3 * 3)


def test_kernels_count_on_their_grid_and_shards_on_all_devices():
    a, b = jnp.ones((8, 5)), jnp.ones((5, 5))

    def kernel(a, b, out):
        out[...] = a[...] @ b[...]

    blocks = pl.BlockSpec((2, 5), lambda i: (i, 0))
    whole = pl.BlockSpec((5, 5), lambda i: (0, 0))
    product = pl.pallas_call(
        kernel, grid=(4,), in_specs=[blocks, whole], out_specs=blocks, out_shape=a
    )
    assert flops(product, a, b).total == 2 * 8 * 5 * 5

    mesh = AbstractMesh((4, 2), ("data", "other"), axis_types=(AxisType.Auto,) * 2)
    specs = {"in_specs": (PartitionSpec("data"), PartitionSpec()), "axis_names": {"data"}}
    split = jax.shard_map(jnp.dot, mesh=mesh, out_specs=PartitionSpec("data"), **specs)
    assert flops(jax.jit(split), a, b).total == 2 * 8 * 5 * 5


def test_what_cannot_be_counted_is_named(monkeypatch):
    said = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: said.append(text % values))
    a = jnp.ones((3, 3))
    assert flops(lambda a: jax.pure_callback(lambda a: a @ a, a, a) @ a, a).total == 2 * 3**3
    assert said == ["FLOPs are counted without those of the operations pure_callback (1)"]


@pytest.mark.gpu
def test_attention_by_cudnn_counts_like_any_other():
    q, k = jnp.ones((2, 64, 4, 64), jnp.bfloat16), jnp.ones((2, 128, 4, 64), jnp.bfloat16)

    def attended(q, k, v, implementation):
        return jnp.sum(attend(q, k, v, implementation).astype(jnp.float32))

    for function in (attended, jax.grad(attended, (0, 1, 2))):
        found = [
            flops(functools.partial(function, implementation=i), q, k, k) for i in ("cudnn", "xla")
        ]
        assert found[0] == found[1]


@pytest.mark.parametrize(
    ("head", "outputs"),
    [
        (VelocityHead(), 4),
        (DXHead(3), 3 * 4),
        (GMHead(5, 8), 5 * (4 + 1)),
        (ArcHead(5), 5 * (4 + 2)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_dit_costs_what_its_sizes_say(head, outputs):
    d, depth, tokens, pixels, batch = 32, 3, 16, 4, 2
    module = DiT(
        patch_size=2,
        in_channels=4,
        hidden=d,
        num_heads=2,
        depth=depth,
        num_classes=10,
        sample_size=8,
        head=head,
        remat="full",
    )
    blocks = depth * (tokens * 12 * d * d + 2 * tokens**2 * d + 6 * d * d)
    ends = tokens * d * pixels * (4 + outputs) + 2 * d * d + 256 * d + d * d
    logstd = 8 * (d + 1) if isinstance(head, GMHead) else 0
    params = jax.eval_shape(module.init, jax.random.key(0), *module.example())
    found = flops(module.apply, params, *module.example(batch))
    assert found.total == found.needed == 2 * batch * (blocks + ends + logstd)


def gradient(student, base, trained, *inputs):
    """FLOPs of an evaluation of a student with its gradient."""

    def loss(trained, base, *inputs):
        outputs = student.module.apply(student.with_base(trained, base), *inputs)
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(outputs))

    return flops(jax.grad(loss), trained, base, *inputs)


@pytest.mark.parametrize(
    ("name", "sites", "student_flops", "teacher_flops"),
    [
        ("imagenet:gm_repa", 32, 712_804_368_384, 237_233_405_952),
        ("flux:gm_4nfe", 128, 176_899_515_875_328, 74_384_653_418_496),
        ("qwen_image:gm_4nfe", 128, 185_346_865_102_848, 78_303_922_225_152),
    ],
)
def test_full_size_networks_cost_what_closed_forms_gave(name, sites, student_flops, teacher_flops):
    """The student with its gradient, and one evaluation of the teacher; of text 512 tokens.

    The forms left out vectors by sample, and took a gradient before the first adapter, too.
    """
    config = recorded.configuration(name)
    student, teacher = (
        recorded.networks(config, recorded.shape_of_data(config))[key]
        for key in ("student", "teacher")
    )
    x, t, told, *rest = student.module.example()
    x = jax.ShapeDtypeStruct((1, sites, sites, x.shape[-1]), x.dtype)
    if len(told.shape) == 3:
        told = jax.ShapeDtypeStruct((1, 512, told.shape[-1]), told.dtype)
    inputs = (x, t, told, *rest)
    params, base = recorded.variables(student), recorded.variables(teacher)
    found = gradient(student, base, student.trained(params), *inputs)
    assert found.needed == pytest.approx(student_flops, rel=2e-4)
    assert found.recomputed > 0
    found = flops(teacher.module.apply, base, *inputs)
    assert found.total == found.needed == pytest.approx(teacher_flops, rel=2e-4)


def test_a_step_evaluates_its_networks_as_often_as_it_must():
    config = tiny.get_config()
    config.teacher.guidance_scale = 2.0
    config = parse(config)
    data = DataShape(name="digits", sample_size=8, channels=1, num_classes=10)
    student = student_network(config.model, config.policy, data)
    teacher = teacher_network(config.model, data)
    params, base = abstract_variables(student), abstract_variables(teacher)
    optimizer = make_optimizer(config.train.optimizer, config.train.steps)
    state = jax.eval_shape(lambda params: TrainState.create(params, optimizer), params)
    batch = {"x": jnp.zeros((6, 8, 8, 1)), "condition": jnp.zeros(6, jnp.int32)}
    step = step_of(config, data, optimizer, student, teacher)
    found = flops(step, state, base, jax.random.key(0), batch, scopes=("student", "teacher"))
    queries = 2 * config.train.num_states  # with and without the condition
    assert found.by_scope == {
        "student": gradient(student, base, params, *student.module.example(6)).total,
        "teacher": queries * flops(teacher.module.apply, base, *teacher.module.example(6)).total,
        "other": 0,
    }
