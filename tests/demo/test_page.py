"""The page as it is served: through its HTTP API, and in a browser."""

import base64
import io
import json
import os
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from piflow_jax.demo import Drawer, make_page, serve
from tests.demo.drawn import drawn, films

pytest.importorskip("gradio", reason='needs pip install -e ".[demo]"')


@pytest.fixture(scope="module")
def drawer(run):
    return Drawer.load(run)


@pytest.fixture(scope="module")
def url(drawer):
    """The address of a page of two students."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    page = make_page(drawer, drawer)
    _, url, _ = serve(page, "127.0.0.1", None, prevent_thread_lock=True, quiet=True)
    yield url
    page.close()


def test_the_page_is_served_and_draws(url, drawer, tmp_path):
    gradio_client = pytest.importorskip("gradio_client")
    client = gradio_client.Client(url, verbose=False)
    picture, side = client.predict(3, 5, 1, 16, 1.0, 4, api_name="/draw")
    expected = drawn(drawer.samples(3, 5, 1, 4, substeps=16))
    shown = films(picture)
    assert len(shown) == 24
    for pair, (mine, theirs) in enumerate(zip(*(r.pictures for r in expected.rows), strict=True)):
        for found, right in ((shown[2 * pair], mine), (shown[2 * pair + 1], theirs)):
            levels = (np.clip(right, -1, 1) + 1) * 127.5
            assert np.abs(found.astype(float) - levels).max() <= 1
    assert "student, 1 evaluation" in side and "teacher, 4 evaluations" in side
    # What is to be downloaded says what it was made of.
    name, file = re.search(
        r'download="([^"]*)" href="data:image/png;base64,([^"]*)"', side
    ).groups()
    assert name == "digits_seed5_nfe1_samples.png"
    facts = json.loads(Image.open(io.BytesIO(base64.b64decode(file))).text["piflow_jax"])
    assert facts["label"] == 3 and facts["seed"] == 5 and facts["substeps"] == 16
    with pytest.raises(Exception, match="class must be a whole number from -1 to 9, got 11"):
        client.predict(11, 5, 1, 16, 1.0, 4, api_name="/draw")

    stage, side = client.predict(3, 5, 2, 4, api_name="/path")
    assert [picture.shape for picture in films(stage)] == [(8, 33 * 8, 3)] * 6
    assert "<polygon" in stage and "evaluates its network 2 times" in side
    assert "data:image/webp" in side

    morph, _ = client.predict(-1, 0, 7, 1, 0, api_name="/morph")
    assert [picture.shape for picture in films(morph)] == [(8, 12 * 8, 3)] * 10

    path = tmp_path / "drawn.png"
    Image.new("L", (64, 64), 200).save(path)
    editor = {"background": None, "layers": [], "composite": gradio_client.handle_file(str(path))}
    edited, side = client.predict(editor, -1, 0, 0.5, 1, 1, 4, api_name="/edit")
    assert len(films(edited)) == 20 and "was trained for nfe=1" in side

    # The second student's functions.
    again, _ = client.predict(3, 5, 1, 16, 1.0, 4, api_name="/draw_1")
    np.testing.assert_array_equal(films(again), shown)


@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_the_page(url, width):
    playwright = pytest.importorskip(
        "playwright.sync_api", reason='needs pip install -e ".[browser]"'
    )
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    if browser_path is None:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": width, "height": 900})
        tab.goto(url)
        # It opens on a picture.
        tab.wait_for_selector(".pf-pairs figure", timeout=60000)
        assert tab.locator(".pf-pairs figure").count() == 10
        assert tab.locator(".pf-pairs figcaption").all_inner_texts() == list("0123456789")
        picture = tab.locator(".pf-pairs").bounding_box()
        assert picture["width"] > (0.6 if width > 640 else 0.9) * width and picture["y"] < 330
        # Nothing is cut off, and pixels are enlarged without blur.
        assert tab.evaluate("document.documentElement.scrollWidth") == width
        film = tab.locator(".pf-pairs .pf-film").first
        assert film.evaluate("e => getComputedStyle(e).imageRendering") == "pixelated"
        # Another number of evaluations.
        tab.get_by_role("radio", name="2").first.check()
        tab.get_by_role("button", name="Draw").first.click()
        said = tab.get_by_text("student, 2 evaluations")
        playwright.expect(said).to_be_visible(timeout=60000)
        playwright.expect(tab.get_by_text("with the 1 evaluation of its training")).to_be_visible()
        # A way draws when it is opened; its slider moves the films.
        tab.get_by_role("tab", name="Path").click()
        slider = tab.locator(".pf-stage input").first
        playwright.expect(slider).to_be_visible(timeout=60000)
        slider.fill("32")
        film = tab.locator(".pf-path .pf-film").first
        assert film.evaluate("e => getComputedStyle(e).backgroundPositionX") == "100%"
        if path := os.environ.get("PIFLOW_SCREENSHOT"):
            tab.screenshot(path=path)
        browser.close()
