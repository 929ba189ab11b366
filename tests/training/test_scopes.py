"""The step's operations are named after its parts, backward passes and loops too."""

import re

import jax
import jax.numpy as jnp
import pytest

from piflow_jax.config import parse
from piflow_jax.systems.networks import student_network, teacher_network
from piflow_jax.systems.shapes import DataShape
from piflow_jax.training.optimizer import make_optimizer
from piflow_jax.training.state import TrainState
from tests import tiny
from tests.steps import step_of

SCOPES = {"student", "teacher", "policy", "optimizer"}
DATA = DataShape(name="digits", sample_size=8, channels=1, num_classes=10)


def compiled_names(config):
    """`(opcode, op_name)` of the step's operations, compiled for the CPU."""
    settings = parse(config)
    teacher = teacher_network(settings.model, DATA)
    student = student_network(settings.model, settings.policy, DATA)
    optimizer = make_optimizer(settings.train.optimizer, settings.train.steps)
    step = step_of(settings, DATA, optimizer, student, teacher)

    def init():
        return TrainState.create(student.init(jax.random.key(0)), optimizer)

    batch = {"x": jax.ShapeDtypeStruct((8, 8, 8, 1), jnp.float32)}
    batch["condition"] = jax.ShapeDtypeStruct((8,), jnp.int32)
    weights = jax.eval_shape(lambda: teacher.init(jax.random.key(0)))
    key = jax.eval_shape(lambda: jax.random.key(0))
    lowered = jax.jit(step).lower(jax.eval_shape(init), weights, key, batch)
    # Machine code is of no interest.
    text = lowered.compile({"xla_backend_optimization_level": 0}).as_text()
    return re.findall(r' ([\w\-]+)\([^\n]*op_name="([^"]*)"', text)


def scope(op_name):
    """The innermost scope."""
    return next((w for w in reversed(re.findall(r"\w+", op_name)) if w in SCOPES), None)


@pytest.mark.parametrize("data_free", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_product_and_loop_belongs_to_a_part(data_free):
    config = tiny.get_config()
    config.train.microbatches = 2
    config.train.data_free = data_free
    config.train.nfe = 2
    config.teacher.guidance_scale = 2.0
    config.train.optimizer.kind = "adamw"
    names = compiled_names(config)
    products = [name for opcode, name in names if "dot_general" in name]
    # Of the teacher forwards only; of the student forwards and backwards.
    assert {scope(name) for name in products} == {"student", "teacher"}
    backward = [name for name in products if "transpose" in name]
    assert backward and {scope(name) for name in backward} == {"student"}
    assert all("jvp(student)" in name for name in products if scope(name) == "student")
    # Rollouts: exponentials of mixture weights within a loop.
    rolled = [name for _, name in names if name.endswith("while/body/exp")]
    assert rolled and {scope(name) for name in rolled} == {"policy"}
    assert [name for _, name in names if "transpose(jvp(policy))" in name]
    # Adam's second moment and its root.
    roots = [name for _, name in names if name.endswith("/sqrt") and scope(name) == "optimizer"]
    assert roots
