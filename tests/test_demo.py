"""The page: what its button draws, and that it serves it."""

import dataclasses
import os
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import piflow_jax
from piflow_jax.config import parse
from piflow_jax.convert import to_torch_state, write_safetensors
from piflow_jax.data import load_captioned_digits_source, stacked
from piflow_jax.demo import Drawer, main, make_page
from piflow_jax.evaluation import draw_grid
from piflow_jax.models.vae import AutoencoderKL
from piflow_jax.systems.assembly import Systems
from piflow_jax.systems.shapes import DataShape
from tests import tiny, tiny_text
from tests.saved_runs import save_run

DATA = DataShape(name="digits", sample_size=8, channels=1, num_classes=10)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_run(parse(tiny.get_config()), DATA, tmp_path_factory.mktemp("run"))


def test_the_picture_is_of_both_on_the_same_noise(run):
    drawer = Drawer.load(run)
    picture, times = drawer.draw(3, 5, 2, 16, 1.0, 4, count=4)
    labels = np.full(4, 3)
    mine = piflow_jax.load(run).sample(5, labels, substeps=16, nfe=2)
    noise = jnp.stack(
        [jax.random.normal(jax.random.fold_in(jax.random.key(5), i), DATA.shape) for i in range(4)]
    )
    # The sampler of `--mode=evaluate`.
    sampler = Systems.of(parse(tiny.get_config()), DATA).teacher_sampler(4)
    theirs = sampler(drawer.teacher_params, noise, jnp.asarray(labels))
    expected = draw_grid([("student, 2 NFE", mine), ("teacher, 4 NFE", theirs)])
    # Rounding may move a grey level by one.
    assert np.abs(picture.astype(int) - np.asarray(expected).astype(int)).max() <= 1
    names = [line.split(":")[0] for line in times.splitlines()]
    assert names[:2] == ["student, 2 NFE", "teacher, 4 NFE"]
    assert times.splitlines()[2].startswith("this student was trained for nfe=1, ")
    alone, times = drawer.draw(3, 5, 1, 16, 1.0, 0, count=4)
    assert alone.shape[0] < picture.shape[0] and "teacher" not in times


def test_the_teacher_is_guided_as_the_student_was_taught(tmp_path):
    config = tiny.get_config()
    config.teacher.guidance_scale, config.teacher.guidance_interval = 40.0, (0.0, 0.6)
    config.teacher.orthogonal_guidance = 0.5
    settings = parse(config)
    drawer = Drawer.load(save_run(settings, DATA, tmp_path))
    # Fresh networks hardly know their labels.
    params = jax.tree.map(
        lambda leaf: leaf + 0.2 * jnp.sin(jnp.arange(leaf.size)).reshape(leaf.shape),
        drawer.teacher_params,
    )
    drawer = dataclasses.replace(drawer, teacher_params=params)
    picture, times = drawer.draw(3, 5, 1, 8, 1.0, 4, count=2)
    assert times.splitlines()[1].startswith("teacher, 4 NFE, guidance 40: ")
    labels = np.full(2, 3)
    noise = jnp.stack(
        [jax.random.normal(jax.random.fold_in(jax.random.key(5), i), DATA.shape) for i in range(2)]
    )
    mine = drawer.student.sample(5, labels, substeps=8, nfe=1)
    # The sampler of `--mode=evaluate`.
    theirs, unguided = (
        jax.jit(Systems.of(one, DATA).teacher_sampler(4))(params, noise, jnp.asarray(labels))
        for one in (settings, parse(tiny.get_config()))
    )
    names = "student, 1 NFE", "teacher, 4 NFE, guidance 40"
    expected, plain = (
        np.asarray(draw_grid(list(zip(names, (mine, row), strict=True)))).astype(int)
        for row in (theirs, unguided)
    )
    assert np.abs(picture - expected).max() <= 1
    assert np.abs(picture - plain).max() > 8


def test_a_student_without_a_teacher_is_shown_alone(run):
    picture, times = Drawer.load(run / "student" / "checkpoints").draw(0, 0, 1, 8, 1.0, 4, count=2)
    assert picture.dtype == np.uint8 and "teacher" not in times


@pytest.mark.slow
def test_a_student_that_reads_text_draws_prompts(tmp_path):
    source = load_captioned_digits_source()
    settings = parse(tiny_text.get_config("flux"))
    save_run(settings, DataShape.of("captioned_digits", source), tmp_path)
    drawer = Drawer.load(tmp_path)
    picture, times = drawer.draw(7, 5, 2, 8, 1.0, 4, count=3)
    example = source[7]
    told = stacked([example["condition"]] * 3)
    mine = piflow_jax.load(tmp_path).sample(5, told, size=(8, 8), substeps=8, nfe=2)
    np.testing.assert_array_equal(picture, draw_grid([("student, 2 NFE", mine)]))
    assert times.startswith("student, 2 NFE") and "teacher" not in times


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
    picture, _ = drawer.draw(3, 5, 1, 16, 1.0, 4, count=2)
    labels = np.full(2, 3)
    mine = piflow_jax.load(workdir).sample(5, labels, substeps=16, nfe=1)
    noise = jnp.stack(
        [jax.random.normal(jax.random.fold_in(jax.random.key(5), i), (8, 8, 4)) for i in range(2)]
    )
    teacher, weights = piflow_jax.load_teacher(workdir)
    warp = piflow_jax.TimeWarp(drawer.student.settings.train.shift)
    theirs = piflow_jax.ode_sample(teacher.bind(weights, jnp.asarray(labels)), noise, 4, warp)
    # The scale and shift of the data, not those that the autoencoder's file may lack.
    rows = [
        (name, vae.apply(params, latents / 0.5 + 0.1, method="decode"))
        for name, latents in (("student, 1 NFE", mine), ("teacher, 4 NFE", theirs))
    ]
    expected = np.asarray(draw_grid(rows))
    assert picture.shape == expected.shape
    assert np.abs(picture.astype(int) - expected.astype(int)).max() <= 1


def test_times_count_no_compilation_of_the_decoder(of_latents, monkeypatch):
    workdir, *_ = of_latents
    student = piflow_jax.load(workdir)
    clock, known = [0.0], set()

    def decode(latents):
        """Takes a second, and a hundred to compile for every number of latents."""
        clock[0] += 1 if len(latents) in known else 101
        known.add(len(latents))
        return np.zeros((len(latents), 16, 16, 3))

    monkeypatch.setattr("piflow_jax.demo.time.perf_counter", lambda: clock[0])
    drawer = Drawer(student, decode=decode)
    for count in (1, 2):
        assert drawer.draw(0, 0, 1, 8, 1.0, 0, count=count)[1] == "student, 1 NFE: 1000.0 ms"


def test_the_autoencoder_belongs_to_the_latents(run, of_latents):
    workdir, *_ = of_latents
    with pytest.raises(ValueError, match=r"latents of 4 channels: pass --vae"):
        Drawer.load(workdir)
    with pytest.raises(ValueError, match=r"samples are pixels: leave --vae out"):
        Drawer.load(run, vae=workdir / "vae.safetensors")


def test_what_a_student_that_reads_text_needs_is_named(of_latents, tmp_path):
    data = DataShape(name="prompts", channels=16, text_features=12, pooled_features=10)
    save_run(parse(tiny_text.get_config("flux")), data, tmp_path)
    with pytest.raises(ValueError, match=r"latents of 16 channels: pass --vae"):
        Drawer.load(tmp_path)
    with pytest.raises(ValueError, match=r"--vae is of latents with 4 channels, .* have 16"):
        Drawer.load(tmp_path, vae=of_latents[0] / "vae.safetensors")


def test_the_command_line_says_what_is_loaded(run, monkeypatch):
    drawers = []
    monkeypatch.setattr("piflow_jax.demo.make_page", lambda drawer: drawers.append(drawer) or PAGE)
    main([f"--checkpoint={run}", "--dtype=bfloat16"])
    assert drawers[0].student.network.module.dtype == jnp.bfloat16
    main([f"--checkpoint={run}"])
    assert drawers[1].student.network.module.dtype == jnp.float32


class PAGE:
    """A page that nobody sees."""

    @staticmethod
    def launch(**where):
        del where["app_kwargs"]  # see tests/doors/test_page.py
        assert where == {"server_name": "127.0.0.1", "server_port": 7860}


def test_a_checkpoint_is_needed(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([])
    assert "--checkpoint" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([f"--checkpoint={tmp_path / 'nowhere'}"])
    assert "nowhere: no such checkpoint" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="nowhere: no such checkpoint"):
        Drawer.load(tmp_path / "nowhere")


def test_a_run_whose_student_has_no_checkpoint_yet_says_so(run, tmp_path, capsys):
    shutil.copytree(run / "teacher", tmp_path / "teacher")
    for _ in range(2):
        with pytest.raises(SystemExit):
            main([f"--checkpoint={tmp_path}"])
        (line,) = capsys.readouterr().err.splitlines()[-1:]
        assert f"error: there is no checkpoint in {tmp_path / 'student' / 'checkpoints'}" in line
        (tmp_path / "student" / "checkpoints").mkdir(parents=True, exist_ok=True)


def test_the_page_is_served_and_draws(run, monkeypatch):
    pytest.importorskip("gradio", reason='needs pip install -e ".[demo]"')
    gradio_client = pytest.importorskip("gradio_client")
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    page = make_page(Drawer.load(run))
    try:
        _, url, _ = page.launch(prevent_thread_lock=True, server_name="127.0.0.1", quiet=True)
        client = gradio_client.Client(url, verbose=False)
        picture, times = client.predict(3, 5, 1, 16, 1.0, 4, api_name="/draw")
        assert times.startswith("student, 1 NFE: ") and "teacher, 4 NFE: " in times
        from PIL import Image

        with Image.open(picture if isinstance(picture, str) else picture["path"]) as image:
            expected, _ = Drawer.load(run).draw(3, 5, 1, 16, 1.0, 4)
            np.testing.assert_allclose(np.asarray(image.convert("RGB")), expected, atol=1)
        with pytest.raises(Exception, match=r"class|label|Value|choices"):
            client.predict(11, 5, 1, 16, 1.0, 4, api_name="/draw")
    finally:
        page.close()


def test_a_browser_shows_the_page(run, monkeypatch):
    pytest.importorskip("gradio", reason='needs pip install -e ".[demo]"')
    playwright = pytest.importorskip(
        "playwright.sync_api", reason='needs pip install -e ".[browser]"'
    )
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    if browser_path is None:
        pytest.skip("needs Chromium")
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    drawer = Drawer.load(run)
    page = make_page(drawer)
    try:
        _, url, _ = page.launch(prevent_thread_lock=True, server_name="127.0.0.1", quiet=True)
        with playwright.sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
            tab = browser.new_page(viewport={"width": 1200, "height": 900})
            tab.goto(url)
            times = tab.get_by_label("times")
            # It draws when it is opened; then with another number of the student's evaluations.
            playwright.expect(times).to_have_value(
                re.compile("student, 1 NFE: .*ms"), timeout=60000
            )
            tab.get_by_label("number input for student's NFE").fill("2")
            tab.get_by_role("button", name="Draw").click()
            playwright.expect(times).to_have_value(
                re.compile("student, 2 NFE: .*ms"), timeout=60000
            )
            image = tab.locator("img").first
            playwright.expect(image).to_be_visible()
            width, height = image.evaluate("i => [i.naturalWidth, i.naturalHeight]")
            if path := os.environ.get("PIFLOW_SCREENSHOT"):
                tab.screenshot(path=path)
            browser.close()
        expected, _ = drawer.draw(3, 0, 2, 128, 1.0, 32)
        assert (height, width) == expected.shape[:2]
    finally:
        page.close()
