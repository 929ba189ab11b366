"""The PyTorch twin of the benchmarks does our work: loss, gradients and samples in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax.config import parse
from piflow_jax.flow.sampling import few_step_sample
from piflow_jax.flow.schedule import TimeWarp
from piflow_jax.systems.assembly import guided
from piflow_jax.systems.networks import student_network, teacher_network
from piflow_jax.systems.policies import policy_factory
from piflow_jax.systems.shapes import DataShape
from piflow_jax.training.objectives import (
    Draws,
    data_dependent_loss,
)
from piflow_jax.training.optimizer import make_optimizer
from tests.steps import call
from tests.tiny import get_config

torch = pytest.importorskip("torch")
twin = pytest.importorskip("benchmarks.torch_twin")

SHAPE = DataShape(name="points", sample_size=4, channels=3, num_classes=5)
BATCH = 3


@pytest.fixture
def system(x64):
    """Settings, modules and float64 weights without zeros, with our network's axes in both."""
    settings = get_config()
    settings.model.dit.time_scale = 10.0
    settings.teacher.guidance_scale = 2.0
    settings.teacher.guidance_interval = (0.0, 0.4)
    settings.train.nfe = 2
    settings.train.gm_dropout = 0.5
    config = parse(settings)
    modules = (
        student_network(config.model, config.policy, SHAPE).module.clone(dtype=None),
        teacher_network(config.model, SHAPE).module.clone(dtype=None),
    )
    rng = np.random.default_rng(0)

    def weights(module):
        params = jax.eval_shape(module.init, jax.random.key(0), *module.example())
        return jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape)), params)

    return config, modules, tuple(weights(module) for module in modules), rng


def channels_first(x):
    return torch.from_numpy(np.moveaxis(np.asarray(x), -1, 1).copy())


def networks(config, modules, params):
    policy = config.policy
    student = twin.from_flax(modules[0], params[0], policy.num_components, policy.logstd_hidden)
    return student, twin.from_flax(modules[1], params[1])


@pytest.mark.parametrize("solver", ["euler", "multistep"])
def test_loss_and_gradients_are_ours(system, solver):
    config, modules, params, rng = system
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, solver=solver))
    images, noise = rng.standard_normal((2, BATCH, 4, 4, 3))
    labels = np.array([0, 4, 2])
    tau, student_u = np.array([0.9, 0.2, 0.6]), rng.uniform(size=(BATCH, 2))
    dropout = rng.uniform(size=(BATCH, config.policy.num_components))

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def ours(student_params):
        return data_dependent_loss(
            call(functools.partial(modules[0].apply, student_params)),
            (),
            guided(modules[1], config.teacher, 5).bind(params[1], labels),
            policy_factory(config.policy, config.train),
            jnp.asarray(images),
            jnp.asarray(labels),
            jnp.asarray(tau),
            jnp.asarray(noise),
            Draws(jnp.asarray(student_u), jnp.zeros((BATCH, 1)), jnp.asarray(dropout)),
            0,
            config.train,
        )

    (loss, _), grads = ours(params[0])
    student, teacher = networks(config, modules, params)
    step = twin.Distillation(student, teacher, config, SHAPE.num_classes)
    draws = {"tau": tau, "student": student_u, "dropout": dropout}
    draws = {name: torch.from_numpy(value) for name, value in draws.items()}
    draws["noise"] = channels_first(noise)
    theirs = step.loss(channels_first(images), torch.from_numpy(labels), draws)
    theirs.backward()
    assert float(theirs.detach()) == pytest.approx(float(loss), rel=1e-8)
    expected = twin.from_flax(modules[0], grads, config.policy.num_components, 8)
    for (name, theirs), ours in zip(student.named_parameters(), expected.parameters(), strict=True):
        scale = ours.abs().max()
        assert (theirs.grad - ours).abs().max() <= 1e-5 * scale + 1e-9, name


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.corrector.kind", "critic"),
        ("train.mixing_steps", 5),
        ("train.nfe_choices", (1, 2)),
        ("train.data_free", True),
        ("teacher.guidance_range", (1.0, 4.0)),
    ],
)
def test_a_step_that_is_not_ours_is_refused(key, value):
    """The harness leaves it out with the reason; timed, it would have had less to do."""
    settings = get_config()
    settings.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=f"config.{key} = "):
        twin.Distillation(None, None, parse(settings), 5)


def test_samples_are_ours(system):
    config, modules, params, rng = system
    noise, labels = rng.standard_normal((BATCH, 4, 4, 3)), np.array([1, 3, 0])
    factory = policy_factory(config.policy, config.train, sampling=True)
    ours = jax.jit(
        lambda noise: few_step_sample(
            lambda x, s: factory(modules[0].apply(params[0], x, s, labels), x, s),
            noise,
            2,
            TimeWarp(config.train.shift),
            total_substeps=8,
        )
    )(jnp.asarray(noise))
    student, _ = networks(config, modules, params)
    with torch.no_grad():
        theirs = twin.few_step_sample(
            student, channels_first(noise), torch.from_numpy(labels), 2, 8, config.train.shift
        )
    np.testing.assert_allclose(np.moveaxis(theirs.numpy(), 1, -1), ours, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [pytest.param("adamw", marks=pytest.mark.slow), "muon"])
def test_a_step_is_ours(system, kind):
    """The first update; beside Muon ours has Nesterov's momentum, which PyTorch's AdamW has not."""
    _, modules, params, rng = system
    settings = get_config()
    optimizer = settings.teacher.optimizer
    optimizer.kind, optimizer.warmup_steps, optimizer.grad_clip = kind, 0, 0.5
    optimizer_config = parse(settings).teacher.optimizer
    grads = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape)), params[1])
    optimizer = make_optimizer(optimizer_config, 100)
    updates, _ = optimizer.update(grads, optimizer.init(params[1]), params[1])
    expected = twin.from_flax(modules[1], jax.tree.map(jnp.add, params[1], updates))
    network = twin.from_flax(modules[1], params[1])
    trainer = twin.Trainer(network, optimizer_config)
    wanted = twin.from_flax(modules[1], grads)
    trainer.advance(
        sum((p * g).sum() for p, g in zip(network.parameters(), wanted.parameters(), strict=True))
    )
    for (name, p), e in zip(network.named_parameters(), expected.parameters(), strict=True):
        if kind == "adamw" or (name.startswith("blocks") and p.ndim == 2):
            np.testing.assert_allclose(p.detach(), e.detach(), atol=2e-6, err_msg=name)
