"""Colour emoji: pictures, classes and splits, compared with what FreeType draws of the font."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont, features

from piflow_jax.config import ConfigError, parse
from piflow_jax.data import emoji, load_emoji_source
from piflow_jax.systems.datasets import load_source
from tests import tiny

pytest.importorskip("fontTools")

FONT = Path(__file__).parents[1] / "cases" / "emoji" / "NotoColorEmoji.ttf"
LISTED = """\
# group: Smileys & Emotion
1F600                 ; fully-qualified     # grinning face
2764 FE0F             ; fully-qualified     # red heart
2764                  ; unqualified         # red heart
2764 FE0F 200D 1F525  ; fully-qualified     # heart on fire
1F923                 ; fully-qualified     # one that the font lacks

# group: People & Body
1F44B                 ; fully-qualified     # waving hand
1F44B 1F3FB           ; fully-qualified     # waving hand: light skin tone
1F44B 1F3FF           ; fully-qualified     # waving hand: dark skin tone

# group: Component
1F3FB                 ; component           # light skin tone

# group: Animals & Nature
1F436                 ; fully-qualified     # dog face

# group: Food & Drink
1F34E                 ; fully-qualified     # red apple

# group: Travel & Places
2708 FE0F             ; fully-qualified     # aeroplane

# group: Flags
1F1EB 1F1F7           ; fully-qualified     # flag: France
"""
# Text and class of every emoji of the list that the font has, in the list's order.
EMOJI = [
    *(("\U0001f600", 0), ("\u2764\ufe0f", 0), ("\u2764\ufe0f\u200d\U0001f525", 0)),
    *(("\U0001f44b", 1), ("\U0001f44b\U0001f3fb", 1), ("\U0001f44b\U0001f3ff", 1)),
    *(("\U0001f436", 2), ("\U0001f34e", 3), ("\u2708\ufe0f", 4)),
    ("\U0001f1eb\U0001f1f7", 8),
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with both files; of the list the dog and the hands are for figures."""
    shutil.copy(FONT, tmp_path)
    (tmp_path / "emoji-test.txt").write_text(LISTED, encoding="utf-8")
    held_out = {ord("\U0001f436"), ord("\U0001f44b")}
    monkeypatch.setattr(emoji, "_for_figures", lambda sequence: sequence[0] in held_out)
    load_emoji_source.cache_clear()
    yield tmp_path
    load_emoji_source.cache_clear()


def drawn(text):
    """The emoji as FreeType draws it, float[32, 32, 3] , by means of areas."""
    font = ImageFont.truetype(FONT, 109)
    left, top, right, bottom = font.getbbox(text)
    picture = Image.new("RGB", (136, 136), "white")
    at = ((136 - (right - left)) // 2 - left, (136 - (bottom - top)) // 2 - top)
    ImageDraw.Draw(picture).text(at, text, font=font, embedded_color=True)
    return np.asarray(picture.resize((32, 32), Image.Resampling.BOX)) / 127.5 - 1


@pytest.mark.skipif(not features.check("raqm"), reason="sequences are drawn by libraqm")
def test_pictures_are_those_that_are_drawn(folder):
    source = load_emoji_source(str(folder))
    train = [one for one in EMOJI if one[0][0] not in "\U0001f436\U0001f44b"]
    test = [one for one in EMOJI if one not in train]
    for part, expected in ((source, train), (source.test, test)):
        np.testing.assert_array_equal(part.condition, [label for _, label in expected])
        assert part.x.shape == (len(expected), 32, 32, 3)
        for found, (text, _) in zip(part.x, expected, strict=True):
            assert np.abs(found - drawn(text)).mean() < 0.03, text
    assert source.num_classes == len(source.class_names) == 9


def test_tones_of_skin_are_on_one_side():
    hands = [(0x1F44B,), *((0x1F44B, tone) for tone in range(0x1F3FB, 0x1F400))]
    others = [(point,) for point in range(0x1F400, 0x1F500)]
    assert len({emoji._for_figures(hand) for hand in hands}) == 1
    assert emoji._for_figures((0x2764,)) == emoji._for_figures((0x2764, 0xFE0F))
    assert 10 < sum(map(emoji._for_figures, others)) < 45  # about one in ten


def test_the_command_lines_source_is_this_one(folder):
    config = tiny.get_config()
    config.data.name, config.data.data_dir = "emoji", str(folder)
    source = load_source(parse(config).data)
    assert source.name == "emoji" and len(source) == 6 and len(source.test) == 4


def test_a_missing_reader_and_a_damaged_file_end_a_run_in_a_sentence(folder, monkeypatch):
    config = tiny.get_config()
    config.data.name, config.data.data_dir = "emoji", str(folder)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "fontTools.ttLib", None)
        with pytest.raises(
            ConfigError, match=r"^config\.data\.name = 'emoji' needs fontTools: pip"
        ):
            load_source(parse(config).data)
    (folder / emoji._FONT).write_bytes(b"")
    with pytest.raises(
        ConfigError, match=r"^config\.data\.data_dir: .* is not a font with pictures"
    ):
        load_source(parse(config).data)


BROKEN = [
    (emoji._FONT, None, FileNotFoundError, r"ttf is not there.*apt-get install fonts-noto-color-"),
    (emoji._LIST, None, FileNotFoundError, r"emoji-test.txt is not there.*config.data.data_dir"),
    (emoji._FONT, b"", ValueError, "is not a font with pictures"),
    (emoji._FONT, FONT.read_bytes()[:2000], ValueError, "is not a font with pictures"),
    (emoji._LIST, b"# group: Flags\nx ; fully-qualified", ValueError, "is not Unicode's"),
    (emoji._LIST, b"\xff\xfe", ValueError, "is not Unicode's"),
    (emoji._LIST, b"# group: Flags", ValueError, "has too few of the emoji in emoji-test.txt"),
]


@pytest.mark.parametrize(("name", "content", "error", "words"), BROKEN)
def test_what_is_missing_or_damaged_is_named(folder, name, content, error, words):
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(error, match=words):
        load_emoji_source(str(folder))
