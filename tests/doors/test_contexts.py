"""Samples are the same in every context, from every generator, by one program for all numbers."""

import ast
import contextlib
import dataclasses
import gc
import os
import pickle
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import piflow_jax
from piflow_jax.flow.sampling import sample_segments
from piflow_jax.flow.schedule import sampling_times
from piflow_jax.keys import as_key, seed_key
from piflow_jax.student import _program
from tests.compiled import compilations, on_devices
from tests.students import IMAGES, LABELS, ONE, WARP, X, few, mixture, sampled

ROOT = Path(__file__).parents[2]


def teacher(**options):
    shape = {"predict": lambda params, z, s, cond: jnp.tanh(z), "shape": (4, 1)}
    return piflow_jax.Teacher(**(shape | options))


# --- Numbers are arguments of a program -----------------------------------------------------------


def test_new_numbers_compile_nothing(student, samples):
    whole = {"substeps": 8, "x": np.ones((3, 8, 8, 1)), "start": 0.5}
    student.sample(0, LABELS, **whole)
    other = dataclasses.replace(student, params=jax.tree.map(lambda a: 1.1 * a, student.params))
    with compilations() as compiled:
        for temperature in (1.0, 0.9, 0.31):
            student.sample(0, LABELS, substeps=8, temperature=temperature)
        for h in (0.0, 0.2, 1.0, float("inf")):
            student.sample(0, LABELS, substeps=8, h=h)
        for start in (0.1, 0.7, 0.99):
            student.sample(0, LABELS, **(whole | {"start": start}))
        other.sample(1, LABELS, substeps=8)  # nor do other weights
    assert compiled == []


def test_a_program_for_all_numbers_gives_what_programs_of_their_own_give():
    warp, key = piflow_jax.TimeWarp(3.2), seed_key(1)

    @jax.jit
    def one_program(times, temperature):
        return sample_segments(
            mixture, X, times, warp, total_substeps=8, temperature=temperature, key=key
        )

    for h, start, temperature in ((0.0, 1.0, 1.0), (0.3, 1.0, 0.5), (np.inf, 0.6, 1.0)):
        own = few(3, warp=warp, h=h, start=start, temperature=temperature, key=key)
        found = one_program(sampling_times(3, warp, h=h, start=start), temperature)
        np.testing.assert_allclose(found, own, rtol=0, atol=2e-5)
    assert one_program._cache_size() == 1


def test_a_teachers_guidance_is_an_argument_of_a_program():
    def predict(params, z, s, cond):
        return z * cond[:, None, None]

    def velocity(scale):
        guide = teacher(predict=predict, null_cond=np.float32(0), guidance_scale=scale)
        return guide.velocity(None, X, ONE, 2 * ONE)

    program = jax.jit(velocity)
    for scale in (1.0, 1.5, 4.0):
        np.testing.assert_allclose(program(scale), 2 * scale * X, rtol=1e-6)
        np.testing.assert_allclose(velocity(scale), 2 * scale * X, rtol=1e-6)
    assert program._cache_size() == 1


def test_programs_that_were_not_used_for_long_are_let_go(student):
    settings = student.settings
    choice = (student.network, settings.policy, settings.train, (8, 8, 1), 2)
    most = _program.cache_info().maxsize
    first = weakref.ref(_program(*choice, 1001, "euler"))
    for substeps in range(1002, 1002 + most):
        assert _program(*choice, substeps, "euler")
    gc.collect()
    assert first() is None and _program.cache_info().currsize == most


# --- Students as values ---------------------------------------------------------------------------


def test_a_replaced_student_samples_with_its_own_settings(student, samples):
    train = dataclasses.replace(student.settings.train, shift=5.0)
    settings = dataclasses.replace(student.settings, train=train)
    found = sampled(dataclasses.replace(student, settings=settings))
    right = sampled(piflow_jax.Student(student.network, student.params, settings))
    np.testing.assert_array_equal(found, right)
    assert np.abs(found - samples).max() > 0.1
    np.testing.assert_array_equal(sampled(student), samples)


def test_a_student_that_has_sampled_is_pickled(student, samples):
    for one in (student, student.on(jax.devices()[:1])):
        sampled(one)
        other = pickle.loads(pickle.dumps(one))
        np.testing.assert_array_equal(sampled(other), samples)
        assert other.settings == student.settings and other.devices is None


# --- Contexts -------------------------------------------------------------------------------------


@contextlib.contextmanager
def configured(name, value):
    previous = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        yield
    finally:
        jax.config.update(name, previous)


def mesh_is_set(kind):
    return jax.set_mesh(jax.make_mesh((1,), ("data",), axis_types=(kind,)))


CONTEXTS = {
    "mesh of auto axes": lambda: mesh_is_set(AxisType.Auto),
    "mesh of explicit axes": lambda: mesh_is_set(AxisType.Explicit),
    "x64": lambda: configured("jax_enable_x64", True),
    "no jit": jax.disable_jit,
    "rbg": lambda: configured("jax_default_prng_impl", "rbg"),
    "strict ranks": lambda: jax.numpy_rank_promotion("raise"),
    "no implicit transfers": lambda: jax.transfer_guard("disallow"),
}


@pytest.mark.parametrize(
    "context",
    [
        pytest.param("no jit", marks=pytest.mark.slow),
        *(name for name in CONTEXTS if name != "no jit"),
    ],
)
def test_samples_are_the_same_in_every_context(student, samples, context):
    with CONTEXTS[context]():
        found = sampled(student)
    np.testing.assert_allclose(found, samples, rtol=0, atol=1e-5)
    assert found.dtype == np.float32


def test_threads_sample_the_same(student, samples):
    found = []
    threads = [threading.Thread(target=lambda: found.append(sampled(student))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for one in found:
        np.testing.assert_array_equal(one, samples)


def test_a_sampler_of_a_students_policy_is_exported(student):
    def sample(params, noise, labels):
        return piflow_jax.few_step_sample(
            lambda x, t: student.policy(x, t, labels, params), noise, 2, WARP, total_substeps=8
        )

    arguments = (student.params, IMAGES, np.arange(2))
    expected = jax.jit(sample)(*arguments)
    exported = jax.export.export(jax.jit(sample))(*arguments)
    found = jax.export.deserialize(exported.serialize()).call(*arguments)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


FOUR_DEVICES = """
import jax, numpy as np, piflow_jax
from jax.sharding import AxisType
from tests.students import LABELS, IMAGES, ONE, WARP, sampled, tiny_student

student = tiny_student()
one_device, four = student, student.on(jax.devices())
expected = sampled(student)
labels = np.arange(600) % 10

def rolled(x, labels):
    return piflow_jax.rollout(student.policy(x, ONE, labels), x, ONE, 0 * ONE, WARP, 8)[0]

end = jax.jit(rolled)(IMAGES, LABELS[:2])
many = np.asarray(one_device.sample(0, labels, substeps=2))
for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        for who in (one_device, four):
            np.testing.assert_allclose(sampled(who), expected, atol=1e-5)
        np.testing.assert_allclose(jax.jit(rolled)(IMAGES, LABELS[:2]), end, atol=1e-5)
with jax.default_device(jax.devices()[2]):
    np.testing.assert_allclose(sampled(one_device), expected, atol=1e-5)
np.testing.assert_allclose(four.sample(0, labels, substeps=2), many, atol=1e-5)
np.save(__import__("sys").argv[1], many)
print("same")
"""


@pytest.mark.slow
def test_samples_are_the_same_on_meshes_and_devices_under_any_generator(student, tmp_path):
    """Eight contexts in a process of four devices, whose default generator is another one."""
    done = subprocess.run(
        [sys.executable, "-c", FOUR_DEVICES, str(tmp_path / "many.npy")],
        env=os.environ | on_devices(4) | {"JAX_DEFAULT_PRNG_IMPL": "rbg"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "same\n", done.stderr
    here = student.sample(0, np.arange(600) % 10, substeps=2)
    np.testing.assert_allclose(np.load(tmp_path / "many.npy"), here, rtol=0, atol=1e-4)


# --- Random streams -------------------------------------------------------------------------------

SEEDS = (0, 7, 2**31, 2**40, -1)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_seed_is_the_same_key_under_any_generator(seed):
    with configured("jax_enable_x64", True):
        words = jax.random.key_data(jax.random.key(seed, impl="threefry2x32"))
    expected = [0, 2**32 - 1] if seed < 0 else words  # as with 32-bit types
    for implementation in ("threefry2x32", "rbg", "unsafe_rbg"):
        with configured("jax_default_prng_impl", implementation):
            for key in (seed, np.int64(seed), jax.random.key(seed)):
                if seed in (2**31, 2**40) and isinstance(key, jax.Array):
                    continue  # JAX's own keys of 32-bit types do not hold them
                found = jax.random.key_data(as_key(key))
                np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(jax.random.key_data(as_key(jax.random.PRNGKey(7))), [0, 7])


def test_noise_between_segments_depends_on_a_samples_own_key_under_any_generator():
    for implementation in ("threefry2x32", "rbg"):
        keys = jax.random.split(jax.random.key(3, impl=implementation), 2)
        both = few(h=1.0, key=keys)
        alone = [few(h=1.0, key=keys[i : i + 1], noise=X[i : i + 1]) for i in range(2)]
        np.testing.assert_allclose(both, jnp.concatenate(alone), rtol=0, atol=1e-5)


def key_makers(source):
    """Lines of a program that make a key of whatever the default is."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        made = name.endswith(("random.key", "PRNGKey", "wrap_key_data"))
        if made and not any(keyword.arg == "impl" for keyword in node.keywords):
            yield node.lineno
        if name.endswith(("nnx.Rngs", "random.seed", "random_seed")):
            yield node.lineno


def test_keys_are_made_in_one_place_which_names_the_generator():
    places = [*(ROOT / "piflow_jax").rglob("*.py"), *(ROOT / "tools").glob("*.py")]
    assert len(places) > 100
    found = [f"{path}:{line}" for path in places for line in key_makers(path.read_text("utf-8"))]
    assert not found
    made = [path.name for path in places if '"threefry2x32"' in path.read_text("utf-8")]
    assert made == ["keys.py"]
    for planted in ("jax.random.key(0)", "random.PRNGKey(1)", "jax.random.wrap_key_data(words)"):
        assert list(key_makers(f"def f():\n    return {planted}")) == [2]
