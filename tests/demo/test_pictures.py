"""Pictures and markup of the page, against arrays that are known."""

import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from piflow_jax.demo import markup
from piflow_jax.demo.drawings import Drawing, Row, Trajectory, plural
from piflow_jax.demo.paths import Way, between, teacher_way
from piflow_jax.demo.pictures import (
    COLOURS,
    animation,
    as_sample,
    film,
    png,
    weight_maps,
    weight_order,
    weight_shares,
)
from piflow_jax.flow.schedule import TimeWarp
from tests.demo.drawn import films


def opened(contents):
    return Image.open(io.BytesIO(contents))


def rgb(colour):
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def test_a_film_has_its_frames_next_to_each_other():
    frames = np.arange(2 * 3 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 3)
    pixels = film(frames)
    assert pixels.shape == (3, 8, 3)
    np.testing.assert_array_equal(pixels[:, 4:], frames[1])


def test_a_png_keeps_its_pixels_and_says_what_it_is_made_of():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    picture = opened(png(pixels, {"seed": 3, "nfe": 1}))
    np.testing.assert_array_equal(np.asarray(picture), pixels)
    assert json.loads(picture.text["piflow_jax"]) == {"seed": 3, "nfe": 1}


def test_an_animation_has_all_frames_and_starts_again():
    images = np.linspace(-1, 1, 5 * 2 * 16).reshape(5, 2, 4, 4, 1)
    picture = opened(animation([("student", images), ("teacher", images)], ("a", "b"), scale=3))
    assert (picture.format, picture.n_frames, picture.info["loop"]) == ("WEBP", 5, 0)
    picture.seek(4)
    last = np.asarray(picture.convert("RGB"))
    assert (last == 255).all(-1).any() and last.shape[0] < last.shape[1]


def test_weights_are_in_the_colours_of_their_components():
    """Two times, two sites, three components: at last the third has all of the first site."""
    weights = np.array([[[0.2, 0.5, 0.3]] * 2, [[0.0, 0.0, 1.0], [0.5, 0.0, 0.5]]])[:, None]
    assert weight_order(weights).tolist() == [2, 0, 1]
    np.testing.assert_allclose(weight_shares(weights), [[0.3, 0.2, 0.5], [0.75, 0.25, 0]])
    first, second = rgb(COLOURS[0]), rgb(COLOURS[1])
    maps = weight_maps(weights)
    assert maps.shape == (2, 1, 2, 3) and maps[1, 0, 0].tolist() == first
    half = np.rint((np.asarray(first) + second) / 2)
    np.testing.assert_array_equal(maps[1, 0, 1], half)


def test_the_lightest_components_share_a_colour():
    many = len(COLOURS) + 10
    weights = np.full((1, 4, 4, many), 1 / many)
    shares = weight_shares(weights)
    assert shares.shape == (1, len(COLOURS))
    np.testing.assert_allclose(shares[0, [0, -1]], [1 / many, 11 / many])


@pytest.mark.parametrize(
    ("mode", "colour", "channels", "inverted", "value"),
    [
        ("L", 0, 1, False, -1.0),
        ("L", 0, 1, True, 1.0),
        ("L", 255, 3, False, 1.0),
        ("RGB", (255, 0, 0), 3, False, (1, -1, -1)),
        ("RGBA", (0, 0, 0, 0), 1, False, 1.0),
    ],
)
def test_a_picture_becomes_a_sample(mode, colour, channels, inverted, value):
    file = io.BytesIO()
    Image.new(mode, (40, 20), colour).save(file, "PNG")
    sample = as_sample(file.getvalue(), 8, channels, inverted)
    assert sample.shape == (8, 8, channels) and sample.dtype == np.float32
    np.testing.assert_allclose(sample, np.broadcast_to(value, sample.shape), atol=1e-6)


def test_noise_between_two_stays_standard_normal():
    first, second = np.random.default_rng(0).normal(size=(2, 1, 200, 200, 1))
    turned = np.asarray(between(first, second, 5))
    assert turned.shape == (1, 5, 200, 200, 1)
    np.testing.assert_allclose(turned[:, 0], first, atol=1e-6)
    np.testing.assert_allclose(turned[:, -1], second, atol=1e-6)
    np.testing.assert_allclose(turned.std(axis=(0, 2, 3, 4)), 1, atol=0.02)


@pytest.mark.parametrize("shift", [1.0, 3.2])
def test_a_teacher_goes_straight_within_a_step(shift):
    """Three steps of a scalar whose velocities are 1, 2 and 3."""
    warp = TimeWarp(shift)
    levels = [float(warp.warp(1 - k / 3)) for k in range(4)]
    states = [5.0]
    for k, u in enumerate((1.0, 2.0, 3.0)):
        states.append(states[-1] + (levels[k + 1] - levels[k]) * u)
    taus = np.array([1.0, 5 / 6, 2 / 3, 0.5, 0.0])
    way = teacher_way(np.float32(states[:3])[:, None], np.float32([[1], [2], [3]]), warp, taus)
    at = [float(warp.warp(tau)) for tau in taus]
    right = [5, 5 + (at[1] - 1) * 1, states[1], states[1] + (at[3] - levels[1]) * 2, states[3]]
    np.testing.assert_allclose(way.states[:, 0], right, rtol=1e-6)
    x0 = [right[0] - at[0] * 1, right[1] - at[1] * 1, right[2] - at[2] * 2, right[3] - at[3] * 2]
    np.testing.assert_allclose(way.x0[:, 0], [*x0, right[4]], rtol=1e-5)


def row(system, evaluations, value, seconds, shape=(2, 4, 4, 1)):
    array = np.full(shape, value, np.float32)
    return Row(system, evaluations, array, array, seconds)


def drawing(*rows, **others):
    facts = {"student": "digits", "seed": 5, "nfe": 1}
    return Drawing(("<b>", "9"), rows, **{"notes": (), "facts": facts} | others)


def test_students_are_above_their_teachers_with_names_outside():
    text = markup.pairs(drawing(row("student", 1, 1.0, 0.01), row("teacher", 32, -1.0, 0.3)))
    pictures = films(text)
    assert [int(picture[0, 0, 0]) for picture in pictures] == [255, 0, 255, 0]
    # Pixels as they are: the browser enlarges them.
    assert {picture.shape for picture in pictures} == {(4, 4, 3)}
    assert "<figcaption>&lt;b&gt;</figcaption>" in text and "<b>9" not in text
    plain = re.sub(r"<[^>]*>", "", text)
    assert plain.startswith(
        "Above the student after 1 network evaluation, below its teacher after 32, "
        "from the same noise."
    )


def test_a_morph_has_a_slider_over_its_frames():
    rows = [row("student", 1, 0.0, 0.01, (2, 6, 4, 4, 1))]
    text = markup.pairs(drawing(*rows), ("seed 0", "seed 1"))
    assert [picture.shape for picture in films(text)] == [(4, 24, 3)] * 2
    assert 'max="5"' in text and "--last: 5" in text and "seed 1" in text
    assert "type=" not in markup.pairs(drawing(row("student", 1, 0.0, 0.01)))


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        ((0.002, 0.1), "50&times;</b> faster"),
        ((0.02, 0.1), "5.0&times;</b> faster"),
        ((2.0, 1.0), "2.0&times;</b> slower"),
    ],
)
def test_times_are_bars_with_the_speed_up(seconds, said):
    mine, theirs = seconds
    rows = row("student", 1, 1.0, mine), row("teacher", 32, 0.5, theirs)
    text = markup.bars(drawing(*rows), "CPU")
    assert said in text
    widths = [float(width) for width in re.findall(r"width: ([\d.]+)%", text)]
    np.testing.assert_allclose(widths, [100 * one / max(seconds) for one in seconds])
    assert "distance between the rows: 0.25." in text


def test_untrained_evaluations_are_shown_with_what_they_cost():
    rows = row("student", 2, 1.0, 0.01), row("teacher", 32, 0.0, 0.1)
    known = row("student", 1, 0.1, 0.01)
    text = markup.bars(drawing(*rows, notes=("noise",), as_trained=known), "CPU", "<a>")
    assert "between the rows: 1, and 0.01 with the 1 evaluation of its training." in text
    assert "Noise." in text and text.endswith("<a></div>")


@pytest.mark.parametrize("mixture", [True, False])
@pytest.mark.parametrize("alone", [True, False])
def test_a_path_shows_states_data_and_weights(mixture, alone):
    frames = np.linspace(-1, 1, 3)[:, None, None, None] * np.ones((3, 4, 4, 1), np.float32)
    weights = np.full((3, 4, 4, 2), 0.5) if mixture else None
    ways = [("student", 1, Way(frames, -frames, weights))]
    ways += [] if alone else [("teacher", 8, Way(0 * frames, frames))]
    taus = np.linspace(1, 0, 3)
    text = markup.stage(Trajectory("3", taus, taus, tuple(ways), {}))
    pictures = films(text)
    assert {picture.shape for picture in pictures} == {(4, 12, 3)}
    state, x0 = pictures[:2]
    np.testing.assert_array_equal(state[0, ::4, 0], [0, 128, 255])
    np.testing.assert_array_equal(x0[0, ::4, 0], [255, 128, 0])
    assert ("<polygon" in text) == mixture
    assert len(pictures) == 2 + mixture + (0 if alone else 3)
    if not alone:  # 0 where they agree, 255 where they are two apart
        np.testing.assert_array_equal(pictures[-1][0, ::4, 0], [128, 0, 128])
        assert "mean squared distance of 1." in markup.gap(
            Trajectory("3", taus, taus, tuple(ways), {})
        )


def test_numbers_of_evaluations_are_words():
    assert [plural(n) for n in (1, 2)] == ["1 evaluation", "2 evaluations"]
