"""Students in notebooks: every way to load one, samples that do not depend on their company."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import piflow_jax
from piflow_jax.config import parse
from piflow_jax.convert import to_torch_state, write_safetensors
from piflow_jax.evaluation import IndexSampler
from piflow_jax.flow.rollout import rollout
from piflow_jax.flow.schedule import TimeWarp
from piflow_jax.stages.systems import student_sampler
from piflow_jax.training.checkpoint import Checkpointer
from piflow_jax.training.networks import DataShape, init_params, student_network, student_spec
from piflow_jax.training.state import TrainState

DATA = DataShape(name="digits", sample_size=8, channels=1, num_classes=10)
LABELS = np.arange(23) % 10


@pytest.fixture(scope="module")
def settings():
    config = tiny.get_config()
    config.train.nfe = 2
    return parse(config)


@pytest.fixture(scope="module")
def run(settings, tmp_path_factory):
    """A work directory with a student, its average moved away from its parameters."""
    module = student_network(settings.model, settings.policy, DATA)
    fresh = jax.jit(lambda: init_params(module, jax.random.key(0)))()
    params = jax.tree.map(
        lambda leaf: leaf + 0.1 * jnp.sin(jnp.arange(leaf.size)).reshape(leaf.shape), fresh
    )
    state = TrainState(step=jnp.int32(1), params=fresh, ema_params=params, opt_state=())
    workdir = tmp_path_factory.mktemp("run")
    with Checkpointer(workdir / "student" / "checkpoints") as checkpointer:
        checkpointer.save(1, state, data_state={}, config={}, spec=student_spec(settings, DATA))
    metadata = {"piflow_jax": json.dumps(student_spec(settings, DATA))}
    write_safetensors(workdir / "student.safetensors", to_torch_state(module, params), metadata)
    write_safetensors(workdir / "official.safetensors", to_torch_state(module, params))
    return workdir, params


@pytest.fixture(scope="module")
def student(run):
    return piflow_jax.load(run[0])


def test_a_checkpoint_and_its_export_are_the_same_student(run, student):
    workdir, params = run
    assert (student.settings.train.nfe, student.settings.data) == (2, DATA)
    for path in (workdir / "student" / "checkpoints", workdir / "student.safetensors"):
        other = piflow_jax.load(path)
        jax.tree.map(np.testing.assert_array_equal, other.params, params)
        assert other.settings == student.settings
        assert other.module == student.module


def test_what_cannot_be_loaded_says_why(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such checkpoint"):
        piflow_jax.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="does not say how its student samples; pass"):
        piflow_jax.load(run[0] / "official.safetensors")
    with pytest.raises(ValueError, match="num_classes: given 1000, the state has 10"):
        piflow_jax.load(run[0] / "official.safetensors", tiny.get_config())


def test_samples_are_those_that_a_report_measures(run, student, settings):
    sampler = IndexSampler(
        student_sampler(settings, DATA), shape=DATA.shape, classes=range(10), batch_size=5, seed=3
    )
    expected = sampler(run[1], len(LABELS))
    found = student.sample(3, LABELS, substeps=settings.evaluation.substeps)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("h", [0.0, 1.0])
def test_a_sample_does_not_depend_on_the_others(student, h, monkeypatch):
    whole = student.sample(0, LABELS, substeps=16, h=h)
    assert whole.shape == (23, 8, 8, 1)
    for count in (1, 2, 5, 8):
        part = student.sample(0, LABELS[:count], substeps=16, h=h)
        np.testing.assert_allclose(part, whole[:count], rtol=1e-4, atol=1e-5)
    monkeypatch.setattr("piflow_jax.student._LARGEST", 8)
    np.testing.assert_allclose(
        student.sample(0, LABELS, substeps=16, h=h), whole, rtol=1e-4, atol=1e-5
    )
    assert np.abs(student.sample(1, LABELS, substeps=16, h=h) - whole).max() > 0.1


def test_noise_between_segments_differs_by_sample(student):
    same = np.zeros(8, np.int32)
    x = np.zeros((8, 8, 8, 1), np.float32)
    fixed = student.sample(0, same, substeps=16, start=1e-3, x=x)
    assert np.std(fixed, axis=0).max() < 0.1
    drawn = student.sample(0, same, substeps=16, h=float("inf"))
    assert np.std(drawn, axis=0).min() > 1e-3


def test_few_programs_serve_all_batch_sizes(run):
    student = piflow_jax.load(run[0])
    for count in (1, 3, 4, 6, 9, 16, 260, 512):
        student.sample(count, np.arange(count) % 10, substeps=4)
    ((_, sampler),) = student._samplers.items()
    assert sampler._cache_size() == 5  # 1, 4, 8, 16 and 256


def test_seeds_and_keys_of_both_kinds_are_the_same(student):
    expected = student.sample(7, LABELS[:4], substeps=16)
    for key in (np.int64(7), jax.random.key(7), jax.random.PRNGKey(7)):
        np.testing.assert_array_equal(student.sample(key, LABELS[:4], substeps=16), expected)


def test_image_to_image_stays_near_the_image_at_little_noise(student):
    x = np.asarray(student.sample(0, LABELS[:4], substeps=64))
    near = student.sample(1, LABELS[:4], substeps=64, start=0.01, x=x)
    assert np.abs(near - x).max() < 0.2


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([[1]], {}, r"labels must be integers \[N\], got int64\[1, 1\]"),
        ([1.0], {}, r"labels must be integers \[N\], got float64"),
        ([10], {}, r"labels must be in \[0, 10\), got 10 to 10"),
        ([1], {"start": 0.5}, "start below 1 and x go together"),
        ([1], {"start": 0.5, "x": np.zeros((2, 8, 8, 1))}, r"x must be \[1, 8, 8, 1\]"),
        ([1], {"start": 0.0, "x": np.zeros((1, 8, 8, 1))}, r"start must be in \(0, 1\]"),
        ([1], {"nfe": -1}, "nfe must be at least 1"),
    ],
)
def test_what_cannot_be_sampled_says_why(student, labels, options, message):
    with pytest.raises(ValueError, match=message):
        student.sample(0, labels, **options)


def test_policies_compose_with_transformations(student):
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    one, labels = jnp.ones(2), jnp.asarray([3, 4])

    @jax.jit
    def endpoint(params):
        policy = student.policy(x, one, labels, params)
        return rollout(policy, x, one, 0 * one, TimeWarp(1.0), 16)[0]

    # What `sample` does, in the caller's own jit; a single segment is no sample of two.
    assert np.isfinite(endpoint(student.params)).all()

    def power(params):
        return jnp.mean(student.policy(x, one, labels, params).velocity(x, 0.5 * one) ** 2)

    gradient = jax.jit(jax.grad(power))(student.params)
    norms = [float(jnp.linalg.norm(leaf)) for leaf in jax.tree.leaves(gradient)]
    assert np.isfinite(norms).all() and sum(norms) > 0

    def velocity(x, label):
        return student.policy(x[None], one[:1], label[None]).velocity(x[None], one[:1])[0]

    each = jax.jit(jax.vmap(velocity))(x, labels)
    together = jax.jit(lambda: student.policy(x, one, labels).velocity(x, one))()
    np.testing.assert_allclose(each, together, rtol=1e-4, atol=1e-5)
