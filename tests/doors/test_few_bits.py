"""A frozen base in few bits: what it is, that the rest computes with it, and where it is made.

A case is a dtype of the base. What is right is computed by hand, from the numbers of the kernel or
by the network with the kernels that the few bits stand for.
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import piflow_jax
from piflow_jax.config import ConfigError, parse
from piflow_jax.convert import open_weights, to_torch_state
from piflow_jax.loading import weights as loading
from piflow_jax.loading.runs import load_student, load_teacher
from piflow_jax.models.lora import fuse, split
from piflow_jax.models.quantized import BLOCKS, is_quantized, quantize
from piflow_jax.modes.export import export
from piflow_jax.modes.train import train
from piflow_jax.parallel import device_mesh, parameter_shardings
from piflow_jax.systems import built_in, networks
from piflow_jax.systems.network import abstract_variables
from piflow_jax.systems.settings import check_choices
from piflow_jax.systems.spec import student_spec
from piflow_jax.training.state import TrainState
from tests import tiny_text
from tests.doors import test_loras
from tests.doors.test_loras import DATA
from tests.saved_runs import save_run, save_stage
from tests.steps import step_of
from tests.training.test_text_step import batch_of, system
from tests.weights import drawn

pytest.importorskip("qwix")
# Largest error by the block's largest number: half a step; of float8, half of its last bit.
ERRORS = {"int8": 0.5 / 127, "float8_e4m3fn": 2.0**-4, "int4": 0.5 / 7}
folder = test_loras.folder


def config_of(kind="flux", dtype="int8", **changes):
    config = tiny_text.get_config(kind)
    config.data.name = "prompts"
    config.model[kind].base_dtype = dtype
    config.update_from_flattened_dict({key.replace("__", "."): v for key, v in changes.items()})
    return parse(config)


def pairs(few, exact):
    """`(path, kernel in few bits, the same of another tree)`."""
    few, exact = flatten_dict(few), flatten_dict(exact)
    return [(path, leaf, exact[path]) for path, leaf in few.items() if is_quantized(leaf)]


def read(params):
    """Parameters with the kernels that few bits stand for: every number times its block's scale."""

    def kernel(few):
        numbers, scale = few.array.qvalue.astype(jnp.float32), few.array.scale
        for axis, size in enumerate(numbers.shape):
            scale = jnp.repeat(scale, size // scale.shape[axis], axis)
        return numbers * scale

    leaves = flatten_dict(params).items()
    return unflatten_dict({p: kernel(a) if is_quantized(a) else a for p, a in leaves})


@pytest.mark.parametrize("shape", [(2, 256, 6), (2, 48, 3, 8), (1, 5, 64, 16)])
@pytest.mark.parametrize("dtype", BLOCKS)
def test_a_block_of_inputs_of_an_output_has_a_scale(dtype, shape):
    kernel = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    kernel[0] *= 100  # of another block of the network
    few = quantize(jnp.asarray(kernel), dtype)
    assert few.shape == shape and few.array.qvalue.dtype == dtype
    axis = shape.index(max(shape[1:-1]), 1)
    block = {"int4": min(shape[axis], 128)}.get(dtype, shape[axis])
    block = 16 if (dtype, shape[axis]) == ("int4", 48) else block
    assert few.array.scale.shape[axis] == shape[axis] // block
    assert np.prod(few.array.scale.shape) == np.prod(shape) // block
    parts = np.moveaxis(kernel, axis, -1).reshape(-1, shape[axis] // block, block)
    found = np.moveaxis(np.asarray(few.astype(jnp.float32)), axis, -1).reshape(parts.shape)
    largest = np.abs(parts).max(-1, keepdims=True)
    assert (np.abs(found - parts) <= 1.01 * ERRORS[dtype] * largest).all()
    assert len(np.unique(found[0, 0])) > 4


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*(("flux", dtype) for dtype in BLOCKS), ("qwen_image", "int8"), ("flux2", "int4")],
)
def test_a_network_computes_with_what_the_few_bits_stand_for(kind, dtype):
    config = config_of(kind, dtype)
    network = networks.student_network(config.model, config.policy, DATA)
    exact = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), drawn(network.exact.module))
    few = unflatten_dict({p: network.kept(p, a) for p, a in flatten_dict(exact).items()})
    abstract = abstract_variables(network)
    assert jax.tree.structure(few) == jax.tree.structure(abstract)
    assert jax.tree.map(np.shape, few) == jax.tree.map(np.shape, abstract)
    # All matrices of the blocks, and nothing of the adapters or outside of the blocks.
    paths = {path for path, *_ in pairs(few, exact)}
    stacks = {path[1] for path in paths}
    inside = {p for p in flatten_dict(exact) if p[1] in stacks and p[-1] == "kernel"}
    assert paths == inside and all("blocks" in stack for stack in stacks)
    condition = jax.tree.map(
        lambda a: jnp.full(a.shape, 3 if a.dtype == jnp.int32 else 0.5, a.dtype),
        network.conditioning.example(DATA, 2, 3),
    )
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 1))

    @functools.partial(jax.jit, static_argnums=0)
    def apply(network, params):
        return jax.tree.leaves(network.apply(params, x, jnp.float32([0.3, 1.0]), condition))

    found = apply(network, few)
    same_numbers = apply(network.exact, read(few))
    for one, other in zip(found, same_numbers, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    unrounded = apply(network.exact, exact)
    assert max(np.abs(a - b).max() for a, b in zip(found, unrounded, strict=True)) > 1e-3


def test_numbers_and_scales_lie_as_the_kernel_did():
    network = networks.teacher_network(config_of(dtype="int4").model, DATA)
    mesh = device_mesh(devices=jax.devices()[:1])
    few, exact = (
        parameter_shardings(mesh, networks.named_variables(n)) for n in (network, network.exact)
    )
    assert jax.tree.structure(few) == jax.tree.structure(abstract_variables(network))
    found = pairs(few, exact)
    assert len(found) == 14
    for path, leaf, place in found:
        assert leaf.array.qvalue == place, path
        whole = [name for name in leaf.array.scale.spec if name is not None]
        assert set(whole) <= set(place.spec)
    split_input = next(leaf for path, leaf, _ in found if path[-2] == "image_mlp_in")
    assert split_input.array.qvalue.spec[1] == "fsdp" and split_input.array.scale.spec[1] is None


def test_official_weights_become_few_bits_kernel_by_kernel(folder, tmp_path, monkeypatch):
    path, _ = folder
    config = config_of(teacher__weights=str(path / "base.safetensors"))
    held, most = set(), []
    put, kept = loading._put, built_in.BuiltIn.kept

    def _put(leaf, like):
        held.add(like.shape)
        most.append(len(held))
        return put(leaf, like)

    def keep(self, path, leaf, shardings=None):
        held.clear()
        return kept(self, path, leaf, shardings)

    monkeypatch.setattr(loading, "_put", _put)
    monkeypatch.setattr(built_in.BuiltIn, "kept", keep)
    few = load_teacher(config, DATA, tmp_path)
    assert max(most) == 1  # each is rounded before the next is read
    exact = load_teacher(
        config_of(dtype="bfloat16", teacher__weights=config.teacher.weights), DATA, tmp_path
    )
    found = pairs(few, exact)
    assert len(found) == 14
    for _, leaf, kernel in found:
        expected = quantize(kernel, "int8").array
        np.testing.assert_array_equal(leaf.array.qvalue, expected.qvalue)
    others = flatten_dict(exact)
    for path, leaf in flatten_dict(few).items():
        assert is_quantized(leaf) or leaf.dtype == others[path].dtype


@pytest.mark.parametrize("kind", ["flux", pytest.param("qwen_image", marks=pytest.mark.slow)])
def test_a_step_trains_adapters_on_few_bits(kind):
    """It is the step on the kernels that the few bits stand for."""
    few = {f"model__{kind}__base_dtype": "int8"}
    config, source, data, teacher, student, params, trained = system(kind, **few)
    assert pairs(params, params)

    def step(student, teacher, params):
        step = jax.jit(step_of(config, data, optax.sgd(1.0), student, teacher, source.null))
        state = TrainState.create(trained, optax.sgd(1.0))
        return step(state, params, jax.random.key(3), batch_of(source))[0].params

    found = step(student, teacher, params)
    expected = step(student.exact, teacher.exact, read(params))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), found, expected
    )
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), found, trained)
    assert max(jax.tree.leaves(moved)) > 1e-3


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a teacher in float32, and a student on its base in int8."""
    workdir = tmp_path_factory.mktemp("run")
    config = config_of(dtype="float32")
    save_run(config, DATA, workdir)
    few = config_of()
    network = networks.student_network(few.model, few.policy, DATA)
    trained = split(drawn(network.exact.module))[1]
    settings = {"model.network": "flux", "model.flux.base_dtype": "int8"}
    save_stage(workdir / "few", "student", trained, student_spec(few, DATA), settings)
    return workdir, trained


def test_a_teacher_of_a_run_becomes_few_bits(run, tmp_path):
    workdir, trained = run
    few = load_teacher(config_of(teacher__checkpoint=str(workdir)), DATA, tmp_path)
    exact = load_teacher(
        config_of(dtype="float32", teacher__checkpoint=str(workdir)), DATA, tmp_path
    )
    assert len(pairs(few, exact)) == 14
    for _, leaf, kernel in pairs(few, exact):
        expected = quantize(kernel, "int8").array
        np.testing.assert_array_equal(leaf.array.qvalue, expected.qvalue)
    # In a notebook, with what the student's run says of its base.
    student = piflow_jax.load(workdir / "few", teacher=workdir)
    assert student.settings.model.own.base_dtype == "int8"
    base, found = split(student.params)
    assert len(pairs(base, base)) == 14
    jax.tree.map(np.testing.assert_array_equal, found, trained)


def test_export_adds_adapters_to_the_base_as_it_was(run, tmp_path):
    workdir, trained = run
    config = config_of(teacher__checkpoint=str(workdir))
    save_stage(tmp_path, "student", trained, student_spec(config, DATA))
    export(config, tmp_path)
    exact = load_student(
        config_of(dtype="float32", teacher__checkpoint=str(workdir)), DATA, tmp_path
    )
    network = networks.student_network(config.model, config.policy, DATA)
    expected = to_torch_state(network.module.clone(lora=None), fuse(exact))
    found = open_weights(tmp_path / "student.safetensors")
    assert set(found) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(array))


def test_a_base_in_few_bits_is_given(tmp_path):
    config = tiny_text.get_config()
    config.model.flux.base_dtype = "int4"
    with pytest.raises(ConfigError, match=r"^config.model.flux.base_dtype is for frozen weights"):
        train(parse(config), tmp_path)


def test_without_qwix_the_key_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    words = r"config.model.flux.base_dtype = 'int8': .* need qwix: pip install -e \"\.\[qwix\]\""
    with pytest.raises(ConfigError, match=words):
        check_choices(config_of())
    check_choices(config_of(dtype="bfloat16"))
