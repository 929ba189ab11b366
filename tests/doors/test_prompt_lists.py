"""The door of prompt lists: what is written, and the right prompts or the right sentence."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from absl import logging
from PIL import Image

from piflow_jax.config import ConfigError, base_config, parse
from piflow_jax.data.pictures import PictureError, read_picture
from piflow_jax.data.prompt_lists import Prompt, list_digest, read_prompts
from piflow_jax.data.prompts import load_prompts_source
from piflow_jax.data.text_encoders import WordEncoder
from piflow_jax.modes.prepare_prompts import encode_prompts, listed_prompts

CASES = Path(__file__).parents[1] / "cases"
SIGN = "a sign that reads\u2028HELLO"

# Name and content of a file, and the prompts that are right.
RIGHT = {
    "lines": ("a.txt", b"a cat\n\n  a dog \n", ["a cat", "a dog"]),
    "lines of Windows": ("a.txt", b"a cat\r\na dog\r\n", ["a cat", "a dog"]),
    "lines of old Macintoshes": ("a.txt", b"a cat\ra dog", ["a cat", "a dog"]),
    "a mark": ("a.txt", "\ufeffa cat\na dog".encode(), ["a cat", "a dog"]),
    "two lists with marks, joined": ("a.txt", "\ufeffa\n\ufeffb\n".encode(), ["a", "b"]),
    "a mark within a line": ("a.txt", "a\ufeffb".encode(), ["a\ufeffb"]),
    "a line separator": ("a.txt", f"{SIGN}\nplain".encode(), [SIGN, "plain"]),
    **{
        f"U+{ord(c):04X}": ("a.txt", f"a{c}b\nplain".encode(), [f"a{c}b", "plain"])
        for c in "\v\f\x1c\x1d\x1e\x85\u2028\u2029"
    },
    "an ending in capitals": ("a.TXT", b"a cat", ["a cat"]),
    "a mark before JSON": ("a.jsonl", '\ufeff{"prompt": "a"}\r\n'.encode(), ["a"]),
    "JSON with separators": ("a.jsonl", f'{{"prompt": "{SIGN}"}}'.encode(), [SIGN]),
    "a whole surrogate pair": ("a.jsonl", rb'{"prompt": "\ud83d\udc31"}', ["\U0001f431"]),
    "keys of others": ("a.jsonl", b'{"prompt": "a", "seed": [1]}', ["a"]),
    "null is nothing": ("a.jsonl", b'{"prompt": "a", "aspect": null, "image": null}', ["a"]),
}
# Of an object in a `.jsonl` file, the aspect ratio that is right.
ASPECTS = {
    '"aspect": "16:9"': 16 / 9,
    '"aspect": "2.39:1"': 2.39,
    '"width": 1e308, "height": 5e307': 2.0,
    '"width": "512", "height": 1024': 0.5,
    '"width": 3.0, "height": 2': 1.5,
}
# Likewise, the references and the shape.
REFERENCES = {
    '"references": ["a.png", "b.jpg"]': (("a.png", "b.jpg"), None),
    '"references": "a.png", "aspect": "2:1"': (("a.png",), 2.0),
    '"references": [], "image": "a.png"': ((), 1.0),
    '"references": null': ((), 1.0),
}


@pytest.mark.parametrize("case", RIGHT)
def test_a_list_has_the_right_prompts(tmp_path, case):
    name, content, expected = RIGHT[case]
    (tmp_path / name).write_bytes(content)
    assert read_prompts(tmp_path / name) == [Prompt(text) for text in expected]


@pytest.mark.parametrize("keys", ASPECTS)
def test_a_list_has_the_right_shapes(tmp_path, keys):
    (tmp_path / "a.jsonl").write_text(f'{{"prompt": "a", {keys}}}')
    assert read_prompts(tmp_path / "a.jsonl") == [Prompt("a", ASPECTS[keys])]


def test_references_in_parquet_are_files(tmp_path):
    names = [["a.png", "b.png"], None, []]
    columns = {"prompt": (None, list("abc")), "references": (None, names)}
    found = read_prompts(parquet(tmp_path / "a.parquet", **columns))
    assert [prompt.references for prompt in found] == [("a.png", "b.png"), (), ()]
    assert [prompt.aspect for prompt in found] == [None, 1.0, 1.0]


@pytest.mark.parametrize("keys", REFERENCES)
def test_a_list_has_the_right_references(tmp_path, keys):
    (tmp_path / "a.jsonl").write_text(f'{{"prompt": "a", {keys}}}')
    [found] = read_prompts(tmp_path / "a.jsonl")
    assert (found.references, found.aspect) == REFERENCES[keys]


def test_the_lists_of_the_cases():
    expected = [SIGN, "a cat\von a mat", "a fox\x85in snow", "plain"]
    assert [p.text for p in read_prompts(CASES / "05-txt-unicode-lines/list.txt")] == expected
    found = [p.text for p in read_prompts(CASES / "06-txt-bom/list.txt")]
    assert found == ["a red fox", "a cat"]


GOOD = '{"prompt": "a"}\n'
ASPECT = "line 1: 'aspect' must be like '16:9', or 'height' and 'width' positive numbers"


def of(**keys):
    return json.dumps({"prompt": "a", **keys})


# Name and content of a file, and what is said of it.
WRONG = {
    "Latin-1": ("a.txt", b"a cat\nun caf\xe9\n", r"line 2 is not UTF-8 \(byte 0xe9\)"),
    "Latin-1 in JSON": ("a.jsonl", b'{"prompt": "caf\xe9"}', "line 1 is not UTF-8"),
    "UTF-16": ("a.txt", "a cat\n".encode("utf-16"), r"line 1 is not UTF-8 \(byte 0xff\)"),
    "UTF-16 without a mark": ("a.txt", "a cat".encode("utf-16-le"), "line 1: .* NUL .* UTF-16"),
    "UTF-32": ("a.jsonl", GOOD.encode("utf-32"), "line 1 is not UTF-8"),
    "surrogates in UTF-8": ("a.txt", b"a\nb\xed\xa0\x80", "line 2 is not UTF-8"),
    "NUL": ("a.txt", b"a cat\na\0dog\n", "line 2: the prompt has a NUL character"),
    "NUL in JSON": ("a.jsonl", rb'{"prompt": "a\u0000b"}', "line 1: the prompt has a NUL"),
    "half a pair": ("a.jsonl", rb'{"prompt": "a \ud83d"}', r"line 1: .*half of a .*'\\ud83d'"),
    "the other half": ("a.jsonl", rb'{"prompt": "\udc31"}', r"line 1: .*half of a .*'\\udc31'"),
    "an empty prompt": ("a.jsonl", GOOD + '{"prompt": ""}', "line 2: the prompt is empty"),
    "spaces": ("a.jsonl", r'{"prompt": " \n\t"}', "line 1: the prompt is empty"),
    "no lines": ("a.txt", "\n \r\n", "has no prompts"),
    "a mark alone": ("a.txt", "\ufeff", "has no prompts"),
    "half an object": ("a.jsonl", GOOD + '{"prompt": ', "line 2: Expecting value"),
    "two objects": ("a.jsonl", GOOD.strip() * 2, "line 1: Extra data"),
    "a number": ("a.jsonl", "3", "line 1 has no text under 'prompt'"),
    "nesting": ("a.jsonl", GOOD + "[" * 200_000, "line 2: it is nested too deeply"),
    "nested keys": ("a.jsonl", '{"a":' * 200_000, "line 1: it is nested too deeply"),
    "digits": ("a.jsonl", f'{{"prompt": "a", "width": {"9" * 5000}}}', "line 1: .*limit"),
    "no prompt": ("a.jsonl", '{"Prompt": "a"}', "line 1 has no text under 'prompt'"),
    "a prompt of numbers": ("a.jsonl", '{"prompt": [1]}', "line 1 has no text under 'prompt'"),
    "a reference of a number": ("a.jsonl", of(references=3), "line 1: 'references' must name"),
    "a reference of no name": ("a.jsonl", of(references=["a", ""]), "line 1: 'references' must"),
    "references of objects": ("a.jsonl", of(references=[{}]), "line 1: 'references' must name"),
    "an infinite aspect": ("a.jsonl", of(aspect="1e308:1e-308"), ASPECT),
    "an aspect of nothing": ("a.jsonl", of(aspect="1e-308:1e308"), ASPECT),
    "an aspect beyond floats": ("a.jsonl", of(aspect="1e999:1e999"), ASPECT),
    "an aspect of NaN": ("a.jsonl", of(aspect="nan:1"), ASPECT),
    "an aspect of one part": ("a.jsonl", of(aspect="1.5"), ASPECT),
    "an aspect of three parts": ("a.jsonl", of(aspect="1:2:3"), ASPECT),
    "an aspect of a number": ("a.jsonl", of(aspect=1.5), ASPECT),
    "width of true": ("a.jsonl", of(width=True, height=1), ASPECT),
    "height of false": ("a.jsonl", of(width=1, height=False), ASPECT),
    "negative sides": ("a.jsonl", of(width=-3, height=-2), ASPECT),
    "width without height": ("a.jsonl", of(width=3), ASPECT),
    "an integer beyond floats": ("a.jsonl", of(width=10**400, height=1), ASPECT),
    "a number beyond floats": ("a.jsonl", '{"prompt": "a", "width": 1e999, "height": 1}', ASPECT),
    "a width of NaN": ("a.jsonl", of(width=float("nan"), height=1), ASPECT),
    "a width of a list": ("a.jsonl", of(width=[1], height=1), ASPECT),
    "an image that is no name": ("a.jsonl", of(image=["x.png"] * 99), r"line 1: 'image' must name"),
    "another format": ("a.csv", "prompt\na", "is no list of prompts: its name must end in one of"),
    "no Parquet": ("a.parquet", "PAR1 it is not", "is damaged, or no Parquet file"),
    "an empty Parquet": ("a.parquet", "", "is damaged, or no Parquet file"),
}


def refused(path, message):
    """What `--mode=prepare` says of a list is one sentence with the key, the file and the place."""
    config = base_config()
    config.data.name, config.model.network, config.model.flux.rope_axes = (
        "prompts",
        "flux",
        (8, 4, 4),
    )
    config.data.prompts = str(path)
    with pytest.raises(ConfigError, match=message) as raised:
        listed_prompts(parse(config))
    said = str(raised.value)
    assert said.startswith(f"config.data.prompts: {path}") and "\n" not in said and len(said) < 400


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named_with_its_line(tmp_path, case):
    name, content, message = WRONG[case]
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    refused(path, message)


def test_a_folder_is_no_list(tmp_path):
    (tmp_path / "a.txt").mkdir()
    refused(tmp_path / "a.txt", "is no file")


def parquet(path, **columns):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    types = {name: kind for name, (kind, _) in columns.items()}
    table = pyarrow.table(
        {name: pyarrow.array(values, types[name]) for name, (_, values) in columns.items()}
    )
    parquet.write_table(table, path, row_group_size=2)
    return path


def encoded(value):
    buffer = io.BytesIO()
    Image.fromarray(np.full((2, 3, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def hub_image(*fields):
    import pyarrow

    kinds = {"bytes": pyarrow.binary(), "path": pyarrow.string()}
    return pyarrow.struct([(name, kinds[name]) for name in fields])


# The column `image`: its type, its values, and what each row's picture is: a value, or a sentence.
IMAGES = {
    "bytes and path, as on the Hub": (
        ("bytes", "path"),
        lambda i: {"bytes": encoded(i), "path": f"{i}.png"},
        range(5),
    ),
    "bytes alone": (("bytes",), lambda i: {"bytes": encoded(i)}, range(5)),
    "a path for want of bytes": (
        ("bytes", "path"),
        lambda i: {"bytes": None, "path": f"images/{i}.png"},
        range(5),
    ),
    "paths": (("path",), lambda i: {"path": f"images/{i}.png"}, range(5)),
    "bytes of nothing": (
        ("bytes", "path"),
        lambda i: {"bytes": b"", "path": "x"},
        [f"row {i + 1} (x) is not a readable image: it is empty" for i in range(5)],
    ),
    "neither": (
        ("bytes", "path"),
        lambda i: {"bytes": None, "path": None},
        [f"row {i + 1} is not a readable image: the row has neither" for i in range(5)],
    ),
    "binary": (None, encoded, range(5)),
}


@pytest.mark.parametrize("case", IMAGES)
def test_pictures_in_parquet_are_read(tmp_path, case):
    pyarrow = pytest.importorskip("pyarrow")
    fields, value, expected = IMAGES[case]
    kind = pyarrow.binary() if fields is None else hub_image(*fields)
    path = parquet(
        tmp_path / "a.parquet",
        prompt=(pyarrow.string(), list("abcde")),
        image=(kind, [value(i) for i in range(5)]),
        width=(pyarrow.int64(), [2, 3, 4, 5, 6]),
        height=(pyarrow.int64(), [2] * 5),
    )
    (tmp_path / "images").mkdir()
    for i in range(5):
        (tmp_path / "images" / f"{i}.png").write_bytes(encoded(i))
    prompts = read_prompts(path)
    assert [(p.text, p.aspect) for p in prompts] == list(
        zip("abcde", [1, 1.5, 2, 2.5, 3], strict=True)
    )
    for row in (3, 0, 4, 1, 2):  # by shape, not in the file's order
        if isinstance(expected[row], str):
            with pytest.raises(PictureError) as raised:
                read_picture(*prompts[row].picture(tmp_path))
            assert expected[row] in str(raised.value) and str(path) in str(raised.value)
        else:
            assert (read_picture(*prompts[row].picture(tmp_path)) == expected[row]).all()
    assert len(list_digest(prompts)) == 64
    if fields and "bytes" in fields:
        assert list_digest(prompts) != list_digest(prompts[::-1])


def test_rows_without_a_picture_have_none(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    values = [{"bytes": b"x", "path": "x"}, None]
    path = parquet(
        tmp_path / "a.parquet",
        prompt=(pyarrow.string(), ["a", "b"]),
        image=(hub_image("bytes", "path"), values),
    )
    first, second = read_prompts(path)
    assert first.image and second.image == ""


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("string", ["a", ""], "row 2: the prompt is empty"),
        ("string", ["a", None], "row 2 has no text under 'prompt'"),
        ("string", ["a", "b\0"], "row 2: the prompt has a NUL character"),
        ("binary", [b"a", b"b"], "row 1 has no text under 'prompt'"),
        ("int64", [1, 2], "row 1 has no text under 'prompt'"),
        ("twice", ["a", "b"], "is damaged, or no Parquet file: .*prompt"),
        ("invalid", [b"a", b"b\xe9"], "row 2 is damaged, or no Parquet file: .*utf-8"),
    ],
)
def test_wrong_rows_of_parquet_are_named(tmp_path, kind, values, message):
    pyarrow = pytest.importorskip("pyarrow")
    path = tmp_path / "a.parquet"
    if kind in ("invalid", "twice"):
        from pyarrow import parquet as files

        if kind == "invalid":  # text that is none
            columns = [pyarrow.array(values, pyarrow.binary()).view(pyarrow.string())]
        else:  # two columns of one name
            columns = [pyarrow.array(values)] * 2
        files.write_table(pyarrow.table(columns, names=["prompt"] * len(columns)), path)
    else:
        parquet(path, prompt=(getattr(pyarrow, kind)(), values))
    refused(path, message)


def test_damaged_parquet_is_named_with_its_row(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    words = [" ".join(np.random.default_rng(i).choice(list("abcdef"), 40)) for i in range(6)]
    path = parquet(tmp_path / "a.parquet", prompt=(pyarrow.string(), words))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(path, "is damaged, or no Parquet file")
    spoilt = bytearray(whole)
    place = whole.index(words[4].encode()[:12])  # within the third group of rows
    spoilt[place - 30 : place] = b"\xff" * 30
    path.write_bytes(spoilt)
    refused(path, "rows 5 to 6 is damaged")


LONG = "a red fox in the snow"  # six words, and one that stands before all


@pytest.mark.parametrize(
    ("texts", "cut", "alike"),
    [
        (["a red fox", "a cat"], 0, 0),
        ([LONG, "a cat"], 1, 0),
        ([LONG, f"{LONG} at night", "a cat"], 2, 1),
        (["a red fox in", LONG], 1, 1),
        ([LONG, LONG], 2, 0),  # the same prompt, not two
    ],
)
def test_prompts_that_are_cut_off_are_counted_with_a_warning(tmp_path, caplog, texts, cut, alike):
    encoder = WordEncoder(6, 4, max_length=5)
    prompts = [Prompt(text) for text in texts]
    logging.set_verbosity(logging.INFO)
    manifest = encode_prompts(prompts, encoder, tmp_path, source="x", image_size=64)
    assert manifest["cut_off"] == cut and manifest["tokenizer"] == "words"
    said = [record.getMessage() for record in caplog.records if "cut off" in record.getMessage()]
    assert len(said) == (cut > 0)
    if cut:
        assert f"{cut} of {len(texts)} prompts have more tokens than the 5" in said[0]
        assert f"of these {alike} have the same embedding as another prompt" in said[0]


def test_sets_of_before_are_read_and_are_finished(tmp_path):
    """Neither the tokenizer nor the number of prompts that were cut was recorded."""
    prompts = [Prompt(LONG), Prompt("a cat")]

    def prepare():
        return encode_prompts(prompts, WordEncoder(6, 4, 5), tmp_path, source="x", image_size=64)

    prepare()
    for name in ("preparation/plan.json", "prompts.json"):
        content = json.loads((tmp_path / name).read_text())
        del content["tokenizer"], content["cut_off"]
        (tmp_path / name).write_text(json.dumps(content))
    source = load_prompts_source(tmp_path)
    assert list(source.prompts) == [LONG, "a cat"] and source.manifest["tokenizer"] == ""
    assert prepare()["tokenizer"] == ""
