"""Eight simulated devices give the result of one, and move what they should and no more.

Devices are made at JAX's start, so the runs are in a process of their own.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from piflow_jax.config import parse
from piflow_jax.models.flux import FLUX_TARGETS, Flux
from piflow_jax.models.flux2 import FLUX2_TARGETS, Flux2
from piflow_jax.models.heads import ArcHead, DXHead, GMHead
from piflow_jax.models.lora import LoRA
from piflow_jax.models.qwen_image import QWEN_TARGETS, QwenImage
from piflow_jax.parallel import device_mesh, parameter_shardings, state_shardings
from piflow_jax.rivals.flow_map import TwoTimes
from piflow_jax.systems.conditioning import ClassLabels, Text
from piflow_jax.systems.network import abstract_variables
from piflow_jax.systems.networks import BuiltIn, named_variables, student_network, teacher_network
from piflow_jax.systems.own import own_network
from piflow_jax.systems.shapes import DataShape
from piflow_jax.systems.shardings import student_shardings, teacher_shardings
from piflow_jax.training.state import TrainState
from tests import tiny
from tests.compiled import on_devices

HERE = Path(__file__).parent
MESHES = {
    "one": (1, 1, 1),
    "data8": (8, 1, 1),
    "fsdp8": (1, 8, 1),
    "data2_fsdp4": (2, 4, 1),
    "fsdp4_tensor2": (1, 4, 2),
}


# The rest takes minutes more.
FAST = ("one", "data2_fsdp4", "fsdp4_tensor2")


def on_eight_devices(script, *arguments):
    """What a script of this directory prints last."""
    more = {"JAX_ENABLE_X64": "1", "PYTHONPATH": str(HERE.parents[1])}
    environment = os.environ | on_devices(8) | more
    done = subprocess.run(
        [sys.executable, HERE / script, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def run_jobs(folder, precision, meshes):
    jobs = [(precision, name, MESHES[name]) for name in meshes]
    found = on_eight_devices("sharded_runs.py", folder, json.dumps(jobs))
    for run in found.values():
        run["params"] = dict(np.load(run["params"]))
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return run_jobs(tmp_path_factory.mktemp("runs"), "float64", FAST)


@pytest.fixture(scope="module")
def all_runs(tmp_path_factory):
    folders = [tmp_path_factory.mktemp(name) for name in ("float32", "float64")]
    return run_jobs(folders[0], "float32", MESHES) | run_jobs(folders[1], "float64", MESHES)


@pytest.mark.parametrize("mesh", FAST[1:])
def test_twenty_steps_are_those_of_one_device(runs, mesh):
    assert_same(runs["float64 one"], runs[f"float64 {mesh}"], 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("float64", 1e-9)])
@pytest.mark.parametrize("mesh", list(MESHES)[1:])
def test_twenty_steps_of_every_mesh_are_those_of_one_device(all_runs, mesh, precision, tolerance):
    assert_same(all_runs[f"{precision} one"], all_runs[f"{precision} {mesh}"], tolerance)


def assert_same(one, ours, tolerance):
    assert ours["losses"] == pytest.approx(one["losses"], rel=tolerance)
    for name, values in one["params"].items():
        difference = ours["params"][name] - values
        if name.endswith("['qkv']['bias']"):
            # Attention does not see a bias of the keys: its gradient is rounding alone, of which
            # Adam makes steps of the full rate.
            difference, values = difference[:, ::2], values[:, ::2]
        assert np.linalg.norm(difference) <= tolerance * np.linalg.norm(values), name


def test_a_network_without_names_is_split_and_learns_the_same():
    runs = on_eight_devices("unnamed_runs.py")
    assert runs["8"]["losses"] == pytest.approx(runs["1"]["losses"], rel=1e-9)
    assert runs["1"]["losses"][-1] < runs["1"]["losses"][0]
    shares = runs["8"]["shares"]
    # Parameters, average and two moments of four kernels; that of one input and 16 outputs too.
    assert len(shares) == 16 and set(shares.values()) == {1 / 8}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "devices"),
    [
        ("dit", ("two",)),
        ("dit", ("four", "one")),
        ("flux", ("four",)),
        ("qwen_image", ("four",)),
    ],
    ids=str,
)
def test_a_run_of_eight_devices_continues_on_fewer_and_another_mesh(network, devices, tmp_path):
    found = on_eight_devices("resumed_runs.py", tmp_path, network, *devices)
    assert set(found) == set(devices)
    for name, run in found.items():
        assert run["steps"] == 8
        # Of the run that was on one device all the time.
        assert run["losses"] < 1e-5 and run["state"] < 1e-5, name


def assert_placed(run, shape):
    """Every kernel of the blocks but the modulation, which tensor parallelism leaves alone."""
    _, fsdp, tensor = shape
    assert run["shares"]["mlp_in"] == run["shares"]["qkv"] == 1 / (fsdp * tensor)
    assert run["shares"]["modulation"] == 1 / fsdp


WIDTH, BATCH = 32, 16  # of `sharded_runs.py`


def pass_of(name):
    """The pass that an operation belongs to, by the name of where it comes from."""
    if "transpose(jvp(student))" in name:
        return "backward"
    return "student" if "jvp(student)" in name else "teacher"


def assert_sums_gradients(run):
    """Each parameter's gradient once, a layer's in its turn.

    Besides them the loss, and whether the last of all samples has arrived.
    """
    assert {kind for kind, *_ in run["moves"]} == {"all-reduce"}
    gradients = [
        values[0].size if "['blocks']" in name else values.size
        for name, values in run["params"].items()
    ]
    moved = [int(np.prod(shape)) for *_, shape in run["moves"]]
    assert sorted(moved) == sorted([*gradients, 1, 1])


def assert_moves(run, shape):
    data, fsdp, tensor = shape
    if fsdp == 1:
        if data > 1:
            assert_sums_gradients(run)
        else:
            assert run["moves"] == []
        return
    large, small = [], []
    for kind, name, dtype, found in run["moves"]:
        if kind == "all-gather":
            # In the blocks, or of as many axes as images and tokens.
            which = large if "/blocks/" in name or len(found) > 2 else small
            which.append((pass_of(name), *found))
        elif kind != "all-reduce":
            assert dtype == "s32"  # labels
    # Each kernel of a block once in each of student, its backward pass, and teacher.
    heads, hidden = WIDTH // tensor, 4 * WIDTH // tensor
    kernels = [(WIDTH, 3, heads), (heads, WIDTH), (WIDTH, hidden), (hidden, WIDTH)]
    passes = ("student", "backward", "teacher")
    # But for modulations, which are by example: their results are summed, the gradients gathered.
    modulations = [("backward", BATCH // data, parts, WIDTH) for parts in (6, 2)]
    expected = [(name, *kernel) for name in passes for kernel in kernels] + modulations
    if not jax.__version__.startswith("0.10."):
        # Another compiler gathers flattened kernels too, and keeps some of a pass for the next one.
        found, most = (Counter(tuple(g[1:]) for g in gathers) for gathers in (large, expected))
        assert found and found <= most
        return
    # Images and tokens stay with their examples, those too that are in rows.
    assert sorted(large) == sorted(expected)
    assert max(rows for _, rows, *_ in small) <= 2 * BATCH


@pytest.mark.parametrize("check", [assert_placed, assert_moves])
def test_state_and_collectives_are_as_the_mesh_asks_for(runs, check):
    for mesh in FAST:
        check(runs[f"float64 {mesh}"], MESHES[mesh])


@pytest.mark.slow
@pytest.mark.parametrize("check", [assert_placed, assert_moves])
def test_state_and_collectives_are_as_every_mesh_asks_for(all_runs, check):
    for name, run in all_runs.items():
        check(run, MESHES[name.split()[1]])


def named(*shape, axes=None, path=("params", "blocks", "mlp_in", "kernel")):
    """A tree of one parameter, with the names of its axes or without."""
    tree = jax.ShapeDtypeStruct(shape, "f4")
    tree = tree if axes is None else nn.LogicallyPartitioned(tree, axes)
    for name in reversed(path):
        tree = {name: tree}
    return tree


def mesh_of(data=1, fsdp=1, tensor=1):
    """A mesh of devices that need not be there."""
    names = ("data", "fsdp", "tensor")
    return AbstractMesh((data, fsdp, tensor), names, axis_types=(AxisType.Auto,) * 3)


MLP_IN = ("layers", "embed", "mlp")


def test_a_mesh_that_does_not_divide_is_named():
    message = r"config.mesh.fsdp \(8\) must divide the axis 'embed' of blocks/mlp_in/kernel, .* 12"
    with pytest.raises(ValueError, match=message):
        parameter_shardings(mesh_of(fsdp=8), named(2, 12, 6, axes=MLP_IN))
    with pytest.raises(ValueError, match="does not fit 1 devices"):
        device_mesh(2, devices=jax.devices()[:1])
    message = (
        r"blocks/mlp_in/kernel has the axes \[2, 12\], but the names \['layers', 'embed', 'mlp'\]"
    )
    with pytest.raises(ValueError, match=message):
        parameter_shardings(mesh_of(), named(2, 12, axes=MLP_IN))


@pytest.mark.parametrize(
    ("shape", "axes", "fsdp", "expected"),
    [
        ((2, 12, 24), MLP_IN, 4, P(None, "fsdp", "tensor")),
        ((2, 12, 24), (None, None, None), 4, P(None, None, None)),
        ((2, 12, 24), ("mine", None, "mlp"), 4, P(None, None, "tensor")),
        ((12, 24), ("embed", "embed"), 4, P("fsdp", None)),
        # Without names along the largest axis that divides, the first of equal ones.
        ((3, 3, 16, 32), None, 8, P(None, None, None, "fsdp")),
        ((3, 3, 16, 30), None, 8, P(None, None, "fsdp", None)),
        ((16, 16), None, 8, P("fsdp", None)),
        # Vectors are whole, and what has no axis that divides.
        ((64,), None, 8, P()),
        ((9, 15), None, 8, P()),
        ((), None, 8, P()),
    ],
)
def test_a_parameter_lies_by_the_names_of_its_axes_or_by_their_sizes(shape, axes, fsdp, expected):
    tree = named(*shape, axes=axes)
    (found,) = jax.tree.leaves(parameter_shardings(mesh_of(fsdp=fsdp, tensor=2), tree))
    assert found.spec == expected
    (whole,) = jax.tree.leaves(parameter_shardings(mesh_of(fsdp=fsdp), tree, split=False))
    assert whole.spec == P()


class Plain(nn.Module):
    """A convolutional network that knows nothing of meshes."""

    @nn.compact
    def __call__(self, x, t):
        x = nn.silu(nn.Conv(16, (3, 3))(x) + nn.Dense(16)(t[:, None])[:, None, None])
        return nn.Conv(4, (3, 3))(x)


class PlainNNX(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(8, 32, rngs=rngs)
        self.out = nnx.Linear(32, 8, rngs=rngs)


def plain_trees():
    """Parameters of modules that name no axes: of Linen, of NNX, and of a pair of functions."""
    x, t = jnp.zeros((1, 8, 8, 4)), jnp.zeros(1)
    yield jax.eval_shape(Plain().init, jax.random.key(0), x, t)
    yield nnx.state(nnx.eval_shape(lambda: PlainNNX(nnx.Rngs(0))), nnx.Param)
    yield [jax.ShapeDtypeStruct((8, 32), "f4"), (jax.ShapeDtypeStruct((32,), "f4"),)]


@pytest.mark.parametrize("params", list(plain_trees()), ids=["linen", "nnx", "functions"])
def test_a_state_of_any_tree_is_split_with_its_moments(params):
    state = jax.eval_shape(lambda p: TrainState.create(p, optax.adamw(1e-3)), params)
    shardings = state_shardings(mesh_of(fsdp=4), state, params)
    assert jax.tree.structure(shardings) == jax.tree.structure(state)

    def specs(tree):
        return [sharding.spec for sharding in jax.tree.leaves(tree)]

    expected = specs(parameter_shardings(mesh_of(fsdp=4), params))
    assert any("fsdp" in spec for spec in expected)
    moments = shardings.opt_state[0]
    for tree in (shardings.params, shardings.ema_params, moments.mu, moments.nu):
        assert specs(tree) == expected
    assert shardings.step.spec == moments.count.spec == P()


def test_counters_and_whole_parameters_are_on_every_device():
    params = named(2, 12, 24, axes=MLP_IN)
    plain = nn.unbox(params)
    state = TrainState(
        step=jax.ShapeDtypeStruct((), "i4"),
        params={"student": plain, "fake": plain},
        ema_params=plain,
        opt_state={"count": jax.ShapeDtypeStruct((), "i4"), "mu": {"student": plain}},
    )
    split = P(None, "fsdp", "tensor")

    def specs(**options):
        found = state_shardings(mesh_of(), state, params, **options)
        return [sharding.spec for sharding in jax.tree.leaves(found)]

    assert specs() == [P(), split, split, split, P(), split]
    assert specs(split=False) == [P(), P(), P(), split, P(), P()]
    assert specs(ema=False) == [P(), split, split, P(), P(), split]


@pytest.mark.parametrize("place", ["student", "ema", "teacher"])
def test_each_part_of_the_state_has_a_rule_of_its_own(place):
    mesh = device_mesh(devices=jax.devices()[:1])
    settings = tiny.get_config()
    settings.mesh[place] = "whole"
    config = parse(settings)
    data = DataShape(name="digits", sample_size=8, channels=1, num_classes=10)
    student = student_network(config.model, config.policy, data)
    teacher = teacher_network(config.model, data)
    params = abstract_variables(student)
    state = TrainState(
        step=jax.ShapeDtypeStruct((), "i4"), params=params, ema_params=params, opt_state=params
    )
    found = student_shardings(config, mesh, state, student)
    parts = {
        "student": (found.params, found.opt_state),
        "ema": (found.ema_params,),
        "teacher": (teacher_shardings(config, mesh, teacher),),
    }
    for name, trees in parts.items():
        expected = P() if name == place else P(None, "fsdp", "tensor")
        specs = [tree["params"]["blocks"]["mlp_in"]["kernel"].spec for tree in trees]
        assert specs == [expected] * len(trees)


def test_fresh_parameters_are_plain_and_their_names_are_asked_for():
    module = TwoTimes(head=ArcHead(16), hidden=64, num_heads=4, depth=2)
    boxes = flatten_dict(named_variables(BuiltIn(module, ClassLabels()))["params"])
    assert {type(leaf) for leaf in boxes.values()} == {nn.LogicallyPartitioned}
    plain = jax.eval_shape(module.init, jax.random.key(0), *module.example())
    plain = flatten_dict(plain["params"])
    assert {path: leaf.shape for path, leaf in plain.items()} == {
        path: box.value.shape for path, box in boxes.items()
    }
    axes = {path: box.names for path, box in boxes.items()}
    assert axes["second_time_in", "kernel"] == axes["time_in", "kernel"] == (None, "embed")
    assert axes["head", "rates", "kernel"] == axes["head", "means", "kernel"] == ("embed", None)
    assert axes["blocks", "mlp_in", "kernel"] == ("layers", "embed", "mlp")
    assert axes["blocks", "mlp_in", "bias"] == ("layers", "mlp")
    assert axes["blocks", "mlp_out", "bias"] == ("layers", None)


def test_names_that_a_network_of_other_making_has_are_heeded():
    class Named(nn.Module):
        @nn.compact
        def __call__(self, x, t, labels):
            init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), (None, "mlp"))
            return nn.Dense(8, name="out")(nn.Dense(16, kernel_init=init, name="into")(x))

    data = DataShape(name="mine", sample_size=4, channels=8, num_classes=3)
    network = own_network("mine", Named(), data, None)
    plain = network.init(jax.random.key(0))
    assert {type(leaf).__name__ for leaf in jax.tree.leaves(plain)} == {"ArrayImpl"}
    found = parameter_shardings(mesh_of(fsdp=4, tensor=2), named_variables(network))["params"]
    kernels = [found[name]["kernel"].spec for name in ("into", "out")]
    assert kernels == [P(None, "tensor"), P("fsdp", None)]


def test_every_parameter_of_the_text_to_image_networks_has_its_axes():
    flux = Flux(lora=LoRA(FLUX_TARGETS), head=GMHead(8, logstd_hidden=1024))
    qwen = QwenImage(lora=LoRA(QWEN_TARGETS), head=DXHead(10))
    flux2 = Flux2(lora=LoRA(FLUX2_TARGETS), head=GMHead(8, logstd_hidden=1024))
    for module in (flux, qwen, flux2):
        for path, box in flatten_dict(named_variables(BuiltIn(module, Text()))["params"]).items():
            leaf, axes = box.value, box.names
            # What is large is split by `fsdp`, along the tokens' width or an adapter's rank; but
            # what is added to tokens, or multiplies them, is whole.
            if leaf.size > 1_000_000 and path[-1] not in ("scale", "bias"):
                assert len({"embed", "rank"} & set(axes)) == 1, path
            if "mlp" in axes:
                assert leaf.shape[axes.index("mlp")] % 3072 == 0, path
