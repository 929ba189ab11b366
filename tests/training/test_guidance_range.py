"""Students of a range of guidance scales, `config.teacher.guidance_range`."""

import dataclasses
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import piflow_jax
from piflow_jax.config import ConfigError, parse
from piflow_jax.convert import to_torch_state, write_safetensors
from piflow_jax.flow.teacher import Teacher
from piflow_jax.models import initialize_student
from piflow_jax.runs.checkpoint import Checkpointer
from piflow_jax.systems.assembly import Systems
from piflow_jax.systems.built_in import BuiltIn
from piflow_jax.systems.conditioning import ClassLabels
from piflow_jax.systems.shapes import DataShape
from piflow_jax.systems.spec import StudentSettings, student_settings, student_spec
from piflow_jax.training.state import TrainState
from piflow_jax.training.step import distill_step
from tests import tiny, tiny_text

DATA = DataShape(name="digits", sample_size=8, channels=1, num_classes=10)
INTERVAL = (0.1, 0.8)


def settings_of(scales=(1.0, 4.0), default=2.0, **changes):
    config = tiny.get_config()
    config.model.dit.hidden = 8
    config.teacher.guidance_scale, config.teacher.guidance_range = default, scales
    config.teacher.guidance_interval = INTERVAL
    config.update_from_flattened_dict(changes, "")
    return parse(config)


def moved(params):
    """Parameters none of which is zero, so that everything has an effect."""
    return jax.tree.map(
        lambda leaf: leaf + 0.1 * jnp.sin(jnp.arange(leaf.size)).reshape(leaf.shape), params
    )


def student_of(config):
    network = Systems.of(config, DATA).student_network
    params = moved(jax.jit(network.init)(jax.random.key(0)))
    if config.teacher.guidance_range:
        last = params["params"]["guidance_out"]
        last["kernel"] = jax.random.normal(jax.random.key(7), last["kernel"].shape)
    return piflow_jax.Student(network, params, StudentSettings.of(config, DATA))


@pytest.fixture(scope="module")
def student():
    return student_of(settings_of())


def drawn(student, guidance=None, labels=(3, 3, 7), **options):
    return np.asarray(student.sample(5, np.array(labels), substeps=4, guidance=guidance, **options))


@pytest.mark.parametrize("guidance", [-5.0, np.nan, [1.0, np.inf]])
def test_known_scales_are_checked(guidance):
    conditioning = ClassLabels(2.0, (1.0, 4.0))
    with pytest.raises(ValueError, match="guidance must be finite and at least 0"):
        conditioning({"labels": np.arange(2), "guidance": guidance})
    for labels in (3, None):
        with pytest.raises(ValueError, match=r"labels must be \[B\], got \[\]"):
            conditioning(labels)


def test_a_batch_of_scales_is_each_scale_alone(x64):
    """Data `N(m_c, s^2)` of class c, and their mixture where there is no class."""
    means, spread = jnp.array([-1.5, 0.2, 2.0]), 0.4
    rng = np.random.default_rng(0)
    x, t = jnp.asarray(rng.normal(size=(6, 4, 1))), jnp.asarray(rng.uniform(0.02, 1, 6))
    labels, scales = jnp.arange(6) % 3, jnp.asarray(rng.uniform(1, 4, 6))
    # One state at each end of the interval, which belong to it.
    t = t.at[0].set(INTERVAL[0]).at[1].set(INTERVAL[1]).at[2].set(0.05).at[3].set(0.9)

    def velocity(x, t, mean):
        a, variance = 1 - t, (1 - t) ** 2 * spread**2 + t**2
        return (t - a * spread**2) / variance * (x - a * mean) - mean

    def log_density(x, t, mean):
        return -jnp.square(x - (1 - t) * mean) / (2 * ((1 - t) ** 2 * spread**2 + t**2))

    def predict(params, x, t, labels):
        t, own = t[:, None, None], means[labels % 3][:, None, None]
        each, logits = (
            jnp.stack([function(x, t, mean) for mean in means])
            for function in (velocity, log_density)
        )
        mixed = (jax.nn.softmax(logits, axis=0) * each).sum(0)
        return jnp.where((labels == 3)[:, None, None], mixed, velocity(x, t, own))

    def guided(scale, part):
        teacher = Teacher(
            predict=predict,
            shape=None,
            guidance_scale=scale,
            guidance_interval=INTERVAL,
            null_cond=np.int64(3),
        )
        return teacher.velocity((), x[part], t[part], labels[part])

    found = jax.jit(lambda scales: guided(scales, slice(None)))(scales)
    assert found.dtype == jnp.float64
    inside = (t >= INTERVAL[0]) & (t <= INTERVAL[1])
    assert 2 <= inside.sum() <= 4
    with_class, without = (predict((), x, t, c) for c in (labels, 3 + 0 * labels))
    weight = jnp.where(inside, scales - 1, 0)[:, None, None]
    expected = with_class + weight * (with_class - without)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
    for i, scale in enumerate(scales):
        alone = guided(float(scale), slice(i, i + 1))
        np.testing.assert_allclose(found[i], alone[0], rtol=1e-12, atol=1e-12)


def test_a_student_starts_at_its_teacher_for_every_scale(student):
    config = settings_of()
    systems, plain = Systems.of(config, DATA), Systems.of(settings_of(()), DATA)
    teacher, network = systems.teacher_network, systems.student_network
    params = moved(jax.jit(teacher.init)(jax.random.key(1)))
    x = jax.random.normal(jax.random.key(2), (4, 8, 8, 1))
    t, labels = jnp.array([0.2, 0.5, 0.9, 1.0]), jnp.arange(4)
    expected = jax.jit(teacher.apply)(params, x, t, labels)
    start = initialize_student(
        network.module, network.init(jax.random.key(3)), params, None, teacher=teacher.module
    )
    apply = jax.jit(network.apply)

    def output(params, scale):
        condition = network.conditioning.guided(labels, jnp.float32(scale))
        return apply(params, x, t, condition)

    for scale in (1.0, 2.5, 4.0, 9.0):
        means = output(start, scale).means
        np.testing.assert_allclose(
            means, jnp.broadcast_to(expected[..., None, :], means.shape), rtol=1e-5, atol=1e-6
        )
        jax.tree.map(np.testing.assert_array_equal, output(start, scale), output(start, 2.0))
    # Its last layer is what keeps the scale out.
    kernel = start["params"]["guidance_out"]["kernel"]
    start["params"]["guidance_out"]["kernel"] = jnp.full_like(kernel, 0.1)
    assert np.ptp([output(start, scale).means for scale in (1.0, 2.0, 4.0)], axis=0).max() > 1e-3
    # Everything else starts as without a range.
    key = jax.random.key(4)
    ours, theirs = (
        {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
        for params in (
            network.start(key, teacher, params),
            plain.student_network.start(key, plain.teacher_network, params),
        )
    )
    added = ours.keys() - theirs.keys()
    assert {name.split("'")[3] for name in added} == {"guidance_in", "guidance_out"}
    for name, leaf in theirs.items():
        np.testing.assert_array_equal(ours[name], leaf)


def test_only_the_student_may_have_the_input():
    systems = Systems.of(settings_of(), DATA)
    student, teacher = systems.student_network, systems.teacher_network
    params = teacher.init(jax.random.key(0))
    with pytest.raises(ValueError, match="guidance_embed: student False, teacher True"):
        guided = dataclasses.replace(teacher, module=teacher.module.clone(guidance_embed=True))
        Systems.of(settings_of(()), DATA).student_network.start(
            jax.random.key(0), guided, guided.init(jax.random.key(0))
        )
    x, t, labels = jnp.zeros((2, 8, 8, 1)), jnp.ones(2), jnp.zeros(2, jnp.int32)
    for module, scales, said in (
        (student.module, (), "guidance_embed is True, guidance is None"),
        (teacher.module, (jnp.ones(2),), "guidance_embed is False"),
        (student.module, (jnp.ones(1),), r"guidance \(1,\) must be \[B\]"),
    ):
        with pytest.raises(ValueError, match=said):
            jax.eval_shape(module.apply, params, x, t, labels, *scales)


@dataclasses.dataclass(frozen=True)
class Recorded(BuiltIn):
    """A student that records what its network is given in training."""

    seen: list = dataclasses.field(default_factory=list, compare=False)

    def train(self, variables, x, t, condition, key):
        given = {"x": x, "t": t, **self.conditioning(condition)}
        jax.debug.callback(lambda given: self.seen.append(jax.tree.map(np.asarray, given)), given)
        return super().train(variables, x, t, condition, key)


def stepped(config, batch, steps=1, key=3):
    """Inputs of the student and losses of a few steps from moved parameters."""
    systems = Systems.of(config, DATA)
    network = systems.student_network
    student = Recorded(network.module, network.conditioning)
    teacher_params = moved(jax.jit(systems.teacher_network.init)(jax.random.key(1)))
    params = jax.jit(lambda p: student.start(jax.random.key(0), systems.teacher_network, p))(
        teacher_params
    )
    optimizer = optax.sgd(0.0)
    step = jax.jit(distill_step(student, systems.teacher, optimizer, config, DATA.channels))
    state, losses = TrainState.create(params, optimizer), []
    for _ in range(steps):
        state, metrics = step(state, teacher_params, jax.random.key(key), batch)
        losses.append(float(metrics["loss"]))
    jax.effects_barrier()
    return student.seen, losses


@pytest.mark.parametrize("data_free", [pytest.param(False, marks=pytest.mark.slow), True])
def test_teacher_and_student_have_the_scale_that_a_step_draws(data_free):
    """A step of one example is the step of a student whose only scale is the drawn one."""
    batch = {"x": 0.5 * jnp.ones((1, 8, 8, 1)), "condition": jnp.array([4])}
    changes = {"train.data_free": data_free, "train.nfe": 2 if data_free else 1}
    seen, losses = stepped(settings_of(**changes), batch)
    (scale,) = {float(given.pop("guidance")[0]) for given in seen}
    assert 1 <= scale <= 4 and abs(scale - 2) > 1e-3
    others, wanted = stepped(settings_of((), default=scale, **changes), batch)
    _, default = stepped(settings_of((), **changes), batch)
    # Nothing else that is drawn has changed.
    jax.tree.map(np.testing.assert_array_equal, seen, others)
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)
    assert abs(default[0] - wanted[0]) > 1e-3 * wanted[0]


def test_scales_are_uniform_in_the_range():
    """And drawn anew for each example of each step; parts of a batch have their own."""
    batch = {"x": 0.5 * jnp.ones((64, 8, 8, 1)), "condition": jnp.arange(64) % 10}
    config = settings_of((1.5, 3.0), **{"train.batch_size": 64, "train.microbatches": 2})
    seen, _ = stepped(config, batch, steps=4)
    scales = np.concatenate([given["guidance"] for given in seen])
    assert len(scales) == len(np.unique(scales)) == 256
    assert scales.min() >= 1.5 and scales.max() <= 3.0
    counts = np.histogram(scales, 4, (1.5, 3.0))[0]
    assert counts.min() > 35  # 64 on average, with a deviation of 7


def test_a_sample_has_the_scale_that_is_asked_for(student):
    found = drawn(student, guidance=[1.0, 4.0, 2.0])
    for i, scale in enumerate((1.0, 4.0, 2.0)):
        np.testing.assert_allclose(drawn(student, guidance=scale)[i], found[i], atol=1e-5)
    assert np.abs(drawn(student, guidance=1.0) - drawn(student, guidance=4.0)).max() > 1e-2
    # The default is the teacher's own scale.
    np.testing.assert_array_equal(drawn(student), drawn(student, guidance=2.0))
    # Evaluation, which passes labels alone, has the default too, or that of its settings.
    noise, labels = jax.random.normal(jax.random.key(1), (3, 8, 8, 1)), np.array([3, 3, 7])
    by_default = drawn(student, noise=noise)
    asked = drawn(student, noise=noise, guidance=3.5)
    for scale, expected in ((0.0, by_default), (3.5, asked)):
        changes = {"evaluation.guidance": scale, "evaluation.substeps": 4}
        sampler = Systems.of(settings_of(**changes), DATA).student_sampler()
        np.testing.assert_allclose(
            jax.jit(sampler)(student.params, noise, labels), expected, atol=1e-5
        )
    # The policy alone.
    t = jnp.ones(3)

    @jax.jit
    def velocity(scale):
        return student.policy(noise, t, labels, guidance=scale).velocity(noise, 0.9 * t)

    first, second, third = map(np.asarray, map(velocity, (None, 2.0, 3.5)))
    np.testing.assert_allclose(first, second, atol=1e-5)
    assert np.abs(first - third).max() > 1e-2


def test_evaluation_guides_the_teacher_by_the_same_scale():
    params = moved(Systems.of(settings_of(), DATA).teacher_network.init(jax.random.key(1)))
    noise, labels = jax.random.normal(jax.random.key(1), (2, 8, 8, 1)), jnp.array([3, 7])

    def samples(config):
        return jax.jit(Systems.of(config, DATA).teacher_sampler(3))(params, noise, labels)

    found = samples(settings_of(**{"evaluation.guidance": 3.0}))
    np.testing.assert_allclose(found, samples(settings_of((), default=3.0)), atol=1e-6)
    assert np.abs(found - samples(settings_of())).max() > 1e-3


def test_what_a_student_is_asked_for(student):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn(student, guidance=[1.0, 4.0, 2.5])
    said = r"this student was trained for guidance from 1 to 4; guidance=5 is outside, where"
    with pytest.warns(UserWarning, match=said) as caught:
        drawn(student, guidance=[1.0, 5.0, 4.5])
    assert len(caught) == 1
    for guidance, message in (
        ([1.0, 2.0], r"guidance must be a number or \[3\], got \[2\]"),
        (float("nan"), "guidance must be finite and at least 0, got nan"),
        (-1.0, "guidance must be finite and at least 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            drawn(student, guidance=guidance)
    with pytest.raises(ValueError, match="pass labels"):
        student.sample(0, {"text": np.zeros((1, 2, 3))})


def test_a_student_of_one_scale_takes_none(tmp_path):
    student = student_of(settings_of(()))
    remedy = (
        "does not take a guidance scale: leave guidance out, or train a student with "
        "config.teacher.guidance_range"
    )
    with pytest.raises(ValueError, match=remedy):
        drawn(student, guidance=2.0)
    with pytest.raises(ValueError, match=remedy):
        student.sample(0, {"labels": np.arange(3), "guidance": 2.0})
    with pytest.raises(ValueError, match=remedy):
        student.policy(jnp.zeros((1, 8, 8, 1)), 1.0, jnp.array([1]), guidance=2.0)
    assert student.network.conditioning == ClassLabels()
    assert not any(key.startswith("teacher.") for key in student_spec(settings_of(()), DATA))


def test_checkpoints_and_files_know_the_range(student, tmp_path):
    spec = json.loads(json.dumps(student_spec(settings_of(), DATA)))
    plain = student_spec(settings_of(()), DATA)
    added = {"teacher.guidance_scale": 2.0, "teacher.guidance_range": [1.0, 4.0]}
    assert spec == json.loads(json.dumps(plain)) | added
    assert student_settings(spec) == dataclasses.replace(
        student.settings, train=student_settings(spec).train
    )
    state = TrainState(jnp.int32(1), student.params, student.params, ())
    with Checkpointer(tmp_path / "student" / "checkpoints") as checkpointer:
        checkpointer.save(1, state, data_state={}, config={}, spec=spec)
    path = tmp_path / "student.safetensors"
    weights = to_torch_state(student.network.module, student.params)
    write_safetensors(path, weights, {"piflow_jax": json.dumps(spec)})
    expected = drawn(student, guidance=3.0)
    for place in (tmp_path, path):
        loaded = piflow_jax.load(place)
        assert loaded.network == student.network
        np.testing.assert_array_equal(drawn(loaded, guidance=3.0), expected)
    student.export(tmp_path / "sampler.safetensors", substeps=4, platforms=("cpu",))
    exported = piflow_jax.load_exported(tmp_path / "sampler.safetensors")
    labels = np.array([3, 3, 7])
    np.testing.assert_allclose(exported.sample(5, labels, guidance=3.0), expected, atol=1e-5)
    np.testing.assert_allclose(exported.sample(5, labels), drawn(student), atol=1e-5)
    with pytest.raises(ValueError, match="labels must be"):
        exported.sample(5, np.array([11]), guidance=3.0)
    broken = spec | {"teacher.guidance_range": [3.0, 1.0]}
    with pytest.raises(ConfigError, match="guidance_range must be empty or"):
        student_settings(broken)


def test_flux_takes_its_distilled_guidance_by_the_same_argument():
    config = parse(tiny_text.get_config("flux"))
    data = DataShape(name="prompts", channels=1, text_features=5, pooled_features=3)
    conditioning = Systems.of(config, data).student_network.conditioning
    told = {"text": np.ones((2, 4, 5)), "text_length": np.full(2, 4), "pooled": np.ones((2, 3))}
    condition, _ = conditioning.checked(conditioning.guided(told, 1.5), data)
    np.testing.assert_array_equal(condition["guidance"], np.float32([1.5, 1.5]))
    np.testing.assert_array_equal(conditioning(condition)["guidance"], [1.5, 1.5])
    np.testing.assert_array_equal(conditioning(told)["guidance"], [3.5, 3.5])
