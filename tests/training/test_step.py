"""The train steps: gradient accumulation against the whole batch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from piflow_jax.config import parse
from piflow_jax.runs.monitor import step_memory
from piflow_jax.systems.network import abstract_variables
from piflow_jax.systems.networks import student_network, teacher_network
from piflow_jax.systems.shapes import DataShape
from piflow_jax.training.accumulation import accumulate
from piflow_jax.training.state import TrainState
from tests import tiny
from tests.steps import step_of

DATA = DataShape(name="digits", sample_size=8, channels=1, num_classes=10)


def test_parts_are_interleaved_and_averaged():
    x = jnp.arange(12.0).reshape(6, 2)
    seen = []

    def loss_and_grads(part, carried):
        jax.debug.callback(lambda a: seen.append(np.asarray(a)), part, ordered=True)
        return (jnp.mean(part**2), {"w": jnp.mean(part, axis=0)}), carried + 1

    (loss, grads), carried = accumulate(loss_and_grads, x, 3, jnp.int32(0))
    assert carried == 3  # handed from part to part
    jax.effects_barrier()
    np.testing.assert_allclose(loss, np.mean(np.arange(12.0) ** 2), rtol=1e-6)
    np.testing.assert_allclose(grads["w"], np.mean(x, axis=0), rtol=1e-6)
    # Each third of the rows, one behind the other on a device, gives one row to every part.
    np.testing.assert_array_equal(seen, [x[0::3], x[1::3], x[2::3]])


def test_parts_of_what_has_no_values():
    """As the states of prompts without images, which say their shape alone."""
    batch = {"y": jnp.ones((6, 2)), "x": jnp.zeros((6, 8, 8, 0))}

    def loss_and_grads(part, carried):
        assert part["x"].shape == (2, 8, 8, 0)
        return (jnp.mean(part["y"]), {}), carried

    assert accumulate(loss_and_grads, batch, 3)[0][0] == 1


@pytest.mark.slow
@pytest.mark.parametrize("data_free", [False, True])
def test_accumulated_gradients_are_those_of_the_whole_batch(data_free):
    config = tiny.get_config()
    config.train.batch_size = 8
    config.train.data_free = data_free
    config.train.nfe = 2
    config.policy.num_components = 3
    images = jax.random.uniform(jax.random.key(1), (8, 8, 8, 1), minval=-1, maxval=1)
    batch = {"x": images, "condition": jnp.arange(8, dtype=jnp.int32)}
    optimizer = optax.sgd(1.0)
    settings = parse(config)
    teacher = teacher_network(settings.model, DATA)
    student = student_network(settings.model, settings.policy, DATA)

    @jax.jit
    def random():
        """Parameters none of which has a gradient of zero, as fresh heads do."""
        fresh = student.init(jax.random.key(0))
        draw = lambda a: 0.1 * jax.random.normal(jax.random.key(a.size), a.shape)  # noqa: E731
        return jax.tree.map(draw, fresh), teacher.init(jax.random.key(2))

    params, teacher_params = random()
    grads = {}
    for count in (1, 4):
        config.train.microbatches = count
        settings = parse(config)
        step = jax.jit(step_of(settings, DATA, optimizer, student, teacher))
        state, metrics = step(
            TrainState.create(params, optimizer), teacher_params, jax.random.key(3), batch
        )
        grads[count] = jax.tree.map(jnp.subtract, params, state.params), metrics["loss"]
    for whole, parts in zip(*map(jax.tree.leaves, grads.values()), strict=True):
        assert jnp.any(whole != 0)
        np.testing.assert_allclose(parts, whole, rtol=2e-4, atol=2e-5 * np.max(np.abs(whole)))


@pytest.mark.slow
def test_memory_does_not_grow_with_evaluations():
    """Gradients are taken in each segment of a data-free step, so none is kept for later."""
    config = tiny.get_config()
    config.train.data_free = True
    batch = {"x": jnp.zeros((8, 8, 8, 1)), "condition": jnp.arange(8, dtype=jnp.int32)}
    optimizer = optax.sgd(1.0)
    temporary = {}
    for nfe in (2, 8):
        config.train.nfe = nfe
        settings = parse(config)
        teacher = teacher_network(settings.model, DATA)
        student = student_network(settings.model, settings.policy, DATA)
        params = abstract_variables(student)
        state = jax.eval_shape(lambda p: TrainState.create(p, optimizer), params)
        step = jax.jit(step_of(settings, DATA, optimizer, student, teacher))
        lowered = step.lower(state, abstract_variables(teacher), jax.random.key(3), batch)
        temporary[nfe] = step_memory(lowered.compile())["temporary"]
    assert temporary[8] < 1.05 * temporary[2], temporary


@pytest.mark.gpu
def test_a_bfloat16_step_is_the_float32_step_to_its_precision():
    """With attention by cuDNN and the recipe's guidance, as ImageNet's on a GPU."""
    config = tiny.get_config()
    config.model.dit.num_heads = 1  # heads of 16; cuDNN wants multiples of 8
    config.teacher.guidance_scale, config.teacher.guidance_interval = 3.2, (0.0, 0.7)
    images = jax.random.uniform(jax.random.key(1), (8, 8, 8, 1), minval=-1, maxval=1)
    batch = {"x": images, "condition": jnp.arange(8, dtype=jnp.int32)}
    optimizer = optax.sgd(1.0)
    found = {}
    for dtype, attention in (("float32", "xla"), ("bfloat16", "cudnn")):
        config.model.dtype, config.model.attention = dtype, attention
        settings = parse(config)
        teacher = teacher_network(settings.model, DATA)
        student = student_network(settings.model, settings.policy, DATA)
        params, teacher_params = (
            jax.tree.map(
                lambda a: 0.1 * jax.random.normal(jax.random.key(a.size), a.shape),
                module.init(jax.random.key(0)),
            )
            for module in (student, teacher)
        )
        step = jax.jit(step_of(settings, DATA, optimizer, student, teacher))
        state = TrainState.create(params, optimizer)
        state, metrics = step(state, teacher_params, jax.random.key(3), batch)
        found[dtype] = {name: float(value) for name, value in metrics.items()}
        assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(state.params))
    for name in ("loss", "grad_norm"):
        assert found["bfloat16"][name] == pytest.approx(found["float32"][name], rel=0.03)
