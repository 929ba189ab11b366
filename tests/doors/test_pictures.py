"""The door of pictures: each mode, format and fault, and the right pixels or the right sentence.

Expected pixels are computed here in NumPy from the values that were written; files that Pillow does
not write are written here byte by byte.
"""

import io
import os
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from piflow_jax.data.pictures import PictureError, picture_sizes, read_picture
from piflow_jax.evaluation.image_sets import open_images

CASES = Path(__file__).parents[1] / "cases"
RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (5, 7, 1), np.uint8)
COLOUR = RNG.integers(0, 256, (5, 7, 3), np.uint8)
ALPHA = RNG.integers(0, 256, (5, 7, 1), np.uint8)
ALPHA[0, :2, 0] = 0, 255
DEEP = RNG.integers(0, 65536, (5, 7, 1), np.uint16)
DEEP_COLOUR = RNG.integers(0, 65536, (5, 7, 3), np.uint16)
DEEP_ALPHA = RNG.integers(0, 65536, (5, 7, 1), np.uint16)
UNIT = RNG.random((5, 7, 1), np.float32)
PALETTE = RNG.integers(0, 256, (256, 3), np.uint8)


def saved(pixels, form, mode=None, **options):
    """A file that Pillow writes; of `mode`, where it does not follow from the array."""
    pixels = np.squeeze(pixels, -1) if pixels.shape[-1] == 1 else pixels
    picture = Image.fromarray(pixels)
    if mode is not None and mode != picture.mode:
        size = pixels.shape[1::-1]
        picture = Image.frombytes(mode, size, np.ascontiguousarray(pixels).tobytes())
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def png(pixels, depth=8, transparent=None, size=None):
    """A PNG of 1 to 16 bits: 1 channel is grey, 2 grey with alpha, 3 colours, 4 with alpha."""
    height, width, channels = pixels.shape
    if depth == 16:
        lines = [row.astype(">u2").tobytes() for row in pixels]
    else:
        bits = np.unpackbits(pixels.reshape(height, -1, 1).astype(np.uint8), axis=-1)
        lines = [np.packbits(row[:, 8 - depth :]).tobytes() for row in bits]
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    stated = size or (width, height)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", *stated, depth, colour, 0, 0, 0))]
    if transparent is not None:
        chunks.append((b"tRNS", struct.pack(f">{len(transparent)}H", *transparent)))
    chunks += [(b"IDAT", zlib.compress(b"".join(b"\0" + line for line in lines))), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(pixels, *, bits=None, white_is_zero=False, kind=1, orientation=1, extra=None):
    """An uncompressed TIFF in one strip.

    `kind` of the samples is 1 for unsigned, 2 for signed, 3 for floating-point; `extra` says of a
    fourth one that it is 0 nothing, 1 the alpha by which colours are multiplied, 2 alpha.
    """
    height, width, channels = pixels.shape
    depth = pixels.dtype.itemsize * 8
    data = pixels.astype(pixels.dtype.newbyteorder("<")).tobytes()
    if bits == 12:  # two values in three bytes, each line filled up
        even = np.pad(pixels[..., 0], ((0, 0), (0, width % 2)))
        high = np.unpackbits(even.astype(">u2").view(np.uint8).reshape(height, -1, 2), axis=-1)
        data = np.packbits(high[..., 4:].reshape(height, -1), axis=-1)[:, : -(-width * 3 // 2)]
        data = data.tobytes()
    photometric = 2 if channels > 2 else int(not white_is_zero)
    tags = [(256, width), (257, height), (258, bits or depth), (259, 1), (262, photometric)]
    tags += [(273, 8), (274, orientation), (277, channels), (278, height), (279, len(data))]
    tags += [(338, extra)] * (extra is not None) + [(339, kind)]
    counts = {258: channels, 339: channels}
    entries, values, end = b"", b"", 8 + len(data) + 2 + 12 * len(tags) + 4
    for tag, value in tags:
        count = counts.get(tag, 1)
        packed = struct.pack(f"<{count}H", *[value] * count)
        if len(packed) > 4:
            place = struct.pack("<I", end + len(values))
            values += packed
        else:
            place = packed.ljust(4, b"\0")
        entries += struct.pack("<HHI", tag, 3, count) + place
    directory = struct.pack("<H", len(tags)) + entries + b"\0" * 4
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory + values


def on_white(colour, alpha):
    """Colours over white; of 255 parts there are no halves."""
    share = alpha / 255.0
    return np.round(colour * share + 255 * (1 - share)).astype(np.uint8)


def where(transparent, pixels):
    return np.where(transparent, np.uint8(255), pixels)


def inks_on_paper(inks):
    """(1 - C)(1 - K) and so on, without a profile."""
    inks = inks / 255.0
    return np.round(255 * (1 - inks[..., :3]) * (1 - inks[..., 3:])).astype(np.uint8)


def lab_to_srgb(lab):
    """CIE 15 and IEC 61966-2-1; the white is D50, adapted by Bradford's matrix as in profiles."""
    lightness = lab[..., 0] * (100 / 255)
    a, b = lab[..., 1].astype(np.int8).astype(float), lab[..., 2].astype(np.int8).astype(float)
    fy = (lightness + 16) / 116
    f = np.stack([fy + a / 500, fy, fy - b / 200], axis=-1)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * [0.9642, 1, 0.8249]
    matrix = np.array(
        [
            [3.1338561, -1.6168667, -0.4906146],
            [-0.9787684, 1.9161415, 0.0334540],
            [0.0719453, -0.2289914, 1.4052427],
        ]
    )
    linear = np.clip(xyz @ matrix.T, 0, 1)
    curved = np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)
    return np.round(255 * curved).astype(np.uint8)


INKS = RNG.integers(0, 256, (5, 7, 4), np.uint8)
# Within sRGB, so that nothing is cut off; a and b are signed.
LAB = np.stack([np.full((5, 7), 128), *RNG.integers(-20, 20, (2, 5, 7))], -1).astype(np.uint8)
MULTIPLIED = np.minimum(COLOUR, ALPHA)
BITS = RNG.integers(0, 2, (5, 7, 1), np.uint8)
TWO = RNG.integers(0, 4, (5, 7, 1), np.uint8)
FOUR = RNG.integers(0, 16, (5, 7, 1), np.uint8)
TWELVE = RNG.integers(0, 4096, (5, 7, 1), np.uint16)


def palette_file(form, transparency=None):
    picture = Image.fromarray(GREY[..., 0])
    picture.putpalette(PALETTE.tobytes())
    buffer = io.BytesIO()
    options = {} if transparency is None else {"transparency": transparency}
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def animation(form, pixels, **options):
    """Two frames, the second of other colours."""
    frames = [Image.fromarray(frame) for frame in (pixels, 255 - pixels)]
    buffer = io.BytesIO()
    frames[0].save(buffer, form, save_all=True, append_images=frames[1:], **options)
    return buffer.getvalue()


def pgm(values, most):
    header = f"P5 {values.shape[1]} {values.shape[0]} {most}\n".encode()
    return header + values.astype(">u2" if most > 255 else "u1").tobytes()


def joined(*arrays):
    return np.concatenate(arrays, axis=-1)


def scaled(unit):
    return np.floor(unit * np.float64(255) + 0.5)


ENTRIES = PALETTE[GREY[..., 0]]
ALPHAS = RNG.integers(0, 256, 256).astype(np.uint8)
ONE = int(GREY[2, 3, 0])  # a value that is transparent, and where it is
AT_ONE = GREY == ONE
AT_COLOUR = (COLOUR[1, 1] == COLOUR).all(-1, keepdims=True)
AT_DEEP = (DEEP_COLOUR[1, 1] == DEEP_COLOUR).all(-1, keepdims=True)
DEEP_ONE = int(DEEP[2, 3, 0])

# What is written, and the pixels that are right; grey ones for all three colours.
RIGHT = {
    "1, png": (png(BITS, 1), BITS * 255),
    "1, png, a transparent value": (png(BITS, 1, [0]), where(BITS == 0, BITS * 255)),
    "L of 2 bits, png": (png(TWO, 2), TWO * 85),
    "L of 2 bits, png, a transparent value": (png(TWO, 2, [1]), where(TWO == 1, TWO * 85)),
    "L of 4 bits, png, a transparent value": (png(FOUR, 4, [9]), where(FOUR == 9, FOUR * 17)),
    "L, png": (png(GREY), GREY),
    "L, png, a transparent value": (png(GREY, 8, [ONE]), where(AT_ONE, GREY)),
    "L of 100 values, pgm": (pgm(GREY % 101, 100), np.round(GREY % 101 * (255 / 100))),
    "L, tiff, white is zero": (tiff(GREY, white_is_zero=True), 255 - GREY),
    "LA, png": (png(joined(GREY, ALPHA)), on_white(GREY, ALPHA)),
    "LA of 16 bits, png": (png(joined(DEEP, DEEP_ALPHA), 16), on_white(DEEP >> 8, DEEP_ALPHA >> 8)),
    "RGB, png": (png(COLOUR), COLOUR),
    "RGB, bmp": (saved(COLOUR, "BMP"), COLOUR),
    "RGB, webp": (saved(COLOUR, "WEBP", lossless=True), COLOUR),
    "RGB, jpeg 2000": (saved(COLOUR, "JPEG2000", irreversible=False), COLOUR),
    "RGB, png, a transparent colour": (
        png(COLOUR, 8, COLOUR[1, 1].tolist()),
        where(AT_COLOUR, COLOUR),
    ),
    "RGB of 16 bits, png": (png(DEEP_COLOUR, 16), DEEP_COLOUR >> 8),
    "RGB of 16 bits, png, a transparent colour": (
        png(DEEP_COLOUR, 16, DEEP_COLOUR[1, 1].tolist()),
        where(AT_DEEP, DEEP_COLOUR >> 8),
    ),
    "RGB of 16 bits, tiff": (tiff(DEEP_COLOUR), DEEP_COLOUR >> 8),
    "RGBX, tiff": (tiff(joined(COLOUR, ALPHA), extra=0), COLOUR),
    "RGBA, png": (png(joined(COLOUR, ALPHA)), on_white(COLOUR, ALPHA)),
    "RGBA, tiff": (tiff(joined(COLOUR, ALPHA), extra=2), on_white(COLOUR, ALPHA)),
    "RGBA, webp": (
        saved(joined(COLOUR, ALPHA), "WEBP", lossless=True, exact=True),
        on_white(COLOUR, ALPHA),
    ),
    "RGBA of 16 bits, png": (
        png(joined(DEEP_COLOUR, DEEP_ALPHA), 16),
        on_white(DEEP_COLOUR >> 8, DEEP_ALPHA >> 8),
    ),
    "RGBa, tiff": (tiff(joined(MULTIPLIED, ALPHA), extra=1), MULTIPLIED + (255 - ALPHA)),
    "P, png": (palette_file("PNG"), ENTRIES),
    "P, png, alphas": (palette_file("PNG", ALPHAS.tobytes()), on_white(ENTRIES, ALPHAS[GREY])),
    "P, png, a transparent entry": (palette_file("PNG", ONE), where(AT_ONE, ENTRIES)),
    "P, gif, a transparent entry": (palette_file("GIF", ONE), where(AT_ONE, ENTRIES)),
    "CMYK, tiff": (saved(INKS, "TIFF", "CMYK"), inks_on_paper(INKS)),
    "LAB, tiff": (saved(LAB, "TIFF", "LAB"), lab_to_srgb(LAB)),
    "I;16, png": (png(DEEP, 16), DEEP >> 8),
    "I;16, png, a transparent value": (
        png(DEEP, 16, [DEEP_ONE]),
        where(DEEP == DEEP_ONE, DEEP >> 8),
    ),
    "I;16, tiff": (tiff(DEEP), DEEP >> 8),
    "I;16, tiff, white is zero": (tiff(DEEP, white_is_zero=True), (65535 - DEEP) >> 8),
    "I;16 of 12 bits, tiff": (tiff(TWELVE, bits=12), TWELVE >> 4),
    "I;16B, tiff": (saved(DEEP.astype(">u2"), "TIFF", "I;16B"), DEEP >> 8),
    "I;16, jpeg 2000": (saved(DEEP, "JPEG2000", irreversible=False), DEEP >> 8),
    "I of 16 bits, pgm": (pgm(DEEP, 65535), DEEP >> 8),
    "I of 16 bits, dark, pgm": (pgm(DEEP >> 8, 65535), DEEP * 0),
    "I of 8-bit values, tiff": (tiff(GREY.astype(np.int32), kind=2), GREY),
    "F in [0, 1], tiff": (tiff(UNIT, kind=3), scaled(UNIT)),
    "F in [0, 1], tiff, white is zero": (
        tiff(UNIT, kind=3, white_is_zero=True),
        255 - scaled(UNIT),
    ),
    "F of 8-bit values, tiff": (tiff(GREY.astype(np.float32), kind=3), GREY),
    "two frames, gif": (animation("GIF", BITS[..., 0] * 200), BITS * 200),
    "two frames, png": (animation("PNG", COLOUR), COLOUR),
    "two frames, webp": (animation("WEBP", COLOUR, lossless=True), COLOUR),
    "two pages, tiff": (animation("TIFF", COLOUR), COLOUR),
}


@pytest.mark.parametrize("case", RIGHT)
def test_each_mode_of_each_format_gives_the_right_pixels(case):
    data, expected = RIGHT[case]
    found = read_picture(data, "x")
    assert found.dtype == np.uint8 and found.shape == (5, 7, 3) and found.flags.c_contiguous
    # Pillow divides by the alpha and rounds; it converts LAB by tables of 8 bits.
    tolerance = {"RGBa, tiff": 1, "LAB, tiff": 2}.get(case, 0)
    assert np.abs(found - np.asarray(expected, int)).max() <= tolerance


@pytest.mark.parametrize("case", ["RGBA, png", "P, png", "I;16, png", "CMYK, tiff"])
def test_grey_is_the_luma_of_the_right_pixels(case):
    data, expected = RIGHT[case]
    found = read_picture(data, "x", mode="L")
    luma = np.broadcast_to(expected, (5, 7, 3)) @ np.array([0.299, 0.587, 0.114])
    assert found.dtype == np.uint8 and found.shape == (5, 7, 1)
    np.testing.assert_allclose(found[..., 0], luma, atol=0.51)


def test_a_jpeg_and_its_four_inks_are_as_pillow_decodes_them():
    """What ImageNet's pictures are: nothing but the decoder between file and pixels."""
    for pixels, mode in ((COLOUR, "RGB"), (GREY, "L"), (INKS, "CMYK")):
        data = saved(pixels, "JPEG", mode)
        with Image.open(io.BytesIO(data)) as picture:
            expected = picture.convert("RGB")
        np.testing.assert_array_equal(read_picture(data, "x"), expected)


def test_a_file_of_the_cases_is_a_ramp():
    found = read_picture(CASES / "07-16-bit-png" / "ramp.png")
    expected = (np.arange(64) * 65535 // 63) >> 8
    assert (found == expected[None, :, None]).all()


# Where the stored first row and first column are seen, by orientation (EXIF 2.32, section 4.6.4).
SIDES = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


def seen(pixels, orientation):
    """The picture that a viewer shows, pixel by pixel."""
    row_side, column_side = SIDES[orientation]
    height, width = pixels.shape[:2]
    sideways = row_side in ("left", "right")
    result = np.zeros((width, height, 3) if sideways else pixels.shape, np.uint8)
    for row in range(height):
        for column in range(width):
            along_rows = row if row_side in ("top", "left") else height - 1 - row
            along_columns = column if column_side in ("top", "left") else width - 1 - column
            place = (along_columns, along_rows) if sideways else (along_rows, along_columns)
            result[place] = pixels[row, column]
    return result


def exif(orientation):
    tags = Image.Exif()
    tags[274] = orientation
    return tags.tobytes()


ORIENTED = {
    "jpeg": lambda o: saved(COLOUR, "JPEG", quality=100, subsampling=0, exif=exif(o)),
    "png": lambda o: saved(COLOUR, "PNG", exif=exif(o)),
    "webp": lambda o: saved(COLOUR, "WEBP", lossless=True, exif=exif(o)),
    "tiff": lambda o: tiff(COLOUR, orientation=o),
    "compressed tiff": lambda o: saved(COLOUR, "TIFF", compression="tiff_lzw", tiffinfo={274: o}),
}


@pytest.mark.parametrize("form", ORIENTED)
@pytest.mark.parametrize("orientation", SIDES)
def test_pictures_stand_upright(form, orientation):
    data, stored = ORIENTED[form](orientation), COLOUR
    if form == "jpeg":
        stored = read_picture(saved(COLOUR, "JPEG", quality=100, subsampling=0), "x")
    upright = seen(stored, orientation)
    np.testing.assert_array_equal(read_picture(data, "x"), upright)
    assert picture_sizes(data, "x") == ((5, 7), upright.shape[:2])


@pytest.mark.parametrize("tags", [b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0", exif(9), exif(1)[:-9]])
def test_damaged_orientations_leave_a_picture_as_it_is_stored(tags):
    data = saved(COLOUR, "PNG", exif=tags)
    np.testing.assert_array_equal(read_picture(data, "x"), COLOUR)


def write(data):
    return lambda path: path.write_bytes(data)


PHOTOGRAPH = saved(RNG.integers(0, 256, (64, 64, 3), np.uint8), "JPEG")

# What lies at a path, and what is said of it.
WRONG = {
    "nothing": (lambda path: None, "No such file or directory"),
    "an empty file": (write(b""), "it is empty"),
    "a text": (write(b"hello"), "its format is none that Pillow reads"),
    "a page of the web": (write(b"<!DOCTYPE html><html>404"), "its format is none that Pillow"),
    "half a jpeg": (write(PHOTOGRAPH[: len(PHOTOGRAPH) // 2]), "truncated"),
    "half a png": (write(png(GREY)[:70]), "truncated|broken|unexpected"),
    "a header alone": (write(png(GREY)[:30]), "truncated|broken|read"),
    "a bomb": (write(png(GREY, size=(60_000, 60_000))), "exceeds limit of .* pixels"),
    "a folder": (lambda path: path.mkdir(), "it is a folder"),
    "a pipe": (os.mkfifo, "it is no file"),
    "a dangling link": (lambda path: path.symlink_to("gone.png"), "a link to gone.png, which is"),
    "a link to itself": (lambda path: path.symlink_to(path.name), "[Ss]ymbolic link"),
    "floats beyond 1": (write(tiff(UNIT * 3, kind=3)), r"to 2\.\d+, and nothing says which is w"),
    "floats below 0": (write(tiff(UNIT - 1, kind=3)), r"from -0\.\d+ to"),
    "no numbers": (
        write(tiff(UNIT * np.float32(np.nan), kind=3)),
        "floating-point values from nan",
    ),
    "long integers": (write(tiff(DEEP.astype(np.int32), kind=2)), "integers of 32 bits from"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("name", ["x.png", os.fsdecode(b"\xff\xfe.png")], ids=["utf-8", "bytes"])
def test_what_is_no_picture_is_named(tmp_path, case, name):
    make, reason = WRONG[case]
    path = tmp_path / name
    make(path)
    with pytest.raises(PictureError, match=f"is not a readable image: .*{reason}") as raised:
        read_picture(path)
    assert raised.value.name == os.fspath(path) and str(raised.value).startswith(os.fspath(path))
    assert "\n" not in str(raised.value)
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)


@pytest.mark.parametrize("name", ["a\0.png", "\ud800.png", "x" * 300 + ".png"])
def test_what_cannot_be_a_name_is_refused(name):
    with pytest.raises(PictureError, match="is not a readable image"):
        read_picture(name)


def archive(**arrays):
    buffer = io.BytesIO()
    np.savez_compressed(buffer, images=RNG.integers(0, 256, (2, 9, 9, 3), np.uint8), **arrays)
    return buffer.getvalue()


def a_set(*names):
    """A folder of a picture and of other things, by what `WRONG` calls them."""

    def make(path):
        path.mkdir()
        (path / "0.png").write_bytes(png(GREY))
        for name in names:
            case, _, file = name.partition(" as ")
            WRONG[case][0](path / file)

    return make


ARCHIVE = archive()
# What lies at a path that `config.evaluation.images` names, and what is said of it.
WRONG_SETS = {
    "half an archive": (write(ARCHIVE[: len(ARCHIVE) // 2]), r"no \.npz file"),
    "a damaged archive": (
        write(ARCHIVE[:90] + bytes(20) + ARCHIVE[110:]),
        r"damaged \.npz file: (error|BadZipFile)",
    ),
    "a pickle": (write(b"\x80\x04N."), r"no \.npz file"),
    "a pipe": (os.mkfifo, r"no \.npz file"),
    "digits of another script": (a_set("a text as ٣.png"), "is not named <place>"),
    "negative places": (write(archive(place=np.array([-1, 0]))), "`place` must not be negative"),
    "a number beyond 64 bits": (a_set(f"a text as {'9' * 40}.png"), "is not named <place>"),
    "a text": (a_set("a text as 1.png"), r"1\.png is not a readable image"),
    "a folder": (a_set("a folder as 1.png"), r"1\.png is not a readable image: it is a folder"),
    "a dangling link": (a_set("a dangling link as 1.png"), r"1\.png is not a readable image: No "),
    "half a png": (a_set("half a png as 1.png"), r"1\.png is not a readable image"),
}


@pytest.mark.parametrize("case", WRONG_SETS)
def test_wrong_sets_of_pictures_are_named(tmp_path, case):
    make, message = WRONG_SETS[case]
    make(tmp_path / "set")
    with pytest.raises(ValueError, match=message) as raised:
        images = open_images(tmp_path / "set")
        images.digest(range(len(images)))
        [images[number] for number in range(len(images))]
    assert str(tmp_path / "set") in str(raised.value)


def test_sets_of_pictures_are_read_by_the_one_reader(tmp_path):
    (tmp_path / "set").mkdir()
    for place, case in enumerate(RIGHT):
        (tmp_path / "set" / f"{place}.png").write_bytes(RIGHT[case][0])  # whatever its format
    images = open_images(tmp_path / "set")
    for place, (data, _) in enumerate(RIGHT.values()):
        np.testing.assert_array_equal(images[place], read_picture(data, "x"))


def test_an_error_of_the_system_is_not_the_pictures(tmp_path, monkeypatch):
    (tmp_path / "x.png").write_bytes(png(GREY))
    read_picture(tmp_path / "x.png")

    def lost(*_):
        raise OSError(5, "Input/output error", "x.png")

    monkeypatch.setattr("builtins.open", lost)
    with pytest.raises(OSError, match="Input/output error"):
        read_picture(tmp_path / "x.png")
