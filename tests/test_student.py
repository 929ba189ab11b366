"""Students in notebooks: every way to load one, samples that do not depend on their company."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import piflow_jax
from piflow_jax.config import parse
from piflow_jax.convert import to_torch_state, write_safetensors
from piflow_jax.evaluation import IndexSampler
from piflow_jax.flow.rollout import rollout
from piflow_jax.flow.schedule import TimeWarp
from piflow_jax.runs.checkpoint import Checkpointer
from piflow_jax.systems.assembly import Systems
from piflow_jax.systems.networks import student_network, teacher_network
from piflow_jax.systems.shapes import DataShape
from piflow_jax.systems.spec import student_spec, teacher_spec
from piflow_jax.training.state import TrainState
from tests import tiny
from tests.compiled import compilations, on_devices
from tests.saved_runs import save_stage
from tests.students import moved

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
    fresh = jax.jit(lambda: module.init(jax.random.key(0)))()
    params = moved(fresh)
    state = TrainState(step=jnp.int32(1), params=fresh, ema_params=params, opt_state=())
    workdir = tmp_path_factory.mktemp("run")
    with Checkpointer(workdir / "student" / "checkpoints") as checkpointer:
        checkpointer.save(1, state, data_state={}, config={}, spec=student_spec(settings, DATA))
    metadata = {"piflow_jax": json.dumps(student_spec(settings, DATA))}
    write_safetensors(
        workdir / "student.safetensors", to_torch_state(module.module, params), metadata
    )
    write_safetensors(workdir / "official.safetensors", to_torch_state(module.module, params))
    return workdir, params


def test_a_runs_teacher_is_its_network(settings, tmp_path):
    module = teacher_network(settings.model, DATA)
    params = jax.jit(lambda: module.init(jax.random.key(0)))()
    params = moved(params)
    save_stage(tmp_path, "teacher", params, teacher_spec(settings, DATA))
    x, t, labels = jax.random.normal(jax.random.key(1), (3, 8, 8, 1)), jnp.full(3, 0.5), LABELS[:3]
    teacher, loaded = piflow_jax.load_teacher(tmp_path, guidance_scale=2.0)
    apply = jax.jit(module.apply)
    cond, uncond = (apply(params, x, t, c) for c in (labels, 0 * labels + 10))
    found = jax.jit(teacher.velocity)(loaded, x, t, labels)
    np.testing.assert_allclose(found, 2 * cond - uncond, rtol=1e-4, atol=1e-5)
    # Without a scale it is guided as the run's student was taught, where there is one.
    assert piflow_jax.load_teacher(tmp_path)[0].guidance_scale == 1
    config = {"teacher.guidance_scale": 3.0, "teacher.guidance_interval": [0.1, 0.6]}
    spec = student_spec(settings, DATA)
    with Checkpointer(tmp_path / "student" / "checkpoints") as checkpointer:
        assert piflow_jax.load_teacher(tmp_path)[0].guidance_scale == 1
        checkpointer.save(1, {"a": np.zeros(1)}, data_state={}, config=config, spec=spec)
    for given, scale in ({}, 3.0), ({"guidance_scale": 1.5}, 1.5):
        teacher, _ = piflow_jax.load_teacher(tmp_path, **given)
        assert (teacher.guidance_scale, teacher.guidance_interval) == (scale, (0.1, 0.6))
    with pytest.raises(ValueError, match="holds a teacher, not a student"):
        piflow_jax.load(tmp_path / "teacher" / "checkpoints")
    with pytest.raises(FileNotFoundError, match="nowhere: no such checkpoint"):
        piflow_jax.load_teacher(tmp_path / "nowhere")


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
        assert other.network == student.network


def test_what_cannot_be_loaded_says_why(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such checkpoint"):
        piflow_jax.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="does not say how its student samples; pass"):
        piflow_jax.load(run[0] / "official.safetensors")
    with pytest.raises(ValueError, match="num_classes: given 1000, the state has 10"):
        piflow_jax.load(run[0] / "official.safetensors", tiny.get_config())


def test_samples_are_those_that_a_report_measures(run, student, settings):
    sampler = IndexSampler(
        Systems.of(settings, DATA).student_sampler(),
        shape=DATA.shape,
        conditions=np.arange(10),
        batch_size=5,
        seed=3,
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


def test_few_programs_serve_all_batch_sizes(run, monkeypatch):
    monkeypatch.setattr("piflow_jax.student._LARGEST", 32)
    student = piflow_jax.load(run[0])
    labels = np.arange(290) % 10
    student.sample(0, labels[:1], substeps=4)
    with compilations() as compiled:
        for power in range(1, 6):
            student.sample(0, labels[: 2**power], substeps=4)
    assert len(compiled) == 5  # with the one above, powers of two from 1 to 32
    with compilations() as compiled:
        whole = np.asarray(student.sample(0, labels, substeps=4))
        for count in (*range(1, 12), *range(15, 20), 31, 32, 33, 64, 88, 163):
            part = student.sample(0, labels[:count], substeps=4)
            assert isinstance(part, jax.Array) and part.shape == (count, 8, 8, 1)
            np.testing.assert_allclose(part, whole[:count], rtol=1e-4, atol=1e-5)
        for count in (5, 6, 7):  # the options that are arrays
            given = {"noise": whole[:count], "x": whole[:count], "start": 0.5}
            student.sample(0, labels[:count], substeps=4, **given)
    assert compiled == ["jit(sample)"]  # of eight samples with `noise` and `x`
    # The same labels in a later call are other samples.
    assert np.abs(whole[160:170] - whole[:10]).max(axis=(1, 2, 3)).min() > 0.1


def test_a_sample_of_one_program_is_not_waited_for(student, monkeypatch):
    """What needs no trimming stays on its device; nothing copies it to the host."""
    student.sample(0, LABELS[:8], substeps=16)  # compiles, which takes NumPy
    monkeypatch.setattr(np, "concatenate", None)
    assert student.sample(0, LABELS[:8], substeps=16).shape == (8, 8, 8, 1)


def test_seeds_and_keys_of_both_kinds_are_the_same(student):
    expected = student.sample(7, LABELS[:4], substeps=16)
    keys = (np.int64(7), np.asarray(7), jnp.asarray(7), jax.random.key(7), jax.random.PRNGKey(7))
    for key in (*keys, np.asarray(jax.random.PRNGKey(7))):
        np.testing.assert_array_equal(student.sample(key, LABELS[:4], substeps=16), expected)


def test_image_to_image_stays_near_the_image_at_little_noise(student):
    x = np.asarray(student.sample(0, LABELS[:4], substeps=64))
    near = student.sample(1, LABELS[:4], substeps=64, start=0.01, x=x)
    assert np.abs(near - x).max() < 0.2


@pytest.mark.parametrize("key", [0.5, jax.random.split(jax.random.key(0)), np.zeros((2, 2))])
def test_what_is_no_key_says_so(student, key):
    with pytest.raises(ValueError, match="key must be a seed or one PRNG key, got an array"):
        student.sample(key, LABELS[:1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_noise_is_float32_whatever_the_dtype_of_the_network(run, dtype):
    student = piflow_jax.load(run[0], dtype=dtype)
    # A narrow mixture at velocity zero: every sample is its own noise.
    params = jax.tree.map(jnp.zeros_like, student.params)
    params["params"]["head"]["logstd_out"]["bias"] -= 20
    still = dataclasses.replace(student, params=params)
    found = still.sample(5, LABELS, substeps=16)
    for i, sample in enumerate(found):
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(5), i), (8, 8, 1), jnp.float32)
        np.testing.assert_allclose(sample, noise, atol=1e-5)
    assert found.dtype == jnp.float32
    given = np.asarray(jax.random.normal(jax.random.key(1), found.shape))
    np.testing.assert_allclose(still.sample(5, LABELS, substeps=16, noise=given), given, atol=1e-5)
    x = np.ones_like(given)
    mixed = still.sample(5, LABELS, substeps=16, noise=given, x=x, start=0.25)
    np.testing.assert_allclose(mixed, 0.75 * x + 0.25 * given, atol=1e-5)


def test_nothing_of_the_callers_is_donated(student):
    x = jnp.ones((4, 8, 8, 1))
    mine = [x, x + 1, jax.random.PRNGKey(3), jnp.arange(4), *jax.tree.leaves(student.params)]
    copies = jax.tree.map(np.array, mine)
    student.sample(mine[2], mine[3], substeps=16, start=0.5, x=mine[0], noise=mine[1])
    assert not any(leaf.is_deleted() for leaf in mine)
    jax.tree.map(np.testing.assert_array_equal, mine, copies)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([[1]], {}, r"labels must be integers \[N\], got int64\[1, 1\]"),
        ([1.0], {}, r"labels must be integers \[N\], got float64"),
        ([10], {}, r"labels must be in \[0, 10\), got 10 to 10"),
        ([1], {"start": 0.5}, "start below 1 and x go together"),
        ([1], {"start": 0.5, "x": np.zeros((2, 8, 8, 1))}, r"x must be \[1, 8, 8, 1\]"),
        ([1], {"start": 0.0, "x": np.zeros((1, 8, 8, 1))}, r"start must be in \(0, 1\]"),
        ([1], {"noise": np.zeros((8, 8, 1))}, r"noise must be \[1, 8, 8, 1\], got \[8, 8, 1\]"),
        ([1], {"nfe": -1}, "nfe must be at least 1"),
        ([1], {"nfe": 0}, "nfe must be at least 1, got 0"),
        ([1], {"temperature": 1.5}, r"temperature must be in \(0, 1\], got 1.5"),
        ([1], {"temperature": 0.0}, r"temperature must be in \(0, 1\], got 0.0"),
        ([1], {"temperature": float("nan")}, r"temperature must be in \(0, 1\], got nan"),
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


EIGHT_DEVICES = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
import piflow_jax

student = piflow_jax.load(sys.argv[1])
labels = np.arange(23) % 10
whole = np.asarray(student.sample(0, labels, substeps=16, h=1.0))
for count in (3, 8):
    spread = student.on(jax.devices()[:count])
    found = spread.sample(0, labels, substeps=16, h=1.0)
    np.testing.assert_allclose(found, whole, rtol=1e-4, atol=1e-5)

mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
split = jax.NamedSharding(mesh, P("data"))
choose, calls, on_tpus = piflow_jax.student._program, [], []

def recorded(*choice):
    sampler = choose(*choice)

    def record(*args):
        calls.append((sampler, args))
        # What this call would be on eight TPUs.
        on_tpus.append(sampler.trace(*args).lower(lowering_platforms=("tpu",)).as_text())
        return sampler(*args)

    return record

piflow_jax.student._program = recorded
spread.sample(0, np.zeros(32, np.int32), substeps=16, h=1.0)
for count, places in ((24, 8), (23, 1)):
    assert len(spread.sample(0, labels[:1].repeat(count), substeps=16, h=1.0).devices()) == places
sampler, args = calls[0]
assert "tpu_custom_call" in on_tpus[0], "the rollout's kernel, split over the devices"
assert args[2]["condition"].sharding.is_equivalent_to(split, 1)
text = sampler.lower(*args).compile().as_text()
assert "f32[4,8,8,1]" in text and "f32[32,8,8,1]" not in text, "each device draws its own"
x = jax.random.normal(jax.random.key(1), (8, 8, 8, 1))

def endpoint(x, labels):
    one = jnp.ones_like(x[:, 0, 0, 0])
    policy = student.policy(x, one, labels)
    return piflow_jax.rollout(policy, x, one, 0 * one, piflow_jax.TimeWarp(1.0), 16)[0]

each = jax.jit(jax.shard_map(endpoint, mesh=mesh, in_specs=P("data"), out_specs=P("data")))
np.testing.assert_allclose(each(x, labels[:8]), jax.jit(endpoint)(x, labels[:8]), atol=1e-5)
print("same")
"""


def test_devices_share_the_work_and_change_no_sample(run):
    done = subprocess.run(
        [sys.executable, "-c", EIGHT_DEVICES, str(run[0])],
        env=os.environ | on_devices(8),
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.stdout == "same\n", done.stderr
    with pytest.raises(ValueError, match="at least one device"):
        piflow_jax.load(run[0]).on([])


IMPORT = """
import sys, piflow_jax
for name in piflow_jax.__all__:
    getattr(piflow_jax, name)
print(*{module.split(".")[0] for module in sys.modules})
"""
# Each takes half a second to ten of them, or is not installed with the package alone.
HEAVY = {
    "clu", "datasets", "diffusers", "fontTools", "gradio", "IPython", "matplotlib", "pandas",
    "sklearn", "tensorboard", "tensorflow", "tensorflow_datasets", "torch", "transformers",
}  # fmt: skip


def test_every_name_is_imported_without_heavy_packages():
    done = subprocess.run(
        [sys.executable, "-c", IMPORT],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stderr
    loaded = set(done.stdout.split())
    assert "piflow_jax" in loaded
    assert not HEAVY & loaded
