"""The train steps of networks that read text: conditions, adapters on a shared base, sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from piflow_jax.config import parse
from piflow_jax.data import batches, load_captioned_digits_source
from piflow_jax.flow.guidance import guided_velocity
from piflow_jax.models.lora import DOWN, UP
from piflow_jax.parallel import device_mesh, parameter_shardings
from piflow_jax.runs.checkpoint import Checkpointer
from piflow_jax.runs.monitor import step_memory
from piflow_jax.systems.assembly import guided
from piflow_jax.systems.network import abstract_variables
from piflow_jax.systems.networks import named_variables, student_network, teacher_network
from piflow_jax.systems.shapes import DataShape
from piflow_jax.training.optimizer import growth_rates, make_optimizer
from piflow_jax.training.state import TrainState
from tests import tiny_text
from tests.steps import step_of

NETWORKS = ("flux", "qwen_image", "flux2")
BATCH = 4


@functools.cache
def system(network, **changes):
    """Settings, source, networks, the teacher's parameters and a student's trained ones."""
    config = tiny_text.get_config(network)
    config.train.batch_size = BATCH
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    config = parse(config)
    source = load_captioned_digits_source()
    data = DataShape.of("captioned_digits", source)
    teacher = teacher_network(config.model, data)
    student = student_network(config.model, config.policy, data)

    @jax.jit
    def draw():
        params = teacher.init(jax.random.key(0))
        trained = student.start(jax.random.key(1), teacher, params)
        # Nothing hidden behind a zero, as fresh heads and adapters are.
        leaves, tree = jax.tree.flatten(trained)
        noise = [0.1 * jax.random.normal(jax.random.key(i), a.shape) for i, a in enumerate(leaves)]
        return params, jax.tree.unflatten(tree, [a + b for a, b in zip(leaves, noise, strict=True)])

    return config, source, data, teacher, student, *draw()


@functools.cache
def batch_of(source, size=BATCH):
    return jax.tree.map(jnp.asarray, next(batches(source, batch_size=size, seed=0)))


def test_qwen_image_is_told_what_is_padding_and_flux_its_guidance():
    _, source, _, teacher, *_ = system("qwen_image")
    condition = batch_of(source)["condition"]
    found = teacher.conditioning(condition)
    assert set(found) == {"text", "mask"}
    np.testing.assert_array_equal(found["mask"].sum(axis=1), condition["text_length"])
    assert found["mask"][:, 0].all() and len(set(np.asarray(condition["text_length"]))) > 1
    null = teacher.conditioning(jax.tree.map(lambda a: jnp.asarray(a)[None], source.null))
    np.testing.assert_array_equal(null["text"][0], source.null["text"])
    assert null["mask"][0].tolist() == [True] + [False] * (source.text_length - 1)

    teacher = system("flux")[3]
    found = teacher.conditioning(condition)
    assert set(found) == {"text", "pooled", "guidance"}
    np.testing.assert_array_equal(found["guidance"], np.full(BATCH, 3.5))


def test_a_teacher_is_guided_by_the_empty_prompt_whatever_its_padding():
    config, source, data, teacher, _, params, _ = system("qwen_image", teacher__guidance_scale=4.0)
    condition = batch_of(source)["condition"]
    shape = (BATCH, *data.shape)
    x, sigma = jax.random.normal(jax.random.key(0), shape), jnp.linspace(0.2, 1.0, BATCH)
    apply = jax.jit(functools.partial(teacher.apply, params))
    null = teacher.conditioning.null(data, source.null)
    found = jax.jit(guided(teacher, config.teacher, null).velocity)(params, x, sigma, condition)
    # By hand: one evaluation with the caption, one with the empty prompt's own single token.
    empty = {
        "text": jnp.tile(jnp.asarray(source.null["text"])[None, :1], (BATCH, 1, 1)),
        "text_length": jnp.ones(BATCH, jnp.int32),
    }
    expected = guided_velocity(apply(x, sigma, condition), apply(x, sigma, empty), 4.0, sigma)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)


def distil(network, optimizer=None, batch=None, **changes):
    config, source, data, teacher, student, params, trained = system(network, **changes)
    optimizer = optimizer or optax.sgd(1.0)
    step = jax.jit(step_of(config, data, optimizer, student, teacher, source.null))
    state = TrainState.create(trained, optimizer)
    batch = batch_of(source) if batch is None else batch
    return step(state, params, jax.random.key(3), batch)


RECIPES = [
    {"policy__kind": "arc", "train__num_states": 4, "train__optimizer__growth_rate_scale": 0.1},
    {"policy__kind": "dx", "policy__mode": "polynomial", "train__gm_dropout": 0.0},
]


@pytest.mark.parametrize(
    "changes",
    [RECIPES[0], pytest.param(RECIPES[1], marks=pytest.mark.slow)],
    ids=["arc", "polynomial"],
)
@pytest.mark.parametrize("network", NETWORKS)
def test_steps_of_later_recipes_move_all_that_is_trained(network, changes):
    config, source, data, teacher, student, params, trained = system(network, **changes)
    optimizer = make_optimizer(config.train.optimizer, 10)
    step = step_of(config, data, optimizer, student, teacher, source.null)
    state = TrainState.create(trained, optimizer)
    arguments = (state, params, jax.random.key(3), batch_of(source))
    shapes, metrics = jax.eval_shape(step, *arguments)
    assert jax.tree.structure(shapes) == jax.tree.structure(state) and "loss" in metrics
    slower = any(jax.tree.leaves(growth_rates(state.params)))
    assert slower == (config.policy.kind == "arc")
    if network == "qwen_image":  # compiled where it is cheapest
        after, metrics = jax.jit(step)(*arguments)
        assert np.isfinite(metrics["loss"])
        assert all(jax.tree.leaves(jax.tree.map(lambda a: np.isfinite(a).all(), after.params)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "data_free"),
    [("flux", True), ("qwen_image", True), ("flux", False), ("flux2", True)],
)
def test_gradients_are_those_of_the_whole_network_at_the_trained_parameters(network, data_free):
    """Against a student that has the base among its own parameters, and trains all of them."""
    _, _, _, _, student, params, trained = system(network)
    state, metrics = distil(network, train__data_free=data_free)
    whole = student.with_base(trained, params)

    class Whole:
        """The student as a module without adapters to the step: nothing is merged."""

        adapted = drops = False
        train = staticmethod(student.train)
        with_base = staticmethod(lambda trained, carried: trained)

    config, source, data, teacher, *_ = system(network, train__data_free=data_free)
    step = jax.jit(step_of(config, data, optax.sgd(1.0), Whole(), teacher, source.null))
    every, expected = step(
        TrainState.create(whole, optax.sgd(1.0)), params, jax.random.key(3), batch_of(source)
    )
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-6)
    moved = jax.tree.map(jnp.subtract, trained, state.params)
    reference = jax.tree.map(jnp.subtract, trained, student.trained(every.params))
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(moved), jax.tree.leaves(reference), strict=True
    ):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * np.abs(b).max(), err_msg=name)
        # Nobody reads the text behind Qwen-Image's last block.
        unread = network == "qwen_image" and "text_mlp" in name
        assert unread or np.abs(b).max() > 0, name


@pytest.mark.slow
def test_dropout_of_adapters_differs_by_step_and_leaves_the_teacher_alone():
    kept = distil("flux")[1]["loss"]
    one = distil("flux", model__flux__lora_dropout=0.5)[1]["loss"]
    assert one != kept and one == distil("flux", model__flux__lora_dropout=0.5)[1]["loss"]
    # All inputs of the adapters dropped: the student of the base and the trained output.
    none = distil("flux", model__flux__lora_dropout=0.99)[1]["loss"]
    assert np.isfinite(none) and none != one


@pytest.mark.slow
def test_prompts_without_images_say_by_an_empty_canvas_what_is_sampled():
    _, source, *_ = system("flux")
    batch = dict(batch_of(source))
    losses = []
    for height, width in ((8, 8), (4, 6)):
        batch["x"] = jnp.zeros((BATCH, height, width, 0))
        losses.append(float(distil("flux", batch=batch)[1]["loss"]))
    # Square ones as in the batch with latents, of which a data-free step sees the size alone.
    np.testing.assert_allclose(losses[0], distil("flux")[1]["loss"], rtol=1e-6)
    assert np.isfinite(losses).all() and losses[0] != losses[1]


def trained_count(config, data):
    """Trained parameters of FLUX.1 by hand: layers of the release's list, head, last modulation."""
    own = config.model.flux
    d, r, p = own.hidden, own.lora_rank, own.patch_size
    mlp = r * (d + 4 * d) + r * (4 * d + d)
    double, single = 2 * mlp, r * (d + 4 * d) + r * (5 * d + d)
    time = r * (256 + d) + r * (d + d)
    k, hidden = config.policy.num_components, config.policy.logstd_hidden
    rows = k * p * p * (data.channels + 1)
    head = rows * (d + 1) + hidden * (d + 1) + hidden + 1
    blocks = own.depth * double + own.single_depth * single
    return blocks + time + head + 2 * d * (d + 1)


def test_state_is_of_the_trained_parameters_only_and_the_step_holds_the_base_once():
    config, source, data, teacher, student, params, trained = system(
        "flux",
        model__flux__hidden=64,
        model__flux__num_heads=4,
        model__flux__rope_axes=(4, 6, 6),
        model__flux__depth=3,
    )
    count = trained_count(config, data)
    optimizer = make_optimizer(config.train.optimizer, config.train.steps)
    state = TrainState.create(trained, optimizer)
    # Parameters, average and two moments in float32; counters of the step, clipping and schedule.
    counters = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim == 0]
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert size == 4 * 4 * count + 4 * len(counters)
    assert count == sum(leaf.size for leaf in jax.tree.leaves(state.ema_params))

    # One example: activations, of which each has nearly a megabyte here, must not hide the base.
    batch = jax.tree.map(lambda rows: rows[:1], dict(batch_of(source)))
    base = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    key = jax.random.key(3)
    step = jax.jit(
        step_of(config, data, optimizer, student, teacher, source.null), donate_argnums=0
    )
    memory = step_memory(step.lower(state, params, key, batch).compile())
    given = size + base + sum(leaf.nbytes for leaf in jax.tree.leaves(batch))
    # A batch's unused parts and a key of 8 bytes; arrays start at multiples of 64 bytes.
    leaves = len(jax.tree.leaves((state, params, batch)))
    unused = batch["x"].nbytes
    assert given - unused - 4096 <= memory["arguments"] <= given + 64 * leaves
    assert memory["temporary"] < base, "the base is held a second time"


def test_a_checkpoint_is_of_the_trained_parameters_only(tmp_path):
    config, _, data, _, _, _, trained = system("flux")
    # Numbers that do not compress in every array, moments too.
    noise = np.random.default_rng(0).integers(2**24, 2**30, 2**20, dtype=np.int32).view(np.float32)
    optimizer = make_optimizer(config.train.optimizer, config.train.steps)
    state = TrainState.create(trained, optimizer)
    state = jax.tree.map(lambda a: jnp.resize(noise, a.shape) if a.ndim else a, state)
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        checkpointer.save(1, state, data_state={}, config={}, spec={})
    written = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    by_hand = 4 * 4 * trained_count(config, data)
    # Beside the arrays there are the names, types and fingerprints of 100 of them.
    assert by_hand < written < by_hand + 10**5


@pytest.mark.parametrize("network", NETWORKS)
def test_every_parameter_has_a_place_on_a_mesh(network):
    config = tiny_text.get_config(network)
    source = load_captioned_digits_source()
    data = DataShape.of("captioned_digits", source)
    for kind, dropout in (("gm", 0.05), ("dx", 0.0)):
        config.policy.kind, config.train.gm_dropout = kind, dropout
        settings = parse(config)
        student = student_network(settings.model, settings.policy, data)
        params = abstract_variables(student)
        mesh = device_mesh(devices=jax.devices()[:1])
        places = parameter_shardings(mesh, named_variables(student))
        found = {
            tuple(k.key for k in path)[1:]: s.spec
            for path, s in jax.tree_util.tree_leaves_with_path(places)
        }
        blocks, mlp = {
            "flux": ("single_blocks", "mlp_in"),
            "qwen_image": ("joint_blocks", "image_mlp_in"),
            "flux2": ("double_blocks", "image_mlp_in"),
        }[network]
        # An adapter lies as the kernel beside it; a factor without the tokens' width by its rank.
        assert found[(blocks, mlp, DOWN)] == PartitionSpec(None, "fsdp", None)
        assert found[(blocks, mlp, UP)][1] == "fsdp" and found[(blocks, mlp, UP)][-1] == "tensor"
        assert found[("time_out", DOWN)] == PartitionSpec("fsdp", None)
        assert found[("time_out", UP)] == PartitionSpec("fsdp", None)
        split = {name for name, spec in found.items() if "fsdp" in spec or "tensor" in spec}
        sizes = {path: leaf.size for path, leaf in _flat(params)}
        assert sum(sizes[name] for name in split) > 0.9 * sum(sizes.values())


def _flat(params):
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        yield tuple(k.key for k in path)[1:], leaf
