"""Colour emoji (32x32): the pictures inside a font, with Unicode's groups as classes."""

import dataclasses
import functools
import io
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from piflow_jax.arguments import prefixed
from piflow_jax.buckets import located
from piflow_jax.data.pictures import read_picture
from piflow_jax.data.source import ArraySource, pixel_source

EMOJI_CLASSES = (
    *("Smileys & Emotion", "People & Body", "Animals & Nature", "Food & Drink"),
    *("Travel & Places", "Activities", "Objects", "Symbols", "Flags"),
)
_SIZE = 32
_FONT, _LIST = "NotoColorEmoji.ttf", "emoji-test.txt"
# Where Debian's packages fonts-noto-color-emoji and unicode-data have them.
_PACKAGED = {_FONT: "/usr/share/fonts/truetype/noto", _LIST: "/usr/share/unicode/emoji"}
_VARIATION = 0xFE0F
_SKIN_TONES = range(0x1F3FB, 0x1F400)
_TEST_PART = 10  # one base character in ten is for figures


@functools.cache
def load_emoji_source(data_dir: str | None = None) -> ArraySource:
    """Loads the colour emoji of the font Noto Color Emoji without downloading anything.

    The font has one PNG of 136x128 for each emoji (table CBDT). Transparent parts become white, and
    the picture is scaled to 32x32. A checksum of the base character decides whether an emoji is a
    training image or, in one of ten cases, a test image. Emoji that differ only in the tone of skin
    have the same base character, so they are all training images or all test images.

    Args:
      data_dir: folder of `NotoColorEmoji.ttf` and Unicode's `emoji-test.txt`; a `gs://` path works.
        By default the places of Debian's packages `fonts-noto-color-emoji` and `unicode-data`.

    Returns:
      Images float32[32, 32, 3] in [-1, 1]; nine classes, which are Unicode's groups. `test` has the
      test images.

    Raises:
      FileNotFoundError: one of the two files is not there.
      ImportError: fontTools is not installed.
      ValueError: a file is damaged, or has no emoji.
    """
    paths = {name: _path(name, data_dir) for name in (_FONT, _LIST)}
    pictures = _Font(paths[_FONT])
    parts: dict[bool, tuple[list, list]] = {False: ([], []), True: ([], [])}
    seen = set()
    for group, sequence in _listed(paths[_LIST]):
        glyph = pictures.glyph(sequence)
        if glyph is None or glyph in seen:  # some flags share one
            continue
        seen.add(glyph)
        images, labels = parts[_for_figures(sequence)]
        images.append(_scaled(pictures.png(glyph), f"{paths[_FONT]}, glyph {glyph}"))
        labels.append(EMOJI_CLASSES.index(group))
    train, test = (_source(*parts[split], paths[_FONT]) for split in (False, True))
    logging.info("emoji: %d images from %s; %d test images", len(train), paths[_FONT], len(test))
    return dataclasses.replace(train, test=test)


def _path(name: str, data_dir: str | None) -> epath.Path:
    path = located(data_dir or _PACKAGED[name]) / name
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is not there. Either run `apt-get install fonts-noto-color-emoji "
            f"unicode-data` (Debian, Ubuntu), or name the folder of {_FONT} and {_LIST} with "
            "--config.data.data_dir"
        )
    return path


def _listed(path: epath.Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Group and code points of each emoji of `emoji-test.txt` (Unicode Technical Standard 51)."""
    group = ""
    with prefixed(f"{path} is not Unicode's {_LIST}"):
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("# group:"):
                group = line.partition(":")[2].strip()
            points, _, status = line.partition("#")[0].partition(";")
            if status.strip() == "fully-qualified" and group in EMOJI_CLASSES:
                yield group, tuple(int(point, 16) for point in points.split())


def _for_figures(sequence: tuple[int, ...]) -> bool:
    base = [point for point in sequence if point not in (*_SKIN_TONES, _VARIATION)]
    return zlib.crc32("".join(map(chr, base)).encode()) % _TEST_PART == 0


class _Font:
    """The pictures of a font by sequences of code points."""

    def __init__(self, path: epath.Path):
        try:
            from fontTools.ttLib import TTFont, TTLibError
        except ImportError as error:
            raise ImportError(
                "config.data.name = 'emoji' needs fontTools: pip install 'piflow_jax[emoji]'"
            ) from error
        faults = (TTLibError, KeyError, IndexError, ValueError)
        with prefixed(f"{path} is not a font with pictures (CBDT)", faults):
            font = TTFont(io.BytesIO(path.read_bytes()), lazy=True)
            self._glyphs = font.getBestCmap()
            self._pictures = font["CBDT"].strikeData[0]
            self._ligatures = dict(_ligatures(font["GSUB"].table))

    def glyph(self, sequence: tuple[int, ...]) -> str | None:
        """The glyph that shows a sequence, or None."""
        # The font's sequences are without the selector that asks for colours.
        names = tuple(self._glyphs.get(point) for point in sequence if point != _VARIATION)
        found = names[0] if len(names) == 1 else self._ligatures.get(names)
        return found if found in self._pictures else None

    def png(self, glyph: str) -> bytes:
        """The encoded picture of a glyph."""
        return self._pictures[glyph].imageData


def _ligatures(table: Any) -> Iterator[tuple[tuple[str, ...], str]]:
    for lookup in table.LookupList.Lookup:
        for part in lookup.SubTable:
            part = getattr(part, "ExtSubTable", part)
            for first, ligatures in getattr(part, "ligatures", {}).items():
                for ligature in ligatures:
                    yield (first, *ligature.Component), ligature.LigGlyph


def _scaled(png: bytes, name: str) -> np.ndarray:
    """A picture uint8[32, 32, 3], in the middle of a white square."""
    from PIL import Image, ImageOps

    picture = Image.fromarray(read_picture(png, name))
    return np.asarray(ImageOps.pad(picture, (_SIZE, _SIZE), color="white"))


def _source(images: list[np.ndarray], labels: list[int], path: epath.Path) -> ArraySource:
    if not images:
        raise ValueError(f"{path} has too few of the emoji in {_LIST}")
    return pixel_source("emoji", np.stack(images), np.asarray(labels), EMOJI_CLASSES)
