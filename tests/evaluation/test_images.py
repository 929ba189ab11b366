import numpy as np
import pytest
from PIL import Image

from piflow_jax.evaluation import draw_grid, save_grid
from piflow_jax.evaluation.images import _GAP, _MARGIN, _ROW_GAP


def saved(path, rows, **options):
    save_grid(path, rows, **options)
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB"))


def test_pixels_are_repeated_clipped_and_in_order(tmp_path):
    images = np.random.default_rng(0).uniform(-1.5, 1.5, (3, 8, 8, 1))
    sheet = saved(tmp_path / "grid.png", [("a", images)])
    block = sheet[_MARGIN : _MARGIN + 48, -_MARGIN - 3 * 48 - 2 * _GAP : -_MARGIN]
    expected = np.round((np.clip(images, -1, 1) + 1) / 2 * 255)
    for index, image in enumerate(expected):
        start = index * (48 + _GAP)
        tile = block[:, start : start + 48]
        for dy in (0, 3, 5):  # corners and inside of each enlarged pixel
            np.testing.assert_allclose(tile[dy::6, dy::6], np.repeat(image, 3, -1), atol=1)


def test_rows_are_stacked_with_colour_and_different_lengths(tmp_path):
    red = np.broadcast_to(np.array([1.0, -1, -1]), (2, 8, 8, 3))
    white = np.ones((4, 8, 8, 1))
    black = -white
    sheet = saved(tmp_path / "grid.png", [("red", red), ("black", black)], scale=2)
    assert sheet.shape[0] == 2 * _MARGIN + 2 * 20 + _ROW_GAP  # a line of text is 20 high
    left = sheet.shape[1] - _MARGIN - 4 * 16 - 3 * _GAP
    assert tuple(sheet[_MARGIN + 10, left + 3]) == (255, 0, 0)
    assert tuple(sheet[_MARGIN + 20 + _ROW_GAP + 10, left + 3]) == (0, 0, 0)
    assert tuple(sheet[_MARGIN + 10, left + 2 * (16 + _GAP) + 3]) == (255, 255, 255)  # no image


def test_captions_are_drawn_and_long_ones_wrapped(tmp_path):
    images = np.ones((2, 8, 8, 1))  # white, so that all ink is text
    none = saved(tmp_path / "none.png", [("", images)])
    short = saved(tmp_path / "short.png", [("student", images)])
    long = saved(tmp_path / "long.png", [("a caption of many words " * 4, images)])
    assert (none == 255).all()
    assert (short < 128).any() and short.shape[1] > none.shape[1]
    assert (long < 128).sum() > (short < 128).sum()
    assert long.shape[1] < 450 and long.shape[0] > short.shape[0]


def test_columns_have_captions_that_fit():
    """Above the images, in the middle of each, and images are enlarged until they fit."""
    images = np.ones((3, 8, 8, 1))
    bare, named = (np.asarray(draw_grid([("x", images)], columns=c)) for c in ((), ("a", "", "c")))
    heading = named[: len(named) - len(bare) + 12]
    np.testing.assert_array_equal(named[-len(bare) + 12 :], bare[12:])
    columns = np.flatnonzero((heading < 250).any(axis=(0, 2)))
    left = named.shape[1] - 12 - 3 * 52 + 4  # the margin, and three images of 48 with gaps of 4
    inside = [((columns >= left + i * 52) & (columns < left + i * 52 + 48)).sum() for i in range(3)]
    assert inside[0] and inside[2] and not inside[1] and sum(inside) == len(columns)
    wide = np.asarray(draw_grid([("x", images)], columns=["longer than an image is"] * 3))
    assert wide.shape[1] > 2 * named.shape[1]


def test_larger_images_are_enlarged_less(tmp_path):
    sheet = saved(tmp_path / "grid.png", [("", np.zeros((1, 28, 28, 1)))])
    assert sheet.shape[0] == 2 * _MARGIN + 56


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "`rows` is empty"),
        ([("a", np.zeros((8, 8, 1)))], {}, "'a' must have the shape"),
        ([("a", np.zeros((2, 8, 8, 2)))], {}, "'a' must have the shape"),
        ([("a", np.full((1, 8, 8, 1), np.nan))], {}, "'a' have NaN"),
        ([("a", np.zeros((1, 8, 8, 1)))], {"scale": 0}, "`scale`"),
    ],
)
def test_malformed_rows_are_refused(tmp_path, rows, options, message):
    with pytest.raises(ValueError, match=message):
        save_grid(tmp_path / "grid.png", rows, **options)
