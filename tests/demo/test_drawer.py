"""What the page draws, against the samplers of the package."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import piflow_jax
from piflow_jax.config import parse
from piflow_jax.convert import to_torch_state, write_safetensors
from piflow_jax.data import load_captioned_digits_source, stacked
from piflow_jax.demo import Drawer
from piflow_jax.demo.controls import Control
from piflow_jax.demo.drawer import EACH, _kept
from piflow_jax.demo.drawings import Batch
from piflow_jax.demo.views import views_of
from piflow_jax.flow.teacher import Teacher
from piflow_jax.models.vae import AutoencoderKL
from piflow_jax.systems.assembly import Systems
from piflow_jax.systems.conditioning import ClassLabels
from piflow_jax.systems.shapes import DataShape
from tests import tiny, tiny_text
from tests.demo.drawn import drawn
from tests.saved_runs import save_run
from tests.students import moved

DATA = DataShape(name="digits", sample_size=8, channels=1, num_classes=10)


def noise_of(seed, count, shape=DATA.shape):
    keys = [jax.random.fold_in(jax.random.key(seed), i) for i in range(count)]
    return jnp.stack([jax.random.normal(key, shape) for key in keys])


def test_both_systems_start_at_the_same_noise(run):
    drawer = Drawer.load(run)
    drawing = drawn(drawer.samples(3, 5, 2, 4, substeps=16, count=4))
    labels = np.full(4, 3)
    mine = piflow_jax.load(run).sample(5, labels, substeps=16, nfe=2)
    # The sampler of `--mode=evaluate`.
    sampler = Systems.of(parse(tiny.get_config()), DATA).teacher_sampler(4)
    theirs = sampler(drawer.teacher_params, noise_of(5, 4), jnp.asarray(labels))
    student, teacher = drawing.rows
    assert [(row.system, row.evaluations) for row in drawing.rows] == [
        ("student", 2),
        ("teacher", 4),
    ]
    np.testing.assert_allclose(student.pictures, mine, atol=1e-5)
    np.testing.assert_allclose(teacher.pictures, theirs, atol=1e-5)
    assert drawing.names == ("3",) * 4
    assert drawing.notes[0].startswith("this student was trained for nfe=1, ")
    # What it would be with as many evaluations as it was trained for.
    known = piflow_jax.load(run).sample(5, labels, substeps=16)
    np.testing.assert_allclose(drawing.as_trained.samples, known, atol=1e-5)
    far = float(np.mean(np.square(mine - theirs)))
    assert drawing.distance(student) == pytest.approx(far, rel=1e-3)
    alone = drawn(drawer.samples(3, 5, 1, 0, substeps=16, count=4))
    assert [row.system for row in alone.rows] == ["student"]
    assert alone.distance(alone.rows[0]) is None and not alone.notes and alone.as_trained is None


def test_the_teacher_is_guided_as_the_student_was_taught(tmp_path):
    config = tiny.get_config()
    config.teacher.guidance_scale, config.teacher.guidance_interval = 40.0, (0.0, 0.6)
    config.teacher.orthogonal_guidance = 0.5
    settings = parse(config)
    drawer = Drawer.load(save_run(settings, DATA, tmp_path))
    # Fresh networks hardly know their labels.
    params = moved(drawer.teacher_params, 0.2)
    drawer = dataclasses.replace(drawer, teacher_params=params)
    _, teacher = drawn(drawer.samples(3, 5, 1, 4, substeps=8, count=2)).rows
    assert teacher.said == "teacher, 4 evaluations, guidance 40"
    noise, labels = noise_of(5, 2), jnp.full(2, 3)
    # The sampler of `--mode=evaluate`.
    theirs, unguided = (
        jax.jit(Systems.of(one, DATA).teacher_sampler(4))(params, noise, labels)
        for one in (settings, parse(tiny.get_config()))
    )
    np.testing.assert_allclose(teacher.samples, theirs, atol=1e-3)
    assert np.abs(teacher.samples - unguided).max() > 0.1


def test_one_of_each_class(run):
    drawer = Drawer.load(run / "student" / "checkpoints")
    drawing = drawn(drawer.samples(EACH, 0, 1, 4, substeps=8))
    (row,) = drawing.rows  # the teacher is not there
    assert drawing.names == tuple("0123456789")
    mine = drawer.student.sample(0, np.arange(10), substeps=8)
    np.testing.assert_allclose(row.samples, mine, atol=1e-5)


def test_a_morph_turns_the_noise(run):
    drawer = Drawer.load(run)
    drawing = drawn(drawer.morph(EACH, 0, 7, 1, 2))
    student, teacher = drawing.rows
    frames = student.samples.shape[1]
    assert frames == 12 and student.samples.shape == teacher.samples.shape == (10, 12, *DATA.shape)
    middle = np.cos(np.pi / 2 * 4 / 11) * noise_of(0, 10) + np.sin(np.pi / 2 * 4 / 11) * noise_of(
        7, 10
    )
    mine = drawer.student.sample(0, np.arange(10), noise=middle)
    np.testing.assert_allclose(student.samples[:, 4], mine, atol=1e-5)
    for frame, seed in ((0, 0), (-1, 7)):
        end = drawer.student.sample(seed, np.arange(10))
        np.testing.assert_allclose(student.samples[:, frame], end, atol=1e-5)


def test_a_picture_is_the_start_of_both(run):
    drawer = Drawer.load(run)
    picture = np.linspace(-1, 1, 64).reshape(8, 8, 1)
    drawing = drawn(drawer.edit(picture, 3, 5, 0.5, 1, 8))
    student, teacher = drawing.rows
    x = np.float32(np.broadcast_to(picture, student.samples.shape))
    mine = drawer.student.sample(5, np.full(12, 3), x=x, start=0.5)
    np.testing.assert_allclose(student.samples, mine, atol=1e-5)
    assert "start=0.5" in drawing.notes[0]
    # Half of its steps, with Euler's method by hand.
    state, labels = (x + noise_of(5, 12)) / 2, jnp.full(12, 3)
    velocity = drawer.teacher.bind(drawer.teacher_params, labels)
    for step in range(4):
        level = 0.5 - 0.125 * step
        state = state - 0.125 * velocity(state, jnp.full(12, level))
    assert teacher.evaluations == 4
    np.testing.assert_allclose(teacher.samples, state, atol=1e-4)
    # At 1 the picture is forgotten.
    forgotten = drawn(drawer.edit(picture, 3, 5, 1.0, 1, 0)).rows[0]
    np.testing.assert_allclose(
        forgotten.samples, drawer.student.sample(5, np.full(12, 3)), atol=1e-5
    )


def test_ways_end_at_the_samples(run):
    drawer = Drawer.load(run)
    found = drawn(drawer.path(3, 5, 2, 8))
    (_, _, mine), (_, _, theirs) = found.ways
    noise, label = noise_of(5, 1), np.full(1, 3)
    for way in (mine, theirs):
        np.testing.assert_allclose(way.states[0], noise[0], atol=1e-6)
    end = drawer.student.sample(5, label, nfe=2)
    np.testing.assert_allclose(mine.states[-1], end[0], atol=1e-5)
    sampler = Systems.of(parse(tiny.get_config()), DATA).teacher_sampler(8)
    end = sampler(drawer.teacher_params, noise, jnp.asarray(label))
    np.testing.assert_allclose(theirs.states[-1], end[0], atol=1e-5)
    # At the data, a state is what it heads for.
    np.testing.assert_allclose(mine.x0[-1], mine.states[-1], atol=1e-5)
    assert mine.weights.shape[:3] == (33, 8, 8)
    np.testing.assert_allclose(mine.weights.sum(-1), 1, atol=1e-5)


def test_a_slider_takes_its_first_value_wherever_that_lies():
    start = Control(key="start", name="start", value=0.666667, low=0.05, high=1.0, step=0.05)
    # 0.65 is where the page's slider stands at first.
    sent = (0.666667, 0.65, 0.6, 1.2, 10**400)
    assert [start.read(one) for one in sent] == [0.666667, 0.666667, 0.6, 1.0, 1.0]
    with pytest.raises(ValueError, match="start must be a number, got 'nan'"):
        start.read(float("nan"))
    scale = Control(key="guidance", name="guidance", value=2.2, low=1.0, high=3.75, step=0.5)
    assert [scale.read(one) for one in (2.2, 2.0, 2.5, 3.75, 9.0)] == [2.2, 2.2, 2.5, 3.75, 3.75]


def test_a_student_of_a_range_and_its_teacher_have_the_same_guidance(monkeypatch):
    settings = types.SimpleNamespace(
        train=types.SimpleNamespace(shift=1.0), data=types.SimpleNamespace(name="my_data")
    )
    network = types.SimpleNamespace(conditioning=ClassLabels(2.0, (1.0, 4.0)))
    student = types.SimpleNamespace(settings=settings, network=network)
    teacher = Teacher(predict=max, shape=(8, 8, 1))  # of a file, which knows no guidance
    drawer = Drawer(student, teacher, {}, name="another")
    given = []

    def called(self, key, said, make, *arguments):
        given.append(arguments[-1])
        return ((), ()), 0.0
        yield

    monkeypatch.setattr(Drawer, "_called", called)
    batch = Batch(("",), np.zeros(1, int), np.zeros((1, 8, 8, 1), np.float32))
    for options, scale in (({}, 2.0), ({"guidance": 3.0}, 3.0)):
        _, row = drawn(drawer._rows(batch, 1, 4, options))
        assert given[-1] == scale and row.said.endswith(f"guidance {scale:g}")
    # What tells the students of a page apart.
    assert drawer.title == "another" and drawer._facts()["student"] == "another"
    assert dataclasses.replace(drawer, name="").title == "my data"


def test_programs_are_said_once_and_few_are_kept():
    drawer = Drawer(student=None)

    def call(number):
        generator = drawer._called(number, f"number {number}", lambda: lambda x: x, np.ones(2))
        said = list(generator)
        return bool(said), said

    for number in (*range(16), 0, 16, 0, *range(17, 40), 39):
        call(number)
    assert len(_kept) == 16  # of all drawers
    # The last to be used stay.
    assert [number for number in (39, 24, 23) if call(number)[0]] == [23]
    assert call(50)[1] == ["Compiling number 50, which takes up to a minute, once."]


@pytest.mark.slow
def test_a_student_that_reads_text_draws_prompts(tmp_path):
    source = load_captioned_digits_source()
    settings = parse(tiny_text.get_config("flux"))
    save_run(settings, DataShape.of("captioned_digits", source), tmp_path)
    drawer = Drawer.load(tmp_path)
    drawing = drawn(drawer.samples(7, 5, 2, 4, substeps=8, count=3))
    example = source[7]
    told = stacked([example["condition"]] * 3)
    student = piflow_jax.load(tmp_path)
    mine = student.sample(5, told, size=(8, 8), substeps=8, nfe=2)
    (row,) = drawing.rows
    np.testing.assert_allclose(row.samples, mine, atol=1e-5)
    # FLUX.1's students take a guidance scale, and the page has a control for it.
    other = drawn(drawer.samples(7, 5, 2, 4, substeps=8, count=3, guidance=1.5))
    mine = student.sample(5, told | {"guidance": 1.5}, size=(8, 8), substeps=8, nfe=2)
    np.testing.assert_allclose(other.rows[0].samples, mine, atol=1e-5)
    assert (drawing.facts["guidance"], other.facts["guidance"]) == (3.5, 1.5)
    assert "guidance" in [control.key for control in views_of(drawer)[0].controls]


@pytest.fixture(scope="module")
def of_latents(tmp_path_factory):
    """A run on latents of classes, as ImageNet's, and the autoencoder of these."""
    workdir = tmp_path_factory.mktemp("latents")
    latents = {"latent_scale": 0.5, "latent_shift": 0.1}
    data = DataShape(name="latents", sample_size=8, channels=4, num_classes=10, **latents)
    save_run(parse(tiny.get_config()), data, workdir)
    vae = AutoencoderKL(channels=(32, 32), layers_per_block=1)
    params = jax.jit(vae.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    write_safetensors(workdir / "vae.safetensors", to_torch_state(vae, params))
    return workdir, vae, params


@pytest.mark.slow
def test_latents_of_classes_are_decoded_in_both_rows(of_latents):
    workdir, vae, params = of_latents
    drawer = Drawer.load(workdir, vae=workdir / "vae.safetensors")
    drawing = drawn(drawer.samples(3, 5, 1, 4, substeps=16, count=2))
    labels = np.full(2, 3)
    mine = piflow_jax.load(workdir).sample(5, labels, substeps=16, nfe=1)
    teacher, weights = piflow_jax.load_teacher(workdir)
    warp = piflow_jax.TimeWarp(drawer.student.settings.train.shift)
    velocity = teacher.bind(weights, jnp.asarray(labels))
    theirs = piflow_jax.ode_sample(velocity, noise_of(5, 2, (8, 8, 4)), 4, warp)
    for row, latents in zip(drawing.rows, (mine, theirs), strict=True):
        # The scale and shift of the data, not those that the autoencoder's file may lack.
        pictures = vae.apply(params, latents / 0.5 + 0.1, method="decode")
        np.testing.assert_allclose(row.pictures, pictures, atol=1e-4)
    assert not drawer.edits  # of a picture nobody knows the latents


@pytest.mark.slow
def test_times_count_no_compilation_of_the_decoder(of_latents, monkeypatch):
    workdir, *_ = of_latents
    student = piflow_jax.load(workdir)
    clock, known = [0.0], set()

    def decode(latents):
        """Takes a second, and a hundred to compile for every number of latents."""
        clock[0] += 1 if len(latents) in known else 101
        known.add(len(latents))
        return np.zeros((len(latents), 16, 16, 3))

    monkeypatch.setattr("piflow_jax.demo.drawer.time.perf_counter", lambda: clock[0])
    drawer = Drawer(student, decode=decode)
    for count in (1, 2):
        assert drawn(drawer.samples(0, 0, 1, substeps=8, count=count)).rows[0].seconds == 1.0


def test_the_autoencoder_belongs_to_the_latents(run, of_latents):
    workdir, *_ = of_latents
    with pytest.raises(ValueError, match=r"latents of 4 channels: pass --vae"):
        Drawer.load(workdir)
    with pytest.raises(ValueError, match=r"samples are pixels: leave --vae out"):
        Drawer.load(run, vae=workdir / "vae.safetensors")


def test_a_student_of_classes_reads_no_prompts(run, tmp_path):
    with pytest.raises(ValueError, match=r"reads no text: leave --prompts out"):
        Drawer.load(run, prompts=tmp_path)


@pytest.mark.slow
def test_what_a_student_that_reads_text_needs_is_named(of_latents, tmp_path):
    data = DataShape(name="prompts", channels=16, text_features=12, pooled_features=10)
    save_run(parse(tiny_text.get_config("flux")), data, tmp_path)
    with pytest.raises(ValueError, match=r"latents of 16 channels: pass --vae"):
        Drawer.load(tmp_path)
    with pytest.raises(ValueError, match=r"--vae makes latents with 4 channels, .* have 16"):
        Drawer.load(tmp_path, vae=of_latents[0] / "vae.safetensors")
